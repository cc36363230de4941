"""Images of another kind under the bound."""

from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate, pad

from ddpm_lightning.data import Batch, Digits, levels_to_model, model_to_levels
from ddpm_lightning.errors import at_least
from ddpm_lightning.evaluation.bound import csv_text, image_bits, mean_and_error, model_facts
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.figures import drawn
from ddpm_lightning.objectives import DenoisingElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["auroc", "auroc_se", "enlarged_digits", "ood", "outliers"]

SCORES = ("likelihood", "typicality")
RESAMPLES = 1000


def _uniform_noise(batch: Batch, levels: int, seed: int) -> Tensor:
    generators, shape = image_generators(seed, batch.index), batch.image.shape[1:]
    return torch.stack([torch.randint(levels, shape, generator=each) for each in generators]).to(torch.uint8)


def _shuffled(batch: Batch, seed: int) -> Tensor:
    """The pixels of each image in an order of its own, the channels of a pixel together."""
    flat = batch.image.flatten(2)
    orders = [torch.randperm(flat.shape[2], generator=each) for each in image_generators(seed, batch.index)]
    return flat.gather(2, torch.stack(orders)[:, None].expand_as(flat)).view_as(batch.image)


def enlarged_digits(module: DiffusionModule, count: int) -> tuple[Tensor, Tensor]:
    """The embedded digits in the model's shape and grey levels, and their labels."""
    digits = Digits()
    splits = [digits.split(name) for name in ("test", "val", "train")]
    images, labels = (torch.cat([getattr(split, name) for split in splits])[:count] for name in ("images", "labels"))
    x = interpolate(levels_to_model(images, digits.levels), size=module.shape[1:], mode="bilinear")
    return model_to_levels(x, module.grey_levels).expand(-1, module.shape[0], -1, -1).contiguous(), labels


def outliers(module: DiffusionModule, inside: Batch, of_digits: bool, seed: int) -> dict[str, Batch]:
    """The sets by name. A set that makes no sense for the run is left out."""
    image = inside.image
    sets = {
        "inverted": inside._replace(image=module.grey_levels - 1 - image),
        "pixels shuffled": inside._replace(image=_shuffled(inside, seed + 1)),
        "uniform noise": inside._replace(image=_uniform_noise(inside, module.grey_levels, seed + 2)),
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
    return float(_wins(inside, outside).mean())


def _wins(inside: Tensor, outside: Tensor) -> Tensor:
    return (outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()


def auroc_se(inside: Tensor, outside: Tensor, seed: int = 0) -> float:
    """Standard error of :func:`auroc` by the bootstrap over the N pairs of scores, each ``[N]``."""
    n = len(inside)
    picks = torch.randint(n, (RESAMPLES, n), generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros(RESAMPLES, n, dtype=torch.float64).scatter_add_(1, picks, torch.ones_like(picks).double())
    return float(((counts @ _wins(inside, outside)) * counts).sum(1).div(n * n).std())


def _judged(inside: Tensor, outside: Tensor, typical: float) -> dict[str, Any]:
    inside = inside[: len(outside)]
    scores = {"likelihood": (inside, outside), "typicality": ((inside - typical).abs(), (outside - typical).abs())}
    return {name: {"auroc": auroc(*pair), "se": auroc_se(*pair)} for name, pair in scores.items()}


def _table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'set':<24} {'images':>6} {'bits/dim':>18} {'AUROC likelihood':>19} {'AUROC typicality':>19}"]
    for row in rows:
        cells = [f"{row[name]['auroc']:.4f} +- {row[name]['se']:.4f}" if name in row else "" for name in SCORES]
        bits = f"{row['bits_per_dim']['mean']:.4f} +- {row['bits_per_dim']['se']:.4f}"
        lines.append(f"{row['set']:<24} {row['images']:>6} {bits:>18} {cells[0]:>19} {cells[1]:>19}")
    return "\n".join(lines)


def _histograms(rows: list[dict[str, Any]], images: dict[str, Tensor], values: dict[str, Tensor], top: int) -> Tensor:
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
        histogram.set(yticks=[], xlim=(edges[0], edges[-1]))
        histogram.spines[["top", "right", "left"]].set_visible(False)
        if logarithmic:
            histogram.set_xscale("log")
            ticks = [tick for tick in (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
            histogram.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            histogram.minorticks_off()
        if row is not rows[-1]:
            histogram.tick_params(labelbottom=False)
    axes[-1, 1].set_xlabel("bits/dim" + (", logarithmic scale" if logarithmic else "") + "; grey: test images")
    return drawn(picture)


def ood(trained: Trained, images: int = 500, steps: int = 20, T: int | None = None) -> dict[str, Any]:
    """Does the bound tell images of another kind from the test images?

    The same test images are shown as they are, rotated by 90 degrees, inverted and with their pixels shuffled, and
    beside them uniform noise and the embedded 8x8 digits, enlarged. Each set's bits/dim come from the denoising form of
    the bound. Two scores are judged by their area under the ROC curve (AUROC; 0.5 is chance):

    - likelihood: bits/dim; an image of low likelihood is an outlier
    - typicality: distance of bits/dim from the mean of validation images; an unusually likely image is an outlier too

    Image k of every set has the same noise. By default the model is evaluated as a chain of steps + 1 states, every
    step of it, rather than at a few steps of its own long chain: a bound of its own, a little looser, and with far less
    noise in each image.

    The standard error of a mean is taken over images. The standard error of an AUROC is from 1,000 bootstrap samples of
    the images, which keep an image and its altered version together, at a fixed validation mean.

    Writes ood.txt, ood.json, ood.csv (bits/dim of every image) and ood.png.

    Args:
        trained: the run
        images: images in each set, 2 or more
        steps: reverse steps evaluated for each image
        T: evaluate a chain of T states, by default steps + 1, at most the model's
    """
    at_least(2, images=images)
    module, data, seed = trained.diffusion, trained.data, trained.seed
    module.eval_seed = seed
    estimator = DenoisingElbo(steps, min(steps + 1, module.ema_model.T) if T is None else T)
    test, val = data.split("test"), data.split("val")
    inside, typical = test.chosen(images, seed), val.chosen(images, seed)
    # noise of their own
    typical = typical._replace(index=typical.index + len(test))
    sets = {"test images": inside, **outliers(module, inside, isinstance(data, Digits), seed)}
    measured = {"validation images": typical, **sets}
    values = {name: image_bits(trained, estimator, batch, name) for name, batch in measured.items()}
    rows: list[dict[str, Any]] = []
    centre = float(values["validation images"].mean())
    for name, found in values.items():
        mean, error = mean_and_error(found)
        row = {"set": name, "images": len(found), "bits_per_dim": {"mean": mean, "se": error}}
        if name not in ("validation images", "test images"):
            row |= _judged(values["test images"], found, centre)
        rows.append(row)
    states, evaluated = estimator.evaluated(module.ema_model.T)
    record = {
        **model_facts(module),
        "T": states,
        "steps": evaluated,
        "auroc_se": f"bootstrap over images, {RESAMPLES} samples, an image and its altered version together",
        "sets": rows,
    }
    columns = {"index": inside.index.tolist(), **{name: values[name].tolist() for name in sets}}
    shown = {name: batch.image for name, batch in sets.items()}
    picture = _histograms([row for row in rows if row["set"] in sets], shown, values, module.grey_levels - 1)
    chain = f"chain of T = {states} states, {evaluated} of its {(states or 0) - 1} steps, averaged weights, seed {seed}"
    trained.report("ood", f"{chain}\n\n{_table(rows)}", record, {"ood.csv": csv_text(columns), "ood.png": picture})
    return record
