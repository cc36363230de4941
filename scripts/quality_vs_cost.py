#!/usr/bin/env python3
"""Quality of a run's samples against what they cost, for every sampler; and what guidance does.

    python scripts/quality_vs_cost.py --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt --out DIR

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

import argparse
import json
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import matplotlib
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_lightning.callbacks.reports import model_facts
from ddpm_lightning.data import Batch, levels_to_model
from ddpm_lightning.data.batches import Split
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import save_png, tile
from ddpm_lightning.metrics import ClassMetrics, ClassifierFeatures, FrechetDistance, PrecisionRecall
from ddpm_lightning.metrics.features import classifier_for, load_classifier
from ddpm_lightning.runs import load_run
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, Sampler
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
FIGURES = ("frechet", "precision", "recall", "accuracy")


class Judge:
    """Figures of images against the test images, whose features are computed once."""

    def __init__(self, module: DiffusionModule, test: Tensor) -> None:
        classifier = load_classifier(classifier_for(module.shape, module.levels)).to(module.device)
        extractor, self.levels = ClassifierFeatures(classifier), module.levels
        self.frechet = FrechetDistance(extractor, reset_real_features=False)
        self.neighbours = PrecisionRecall(extractor)
        self.classes = ClassMetrics(classifier)
        for metric in (self.frechet, self.neighbours, self.classes):
            metric.to(module.device)
        self.test = test
        self._update(self.frechet, test, real=True)

    def _update(self, metric: Any, images: Tensor, **options: bool) -> None:
        for part in images.split(500):
            metric.update(levels_to_model(part.to(metric.device), self.levels), **options)

    def __call__(self, images: Tensor, labels: Tensor | None) -> dict[str, float]:
        """Figures of grey levels ``[N, C, H, W]``; the neighbours' are of N test images."""
        self._update(self.frechet, images, real=False)
        self._update(self.neighbours, images, real=False)
        self._update(self.neighbours, self.test[: len(images)], real=True)
        figures = {"frechet": self.frechet.compute(), **self.neighbours.compute()}
        if labels is not None:
            self.classes.update(levels_to_model(images.to(self.classes.device), self.levels), labels)
            figures["accuracy"] = self.classes.compute()["accuracy"]
        for metric in (self.frechet, self.neighbours, self.classes):
            metric.reset()
        return {name: float(figures[name]) for name in FIGURES if name in figures}


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
            cells = [f"{row[key]:.3f}" if key in row else "" for key in FIGURES]
            lines.append(
                f"{name:<44} {row.get('evaluations', ''):>11} {cells[0]:>9} {cells[1]:>9} {cells[2]:>7} {cells[3]:>8}"
            )
        return "\n".join(lines)


def training_images(module: DiffusionModule, split: Split, count: int, seed: int) -> Batch:
    """A random choice of them, with the classes that the samples are asked to have."""
    shuffled = split.chosen(len(split), seed)
    wanted = module.cycled_labels(torch.arange(count))
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


def draw(
    module: DiffusionModule, sampler: Sampler, grid: TimeGrid, steps: int, scale: float, arguments: argparse.Namespace
) -> tuple[Tensor, Tensor | None]:
    """``--n`` images, grey levels, and the classes that were asked for."""
    precision: AbstractContextManager[Any] = nullcontext()
    if arguments.precision == "bf16-mixed":
        precision = torch.autocast(module.device.type, dtype=torch.bfloat16)
    parts, labels = [], []
    for index in torch.arange(arguments.n).split(arguments.batch_size):
        label = module.cycled_labels(index)
        options: dict[str, Any] = {"label": label, "guidance_scale": scale, "grid": grid}
        with torch.no_grad(), precision:
            parts.append(module.sample(sampler, index, seed=arguments.seed, steps=steps, **options).cpu())
        labels += [] if label is None else [label]
    return torch.cat(parts), torch.cat(labels) if labels else None


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


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    costs, scales = [5, 10, 20, 50, 100, 300, 1000], [0.0, 1.0, 1.5, 2.0, 3.0, 5.0]
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run: names the data")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the run")
    parser.add_argument("--n", type=int, default=1000, help="samples in each row (default: 1000)")
    parser.add_argument("--evaluations", type=int, nargs="+", default=costs, help=f"network evaluations ({costs})")
    parser.add_argument("--samplers", nargs="+", choices=[*SAMPLERS], default=[*SAMPLERS], help="default: all")
    parser.add_argument("--compare_grids", type=int, default=20, help="every grid up to as many (default: 20)")
    parser.add_argument("--scales", type=float, nargs="*", default=scales, help=f"guidance scales ({scales})")
    parser.add_argument("--guidance_steps", type=int, default=20, help="steps of guided samples (default: 20)")
    parser.add_argument("--batch_size", type=int, default=100, help="images drawn at a time (default: 100)")
    parser.add_argument("--precision", choices=("32", "bf16-mixed"), default="32", help="of the network (default: 32)")
    parser.add_argument("--compile", action="store_true", help="compile the network")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default: 0)")
    parser.add_argument("--device", default="cpu", help="where to sample, cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path("quality"), help="folder for the results (default: quality)")
    arguments = parser.parse_args()
    if arguments.n < 10 or arguments.batch_size < 1 or min(arguments.evaluations) < 1:
        parser.error("--n must be 10 or more, --batch_size and --evaluations 1 or more")
    start = time.perf_counter()
    try:
        module, data = load_run(arguments.config, arguments.ckpt_path)
        module.to(arguments.device)
        options = {name: getattr(arguments, name) for name in ("n", "seed", "precision")}
        table = Table(arguments.out, {**model_facts(module), **options})
        test, train = data.split("test"), training_images(module, data.split("train"), arguments.n, arguments.seed)
        judge = Judge(module, test.images)
        if arguments.compile:
            module.ema_model.network.compile()
        table.add("training images", judge(train.image, train.label if module.class_conditional else None), train.image)

        def measure(name: str, sampler: Sampler, grid: str, steps: int, scale: float, row: dict[str, Any]) -> None:
            if name not in table.rows:
                begun = time.perf_counter()
                images, labels = draw(module, sampler, GRIDS[grid], steps, scale, arguments)
                seconds = time.perf_counter() - begun
                row |= {"steps": steps, "grid": grid, **judge(images, labels), "seconds": seconds}
                table.add(name, row, images)
            print(
                f"{name}: Frechet {table.rows[name]['frechet']:.3f}, {time.perf_counter() - start:.0f} s",
                file=sys.stderr,
                flush=True,
            )

        for evaluations in sorted(arguments.evaluations):
            for name in arguments.samplers:
                sampler, own = SAMPLERS[name]
                steps = min(steps_for(sampler, evaluations), module.ema_model.T)
                for grid in GRIDS if evaluations <= arguments.compare_grids else (own,):
                    row = {"sampler": name, "evaluations": sampler.evaluations(steps), "own": grid == own}
                    measure(f"{name}, {grid}, {evaluations}", sampler, grid, steps, 1.0, row)
        if module.label_dropout:
            for scale in arguments.scales:
                cost = (1 if scale in (0, 1) else 2) * arguments.guidance_steps
                row = {"scale": scale, "evaluations": cost}
                measure(f"guided, {scale:g}", DPMSolverSampler(), "strided", arguments.guidance_steps, scale, row)
    except InputError as error:
        print(f"quality_vs_cost: error: {error}", file=sys.stderr)
        return 2
    curves(table, arguments.out / "quality.png")
    samples_figure(module, table, arguments.out / "quality_samples.png")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
