"""Does the bound tell images of another kind from the test images?

Two scores are judged by their area under the ROC curve (AUROC; 0.5 is chance):

    likelihood   bits/dim: an image of low likelihood is an outlier
    typicality   |bits/dim - mean bits/dim of validation images|: an unusually likely image is an outlier too
"""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchmetrics.functional.classification import binary_auroc

from ddpm_lightning.data import Batch, Digits, ImageDataModule, levels_to_model, model_to_levels
from ddpm_lightning.evaluation.bound import csv_text, image_bits, mean_and_error, model_facts
from ddpm_lightning.figures import drawn
from ddpm_lightning.objectives import DenoisingElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["auroc", "auroc_se", "enlarged_digits", "measure_ood", "outliers"]

SCORES = ("likelihood", "typicality")
RESAMPLES = 1000


def _uniform_noise(batch: Batch, levels: int, seed: int) -> Tensor:
    """Every grey level equally often, for each image from a generator of its own."""
    generators = image_generators(seed, batch.index)
    drawn = [torch.randint(levels, batch.image.shape[1:], generator=generator) for generator in generators]
    return torch.stack(drawn).to(torch.uint8)


def _shuffled(batch: Batch, seed: int) -> Tensor:
    """The pixels of each image in an order of its own, the channels of a pixel together."""
    flat = batch.image.flatten(2)
    orders = [torch.randperm(flat.shape[2], generator=generator) for generator in image_generators(seed, batch.index)]
    order = torch.stack(orders)[:, None].expand_as(flat)
    return flat.gather(2, order).view_as(batch.image)


def enlarged_digits(module: DiffusionModule, count: int) -> tuple[Tensor, Tensor]:
    """The embedded digits in the model's shape and grey levels, and their labels."""
    digits = Digits()
    splits = [digits.split(name) for name in ("test", "val", "train")]
    images, labels = (torch.cat([getattr(split, name) for split in splits])[:count] for name in ("images", "labels"))
    x = interpolate(levels_to_model(images, digits.levels), size=module.shape[1:], mode="bilinear")
    return model_to_levels(x, module.levels).expand(-1, module.shape[0], -1, -1).contiguous(), labels


def outliers(module: DiffusionModule, inside: Batch, of_digits: bool, seed: int) -> dict[str, Batch]:
    """The sets by name. A set that makes no sense for the run is left out."""
    image = inside.image
    sets = {
        "inverted": inside._replace(image=module.levels - 1 - image),
        "pixels shuffled": inside._replace(image=_shuffled(inside, seed + 1)),
        "uniform noise": inside._replace(image=_uniform_noise(inside, module.levels, seed + 2)),
    }
    if image.shape[2] == image.shape[3]:
        sets = {"rotated by 90 degrees": inside._replace(image=image.rot90(dims=(2, 3))), **sets}
    # they are the data themselves, or their classes are more than the model knows
    if not of_digits and not (module.class_conditional and (module.num_classes or 0) < Digits.num_classes):
        images, labels = enlarged_digits(module, len(image))
        sets["embedded digits"] = Batch(images, labels, inside.index[: len(images)])
    return sets


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Probability that an outlier's score exceeds that of an image of the data, a tie counting half."""
    scores = torch.cat([inside, outside])
    target = torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]).long()
    # torchmetrics squeezes scores outside [0, 1] through a sigmoid, in which large ones become equal: give it ranks
    ranks = scores.unique(return_inverse=True)[1].double() / len(scores)
    return float(binary_auroc(ranks, target))


def auroc_se(inside: Tensor, outside: Tensor, seed: int = 0) -> float:
    """Standard error of :func:`auroc` by the bootstrap over the N pairs of scores, each ``[N]``."""
    n = len(inside)
    wins = (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()
    picks = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())
    return float(((counts @ wins) * counts).sum(1).div(n * n).std())


def _judged(inside: Tensor, outside: Tensor, typical: float) -> dict[str, Any]:
    """AUROC of both scores, each with its standard error."""
    inside = inside[: len(outside)]
    scores = {"likelihood": (inside, outside), "typicality": ((inside - typical).abs(), (outside - typical).abs())}
    return {name: {"auroc": auroc(*pair), "se": auroc_se(*pair)} for name, pair in scores.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'set':<24} {'images':>6} {'bits/dim':>18} {'AUROC likelihood':>19} {'AUROC typicality':>19}"]
    for row in rows:
        cells = [f"{row[name]['auroc']:.4f} +- {row[name]['se']:.4f}" if name in row else "" for name in SCORES]
        bits = f"{row['bits_per_dim']['mean']:.4f} +- {row['bits_per_dim']['se']:.4f}"
        lines.append(f"{row['set']:<24} {row['images']:>6} {bits:>18} {cells[0]:>19} {cells[1]:>19}")
    return "\n".join(lines)


def _histograms(rows: list[dict[str, Any]], images: dict[str, Tensor], values: dict[str, Tensor], top: int) -> Tensor:
    """For each set some of its images and the histogram of its bits/dim, that of the test images behind it."""
    inside = values["test images"]
    everything = torch.cat([values[row["set"]] for row in rows])
    low, high = float(everything.min()), float(everything.max())
    # sets can be orders of magnitude apart
    logarithmic = low > 0 and high / low > 8
    edges = (np.geomspace if logarithmic else np.linspace)(low, high, 1 + min(90, 20 + len(inside) // 6))
    picture = Figure(figsize=(10, 1.3 * len(rows) + 0.5), dpi=110, layout="constrained")
    axes = picture.subplots(len(rows), 2, width_ratios=(1, 2.6), squeeze=False)
    for (shown, histogram), row in zip(axes, rows, strict=True):
        name = row["set"]
        # a line of middle grey between the images
        framed = pad(images[name][:4], (0, 1), value=top // 2)
        strip = torch.cat(list(framed), 2)[..., :-1].permute(1, 2, 0).numpy() / top
        shown.imshow(strip.repeat(3 // strip.shape[2], 2))
        shown.set_axis_off()
        histogram.hist(inside.numpy(), edges, color="0.75")
        title = f"{name}: {row['bits_per_dim']['mean']:.3f} +- {row['bits_per_dim']['se']:.3f} bits/dim"
        if name != "test images":
            histogram.hist(values[name].numpy(), edges, color="tab:red", alpha=0.6)
            title += "; AUROC " + ", ".join(f"{score} {row[score]['auroc']:.3f}" for score in SCORES)
        histogram.set_title(title, fontsize=9, loc="left")
        histogram.set_yticks([])
        histogram.spines[["top", "right", "left"]].set_visible(False)
        histogram.set_xlim(edges[0], edges[-1])
        if logarithmic:
            histogram.set_xscale("log")
            ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
            histogram.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            histogram.minorticks_off()
        if row is not rows[-1]:
            histogram.tick_params(labelbottom=False)
    axes[-1, 1].set_xlabel("bits/dim" + (", logarithmic scale" if logarithmic else "") + "; grey: test images")
    return drawn(picture)


def measure_ood(
    module: DiffusionModule,
    data: ImageDataModule,
    estimator: DenoisingElbo,
    images: int = 500,
    seed: int = 0,
    batch_size: int = 100,
) -> tuple[str, dict[str, Any], str, Tensor]:
    """The bound of test images, of validation images and of images of other kinds.

    Args:
        module: the trained module.
        data: its images.
        estimator: the bound.
        images: number of images in each set.
        seed: seed of the choice of images and of the noise. Image k of every set has the same noise.
        batch_size: images evaluated at a time.

    Returns:
        The table, the plain data, the bits/dim of every image as text with commas, and the histograms.
    """
    module.eval_seed = seed
    test, val = data.split("test"), data.split("val")
    inside, typical = test.chosen(images, seed), val.chosen(images, seed)
    # noise of their own
    typical = typical._replace(index=typical.index + len(test))
    sets = {"test images": inside, **outliers(module, inside, isinstance(data, Digits), seed)}
    values = {
        name: image_bits(module, estimator, batch, batch_size, name)
        for name, batch in {"validation images": typical, **sets}.items()
    }
    rows: list[dict[str, Any]] = []
    centre = float(values["validation images"].mean())
    for name, found in values.items():
        mean, error = mean_and_error(found)
        row = {"set": name, "images": len(found), "bits_per_dim": {"mean": mean, "se": error}}
        if name not in ("validation images", "test images"):
            row |= _judged(values["test images"], found, centre)
        rows.append(row)
    T, steps = estimator.evaluated(module.ema_model.T)
    record = {
        **model_facts(module),
        "T": T,
        "steps": steps,
        "auroc_se": f"bootstrap over images, {RESAMPLES} samples, an image and its altered version together",
        "sets": rows,
    }
    columns = {"index": inside.index.tolist(), **{name: values[name].tolist() for name in sets}}
    shown = {name: batch.image for name, batch in sets.items()}
    picture = _histograms([row for row in rows if row["set"] in sets], shown, values, module.levels - 1)
    chain = f"chain of T = {T} states, {steps} of its {(T or 0) - 1} steps, averaged weights, seed {seed}"
    return f"{chain}\n\n{_table(rows)}", record, csv_text(columns), picture
