#!/usr/bin/env python3
"""Quality of a run's samples against what they cost, for every sampler; and what guidance does.

    python scripts/quality_vs_cost.py RUN --out DIR

For each sampler and each number of network evaluations, --n images of the averaged model are compared with all test
images in the feature space of the data's classifier: Frechet distance (lower is better; it has a bias that falls with
n, so only figures of the same n compare), precision and recall, and for a class-conditional model the share of images
that the classifier takes for the class that was asked for. Image k of each row has the same class and the same x_T. The
floor is as many training images, of the same classes, against the same test images. Up to --compare_grids evaluations
every sampler walks on every kind of time grid, beyond it on its own.

A class-conditional model that was trained with label_dropout is also guided, by DPM-Solver++ in --guidance_steps steps,
each of two evaluations.

Rows are written to DIR/quality.json as they come, and a run that was cut off goes on from there. At the end it writes
quality.png (the curves), quality_samples.png (the first images of each row) and prints the table.
"""

import json
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import Batch
from ddpm_lightning.data.batches import Split
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import model_facts
from ddpm_lightning.evaluation.quality import Comparison, Samples, labelled_batches, named_classifier
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.figures import save_png, tile
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.schedules import KarrasGrid, LogSNRGrid, StridedGrid, TimeGrid
from ddpm_lightning.training import DiffusionModule

matplotlib.use("Agg")
from matplotlib import pyplot as plt

GRIDS: dict[str, TimeGrid] = {"strided": StridedGrid(), "log-SNR": LogSNRGrid(), "Karras": KarrasGrid()}
SAMPLERS: dict[str, tuple[Sampler, str]] = {
    "ancestral": (AncestralSampler(), "strided"),
    "DDIM eta=1": (DDIMSampler(1.0), "strided"),
    "DDIM": (DDIMSampler(), "strided"),
    "SDE-DPM-Solver++ 2M": (DPMSolverSampler(sde=True), "strided"),
    "DPM-Solver++ 2M": (DPMSolverSampler(), "strided"),
    "Heun": (HeunSampler(), "strided"),
}
"""By name: the sampler, and its own grid."""
SHOWN = 4
SHOWN_SCORES = ("frechet", "precision", "recall", "accuracy")


class Judge:
    """Measures of images against the test images: the distance from all of them, precision and recall against n."""

    def __init__(self, module: DiffusionModule, test: Batch, n: int) -> None:
        _, classifier = named_classifier(module, None)
        first = Batch(*(column[:n] for column in test))
        self.whole = Comparison(module, classifier, labelled_batches(test, 500), only=["frechet", "classes"])
        self.equal = Comparison(module, classifier, labelled_batches(first, 500), only=["precision_recall"])

    def __call__(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        parts = images.split(500)
        batches = list(zip(parts, [None] * len(parts) if labels is None else labels.split(500), strict=True))
        found = {**self.whole(batches), **self.equal(batches)}
        return {name: found[name] for name in SHOWN_SCORES if name in found}


class Table:
    """Rows by name, kept in a file as they come, and the first images of each."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.path, self.images_path = folder / "quality.json", folder / "quality_images.safetensors"
        self.facts, self.rows, self.images = facts, {}, {}
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file():
            record = json.loads(self.path.read_text())
            if record["facts"] != facts:
                raise InputError(f"{self.path} holds rows of another model or other options: give another --out")
            self.rows = record["rows"]
            self.images = load_file(self.images_path) if self.images_path.is_file() else {}

    def add(self, name: str, row: dict[str, Any], images: Tensor) -> None:
        """Add a row and write the file anew."""
        self.rows[name] = row
        self.images[name] = images[:SHOWN].contiguous()
        save_file(self.images, self.images_path)
        self.path.write_text(json.dumps({"facts": self.facts, "rows": self.rows}, indent=1) + "\n")

    def __str__(self) -> str:
        lines = [f"{'row':<44} {'evaluations':>11} {'Frechet':>9} {'precision':>9} {'recall':>7} {'accuracy':>8}"]
        for name, row in self.rows.items():
            cells = [f"{row[key]:.3f}" if key in row else "" for key in SHOWN_SCORES]
            lines.append(
                f"{name:<44} {row.get('evaluations', ''):>11} {cells[0]:>9} {cells[1]:>9} {cells[2]:>7} {cells[3]:>8}"
            )
        return "\n".join(lines)


def training_images(module: DiffusionModule, split: Split, count: int, seed: int) -> Batch:
    """A random choice of them, with the classes that the samples are asked to have."""
    shuffled = split.chosen(len(split), seed)
    wanted = SampleRequest().on(module).label(torch.arange(count))
    if wanted is None:
        return Batch(*(column[:count] for column in shuffled))
    places = {k: iter(torch.nonzero(shuffled.label == k).flatten().tolist()) for k in range(int(wanted.max()) + 1)}
    rows = torch.tensor([next(places[k]) for k in wanted.tolist()])
    return Batch(*(column[rows] for column in shuffled))


def steps_for(sampler: Sampler, evaluations: int) -> int:
    """The most steps that cost no more than ``evaluations``."""
    steps = evaluations
    while sampler.evaluations(steps) > evaluations and steps > 1:
        steps -= 1
    return steps


def draw(module: DiffusionModule, samples: Samples, precision: str) -> tuple[Tensor, Tensor | None]:
    """Grey levels, and the classes that were asked for."""
    half = partial(torch.autocast, module.device.type, dtype=torch.bfloat16)
    drawn = list(samples.batches(module, precision=half if precision == "bf16-mixed" else nullcontext))
    labels = [label for _, label in drawn if label is not None]
    return torch.cat([levels.cpu() for levels, _ in drawn]), torch.cat(labels) if labels else None


def curves(table: Table, path: Path) -> None:
    """Frechet distance against evaluations, and against the guidance scale with the accuracy."""
    guided = [row for row in table.rows.values() if "scale" in row]
    picture, axes = plt.subplots(1, 2 if guided else 1, figsize=(12 if guided else 7, 4.6), squeeze=False)
    left = axes[0, 0]
    for name, (_, grid) in SAMPLERS.items():
        rows = [row for row in table.rows.values() if row.get("sampler") == name and row.get("grid") == grid]
        left.loglog([row["evaluations"] for row in rows], [row["frechet"] for row in rows], "o-", ms=4, label=name)
    left.axhline(table.rows["training images"]["frechet"], color="0.5", ls="--", label="training images")
    left.set(xlabel="network evaluations", ylabel="Frechet distance", title=f"{table.facts['n']} samples a point")
    left.legend(frameon=False, fontsize=8)
    if guided:
        right, scales = axes[0, 1], [row["scale"] for row in guided]
        right.plot(scales, [row["accuracy"] for row in guided], "o-", color="tab:green", label="accuracy")
        right.plot(scales, [row["recall"] for row in guided], "s--", color="tab:blue", label="recall")
        right.set(xlabel="guidance scale", ylabel="accuracy, recall", title="classifier-free guidance")
        other = right.twinx()
        other.plot(scales, [row["frechet"] for row in guided], "^:", color="tab:red", label="Frechet distance")
        other.set(ylabel="Frechet distance", ylim=(0, None))
        lines = [*right.get_lines(), *other.get_lines()]
        right.legend(lines, [line.get_label() for line in lines], frameon=False, fontsize=8)
    picture.tight_layout()
    picture.savefig(path, dpi=110)
    plt.close(picture)


def samples_figure(module: DiffusionModule, table: Table, path: Path) -> None:
    """A line for each sampler on its own grid, ``SHOWN`` images for each number of evaluations, and the guided ones."""
    lines = [
        torch.cat(
            [table.images[key][:SHOWN] for key, row in table.rows.items() if row.get("sampler") == name and row["own"]]
        )
        for name in dict.fromkeys(row["sampler"] for row in table.rows.values() if "sampler" in row)
    ]
    guided = [table.images[key][:SHOWN] for key, row in table.rows.items() if "scale" in row]
    lines += [torch.cat(guided)] if guided else []
    columns = max(len(line) for line in lines)
    blank = [line.new_zeros(columns - len(line), *line.shape[1:]) for line in lines]
    images = torch.cat([torch.cat(pair) for pair in zip(lines, blank, strict=True)])
    save_png(tile(images, module.levels, columns), path)


def main(
    trained: Trained,
    n: int = 1000,
    evaluations: list[int] | None = None,
    samplers: list[str] | None = None,
    compare_grids: int = 20,
    scales: list[float] | None = None,
    guidance_steps: int = 20,
    precision: Literal["32", "bf16-mixed"] = "32",
    compile: bool = False,
) -> None:
    """Draw and measure.

    Args:
        trained: the run
        n: samples in each row, 10 or more
        evaluations: network evaluations, by default 5 10 20 50 100 300 1000
        samplers: some of the samplers, by default all
        compare_grids: every grid up to as many evaluations
        scales: guidance scales, by default 0 1 1.5 2 3 5
        guidance_steps: steps of guided samples
        precision: of the network
        compile: compile the network
    """
    evaluations = evaluations or [5, 10, 20, 50, 100, 300, 1000]
    scales = [0.0, 1.0, 1.5, 2.0, 3.0, 5.0] if scales is None else scales
    at_least(10, n=n)
    at_least(1, evaluations=min(evaluations))
    if unknown := set(samplers or []) - set(SAMPLERS):
        raise InputError(f"--samplers {', '.join(unknown)}: there are {', '.join(SAMPLERS)}")
    start = time.perf_counter()
    module, data, seed = trained.module, trained.data, trained.seed
    out = Path(trained.out or Run(trained.run).folder / "quality_vs_cost")
    table = Table(out, {**model_facts(module), "n": n, "seed": seed, "precision": precision})
    test, train = data.split("test"), training_images(module, data.split("train"), n, seed)
    judge = Judge(module, test.batch(torch.arange(len(test))), n)
    if compile:
        module.ema_model.network.compile()
    table.add("training images", judge(train.image, train.label if module.class_conditional else None), train.image)

    def measure(name: str, sampler: Sampler, grid: str, steps: int, scale: float, row: dict[str, Any]) -> None:
        if name not in table.rows:
            begun = time.perf_counter()
            samples = Samples(
                sampler, steps, GRIDS[grid], seed, guidance_scale=scale, n=n, batch_size=trained.batch_size
            )
            images, labels = draw(module, samples, precision)
            seconds = time.perf_counter() - begun
            row |= {"steps": steps, "grid": grid, **judge(images, labels), "seconds": seconds}
            table.add(name, row, images)
        seconds = time.perf_counter() - start
        print(f"{name}: Frechet {table.rows[name]['frechet']:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    for cost in sorted(evaluations):
        for name in samplers or SAMPLERS:
            sampler, own = SAMPLERS[name]
            steps = min(steps_for(sampler, cost), module.ema_model.T)
            for grid in GRIDS if cost <= compare_grids else (own,):
                row = {"sampler": name, "evaluations": sampler.evaluations(steps), "own": grid == own}
                measure(f"{name}, {grid}, {cost}", sampler, grid, steps, 1.0, row)
    if module.label_dropout:
        for scale in scales:
            row = {"scale": scale, "evaluations": (1 if scale in (0, 1) else 2) * guidance_steps}
            measure(f"guided, {scale:g}", DPMSolverSampler(), "strided", guidance_steps, scale, row)
    curves(table, out / "quality.png")
    samples_figure(module, table, out / "quality_samples.png")
    print(table)


if __name__ == "__main__":
    run_script(main, __doc__)
