#!/usr/bin/env python3
"""Does the bound tell images of another kind from the test images?

    python scripts/detect_ood.py --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt

The same test images are shown as they are, rotated by 90 degrees, inverted and with their pixels shuffled, and beside
them uniform noise and the embedded 8x8 digits, enlarged. Each set's bits/dim come from the denoising form of the bound,
and two scores are judged by their area under the ROC curve (AUROC; 0.5 is chance):

    likelihood   bits/dim: an image of low likelihood is an outlier
    typicality   |bits/dim - mean bits/dim of validation images|: an unusually likely image is an outlier too

Image k of every set has the same noise. By default the model is evaluated as a chain of steps + 1 states, every step of
it, rather than at a few steps of its own long chain: a bound of its own, a little looser, and with far less noise in
each image (0.02 bits/dim instead of 2 for the 5-minute MNIST model and 20 steps).

The standard error of a mean is that over images; the standard error of an AUROC is from 1,000 bootstrap samples of the
images, which keep an image and its altered version together, at a fixed validation mean.

Writes ood.json, ood.csv (bits/dim of every image) and ood.png to --out.
"""

import argparse
import csv
import json
import sys
import time
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchmetrics.functional.classification import binary_auroc

from ddpm_lightning.callbacks.reports import model_facts
from ddpm_lightning.data import Batch, Digits, levels_to_model, model_to_levels
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import MeanAndError, bits_per_dim
from ddpm_lightning.objectives import DenoisingElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.runs import load_run
from ddpm_lightning.training import DiffusionModule

matplotlib.use("Agg")
from matplotlib import pyplot as plt

SCORES = ("likelihood", "typicality")
RESAMPLES = 1000


def uniform_noise(batch: Batch, levels: int, seed: int) -> Tensor:
    """Every grey level equally often, for each image from a generator of its own."""
    generators = image_generators(seed, batch.index)
    drawn = [torch.randint(levels, batch.image.shape[1:], generator=generator) for generator in generators]
    return torch.stack(drawn).to(torch.uint8)


def shuffled(batch: Batch, seed: int) -> Tensor:
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
        "pixels shuffled": inside._replace(image=shuffled(inside, seed + 1)),
        "uniform noise": inside._replace(image=uniform_noise(inside, module.levels, seed + 2)),
    }
    if image.shape[2] == image.shape[3]:
        sets = {"rotated by 90 degrees": inside._replace(image=image.rot90(dims=(2, 3))), **sets}
    # they are the data themselves, or their classes are more than the model knows
    if not of_digits and not (module.class_conditional and (module.num_classes or 0) < Digits.num_classes):
        images, labels = enlarged_digits(module, len(image))
        sets["embedded digits"] = Batch(images, labels, inside.index[: len(images)])
    return sets


def bits(
    module: DiffusionModule, estimator: DenoisingElbo, batch: Batch, batch_size: int, say: Callable[[int], None]
) -> Tensor:
    """Bits/dim of each image, float64 ``[N]``."""
    results = []
    for start in range(0, len(batch.image), batch_size):
        part = Batch(*(column[start : start + batch_size].to(module.device) for column in batch))
        with torch.inference_mode():
            results.append(-module.bound(estimator, part)["elbo"].cpu())
        say(min(start + batch_size, len(batch.image)))
    return torch.tensor([bits_per_dim(nats, module.dims) for nats in torch.cat(results).tolist()], dtype=torch.float64)


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


def mean_and_error(values: Tensor) -> dict[str, float]:
    """Mean over images and its standard error."""
    metric = MeanAndError()
    metric.update(values)
    result = metric.compute()
    return {"mean": float(result["mean"]), "se": float(result["se"])}


def judged(inside: Tensor, outside: Tensor, typical: float) -> dict[str, Any]:
    """AUROC of both scores, each with its standard error."""
    inside = inside[: len(outside)]
    scores = {"likelihood": (inside, outside), "typicality": ((inside - typical).abs(), (outside - typical).abs())}
    return {name: {"auroc": auroc(*pair), "se": auroc_se(*pair)} for name, pair in scores.items()}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [f"{'set':<24} {'images':>6} {'bits/dim':>18} {'AUROC likelihood':>19} {'AUROC typicality':>19}"]
    for row in rows:
        cells = [f"{row[name]['auroc']:.4f} +- {row[name]['se']:.4f}" if name in row else "" for name in SCORES]
        figure = f"{row['bits_per_dim']['mean']:.4f} +- {row['bits_per_dim']['se']:.4f}"
        lines.append(f"{row['set']:<24} {row['images']:>6} {figure:>18} {cells[0]:>19} {cells[1]:>19}")
    return "\n".join(lines)


def figure(
    rows: list[dict[str, Any]], images: dict[str, Tensor], values: dict[str, Tensor], top: int, path: Path
) -> None:
    """For each set some of its images and the histogram of its bits/dim, that of the test images behind it."""
    inside = values["test images"]
    everything = torch.cat([values[row["set"]] for row in rows])
    low, high = float(everything.min()), float(everything.max())
    # sets can be orders of magnitude apart
    logarithmic = low > 0 and high / low > 8
    edges = (np.geomspace if logarithmic else np.linspace)(low, high, 1 + min(90, 20 + len(inside) // 6))
    picture, axes = plt.subplots(
        len(rows), 2, figsize=(10, 1.3 * len(rows) + 0.5), width_ratios=(1, 2.6), layout="constrained", squeeze=False
    )
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
    picture.savefig(path, dpi=110)
    plt.close(picture)


def write_images(indices: Tensor, values: dict[str, Tensor], path: Path) -> None:
    """A row for each test image: its index, and the bits/dim of what each set makes of it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["index", *values])
        writer.writerows(zip_longest(indices.tolist(), *(v.tolist() for v in values.values()), fillvalue=""))


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run: names the data")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the run")
    parser.add_argument("--images", type=int, default=500, help="images in each set (default: 500)")
    parser.add_argument("--steps", type=int, default=20, help="reverse steps evaluated for each image (default: 20)")
    parser.add_argument("--T", type=int, help="evaluate a chain of T states (default: steps + 1, at most the model's)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images and the noise (default: 0)")
    parser.add_argument("--batch_size", type=int, default=100, help="images evaluated at a time (default: 100)")
    parser.add_argument("--device", default="cpu", help="where to evaluate, cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results (default: this one)")
    arguments = parser.parse_args()
    if arguments.images < 2 or arguments.batch_size < 1:
        parser.error("--images must be 2 or more and --batch_size 1 or more")
    start = time.perf_counter()
    try:
        module, data = load_run(arguments.config, arguments.ckpt_path)
        module.eval_seed = arguments.seed
        module.to(arguments.device)
        T = min(arguments.steps + 1, module.ema_model.T) if arguments.T is None else arguments.T
        estimator = DenoisingElbo(arguments.steps, T)
        inside = data.split("test").chosen(arguments.images, arguments.seed)
        typical = data.split("val").chosen(arguments.images, arguments.seed)
        # noise of their own
        typical = typical._replace(index=typical.index + len(data.split("test")))
        sets = {"test images": inside, **outliers(module, inside, isinstance(data, Digits), arguments.seed)}
        values = {}
        for name, batch in {"validation images": typical, **sets}.items():

            def say(done: int, name: str = name, total: int = len(batch.image)) -> None:
                seconds = time.perf_counter() - start
                print(f"{name}: {done} of {total} images, {seconds:.0f} s", file=sys.stderr, flush=True)

            values[name] = bits(module, estimator, batch, arguments.batch_size, say)
    except InputError as error:
        print(f"detect_ood: error: {error}", file=sys.stderr)
        return 2
    rows: list[dict[str, Any]] = []
    centre = float(values["validation images"].mean())
    for name, found in values.items():
        row = {"set": name, "images": len(found), "bits_per_dim": mean_and_error(found)}
        if name not in ("validation images", "test images"):
            row |= judged(values["test images"], found, centre)
        rows.append(row)
    record = {
        **model_facts(module),
        "T": T,
        "steps": min(arguments.steps, T - 1),
        "auroc_se": f"bootstrap over images, {RESAMPLES} samples, an image and its altered version together",
        "sets": rows,
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "ood.json").write_text(json.dumps(record, indent=1) + "\n")
    write_images(inside.index, {name: values[name] for name in sets}, arguments.out / "ood.csv")
    images = {name: batch.image for name, batch in sets.items()}
    figure([row for row in rows if row["set"] in sets], images, values, module.levels - 1, arguments.out / "ood.png")
    chain = f"chain of T = {T} states, {record['steps']} of its {T - 1} steps, averaged weights, seed {arguments.seed}"
    print(f"{chain}\n\n{table(rows)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
