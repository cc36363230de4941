#!/usr/bin/env python3
"""Quality of a run's samples against what they cost, for every sampler; and what guidance does.

    python scripts/quality_vs_cost.py RUN --out DIR

For each sampler and each number of network evaluations, --n images of the averaged model are compared with all test
images in the feature space of the data's classifier: Frechet distance (lower is better; it has a bias that falls with
n, so only numbers of the same n compare), precision and recall against n test images, and for a class-conditional model
the share of images that the classifier takes for the class that was asked for. Image k of each row has the same class
and the same x_T. The floor is as many training images, of the same classes, against the same test images. Up to
--compare_grids evaluations every sampler is run on every kind of time grid, beyond it on the strided one.

A class-conditional model that was trained with label_dropout is also guided, by DPM-Solver++ in --guidance_steps steps,
each of two evaluations.

Rows are written to DIR/quality.json as they come, and a run that was cut off goes on from there. At the end it writes
quality.png (the curves), quality_samples.png (the first images of each row) and prints the table.
"""

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.data.batches import Split
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import model_facts
from ddpm_lightning.evaluation.quality import Comparison, Labelled, Samples, labelled_batches, named_classifier
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.figures import drawn, tile
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.schedules import KarrasGrid, LogSNRGrid, StridedGrid, TimeGrid
from ddpm_lightning.training import GenerativeModule

GRIDS: dict[str, TimeGrid] = {"strided": StridedGrid(), "log-SNR": LogSNRGrid(), "Karras": KarrasGrid()}
SAMPLERS: dict[str, Sampler] = {
    "ancestral": AncestralSampler(),
    "DDIM eta=1": DDIMSampler(1.0),
    "DDIM": DDIMSampler(),
    "SDE-DPM-Solver++ 2M": DPMSolverSampler(sde=True),
    "DPM-Solver++ 2M": DPMSolverSampler(),
    "Heun": HeunSampler(),
}
SHOWN = 4
SHOWN_SCORES = ("frechet", "precision", "recall", "accuracy")
Rows = dict[str, dict[str, Any]]


def training_images(module: GenerativeModule, split: Split, n: int, seed: int) -> list[Labelled]:
    """A random choice of them, with the classes that the samples are asked to have."""
    shuffled = split.chosen(len(split), seed)
    wanted = SampleRequest().on(module).label(torch.arange(n))
    if wanted is None:
        return [(images, None) for images in shuffled.image[:n].split(500)]
    places = {k: iter(torch.nonzero(shuffled.label == k).flatten().tolist()) for k in set(wanted.tolist())}
    rows = torch.tensor([next(places[k]) for k in wanted.tolist()])
    return list(zip(shuffled.image[rows].split(500), wanted.split(500), strict=True))


def steps_for(sampler: Sampler, evaluations: int) -> int:
    """The most steps, one or more, that cost no more than ``evaluations``."""
    return max(range(1, evaluations + 1), key=lambda steps: (sampler.evaluations(steps) <= evaluations) * steps)


def as_table(rows: Rows) -> str:
    """The rows as text."""
    lines = [f"{'row':<44} {'evaluations':>11} {'Frechet':>9} {'precision':>9} {'recall':>9} {'accuracy':>9}"]
    for name, row in rows.items():
        cells = (f"{row[key]:.3f}" if key in row else "" for key in SHOWN_SCORES)
        lines.append(f"{name:<44} {row.get('evaluations', ''):>11}" + "".join(f" {cell:>9}" for cell in cells))
    return "\n".join(lines)


def curves(rows: Rows, n: int, beside: dict[str, Rows]) -> Tensor:
    """Frechet distance against evaluations, dashed for other runs, and against the guidance scale with the accuracy."""
    guided = [row for row in rows.values() if "scale" in row]
    figure = Figure(figsize=(12 if guided else 7, 4.6), dpi=110, layout="tight")
    left, *others = figure.subplots(1, 2 if guided else 1, squeeze=False)[0]
    for name in SAMPLERS:
        own = [row for row in rows.values() if row.get("sampler") == name and row["grid"] == "strided"]
        (line,) = left.loglog(
            [row["evaluations"] for row in own], [row["frechet"] for row in own], "o-", ms=4, label=name
        )
        for folder, its_rows in beside.items():
            other = [row for row in its_rows.values() if row.get("sampler") == name and row["grid"] == "strided"]
            places, values = ([row[key] for row in other] for key in ("evaluations", "frechet"))
            left.loglog(
                places, values, "s--", ms=3, color=line.get_color(), label=f"{name}, {folder}" if other else None
            )
    left.axhline(rows["training images"]["frechet"], color="0.5", ls="--", label="training images")
    left.set(xlabel="network evaluations", ylabel="Frechet distance", title=f"{n} samples a point")
    left.legend(frameon=False, fontsize=8)
    for right in others:
        twin, scales = right.twinx(), [row["scale"] for row in guided]
        styles = {"accuracy": "o-g", "recall": "s--b", "frechet": "^:r"}
        lines: list[Any] = []
        for score, style in styles.items():
            axis = twin if score == "frechet" else right
            lines += axis.plot(scales, [row[score] for row in guided], style, label=score)
        right.set(xlabel="guidance scale", ylabel="accuracy, recall", title="classifier-free guidance")
        twin.set(ylabel="Frechet distance", ylim=(0, None))
        right.legend(handles=lines, frameon=False, fontsize=8)
    return drawn(figure)


def first_images(rows: Rows, images: dict[str, Tensor], levels: int) -> Tensor:
    """A line for each sampler on its own grid, ``SHOWN`` images for each number of evaluations, and the guided ones."""
    lines: dict[str, list[Tensor]] = {}
    for key, row in rows.items():
        if row.get("grid") == "strided":
            lines.setdefault(row.get("sampler", "guided"), []).append(images[key])
    columns = SHOWN * max(map(len, lines.values()))
    blank = torch.zeros_like(next(iter(images.values())))
    padded = [part for line in lines.values() for part in [*line, *[blank] * (columns // SHOWN - len(line))]]
    return tile(torch.cat(padded), levels, columns)


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
    beside: list[str] | None = None,
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
        beside: folders of this script's results on other runs, to be drawn beside these
    """
    costs = sorted(evaluations or [5, 10, 20, 50, 100, 300, 1000])
    at_least(10, n=n)
    at_least(1, evaluations=costs[0])
    if unknown := set(samplers or []) - set(SAMPLERS):
        raise InputError(f"--samplers {', '.join(unknown)}: there are {', '.join(SAMPLERS)}")
    start, module, data, seed = time.perf_counter(), trained.module, trained.data, trained.seed
    results = Run(trained.out or Run(trained.run).folder / "quality_vs_cost")
    facts = {**model_facts(module), "n": n, "seed": seed, "precision": precision}
    record: dict[str, Any] = {"facts": facts, "rows": {}}
    results.folder.mkdir(parents=True, exist_ok=True)
    path, images_path = results.folder / "quality.json", results.folder / "quality_images.safetensors"
    if path.is_file():
        record = json.loads(path.read_text())
        if record["facts"] != facts:
            raise InputError(f"{path} holds rows of another model or other options: give another --out")
    rows: Rows = record["rows"]
    images = load_file(images_path) if images_path.is_file() else {}

    test, (_, classifier) = data.split("test"), named_classifier(module, None, data)
    real = test.batch(torch.arange(len(test)))
    comparisons = [
        Comparison(module, classifier, labelled_batches(real, 500), only=["frechet", "classes"]),
        Comparison(
            module, classifier, labelled_batches(real.map(lambda column: column[:n]), 500), only=["precision_recall"]
        ),
    ]

    def add(name: str, batches: Sequence[Labelled], **row: Any) -> None:
        found = {key: value for compare in comparisons for key, value in compare(batches).items()}
        rows[name] = {**row, **{key: found[key] for key in SHOWN_SCORES if key in found}}
        images[name] = torch.cat([levels[:SHOWN].cpu() for levels, _ in batches])[:SHOWN].contiguous()
        save_file(images, images_path)
        results.write("quality.json", record)

    def measure(name: str, samples: Samples, **row: Any) -> None:
        if name not in rows:
            begun, half = time.perf_counter(), partial(torch.autocast, module.device.type, dtype=torch.bfloat16)
            batches = list(samples.batches(module, precision=half if precision == "bf16-mixed" else nullcontext))
            add(name, batches, **row, steps=samples.steps, seconds=time.perf_counter() - begun)
        seconds = time.perf_counter() - start
        print(f"{name}: Frechet {rows[name]['frechet']:.3f}, {seconds:.0f} s", file=sys.stderr, flush=True)

    if compile:
        module.ema_model.network.compile()
    add("training images", training_images(module, data.split("train"), n, seed))
    draw = partial(Samples, n=n, batch_size=trained.batch_size, seed=seed)
    for cost in costs:
        for name in samplers or SAMPLERS:
            sampler = SAMPLERS[name]
            steps = min(steps_for(sampler, cost), module.ema_model.T)
            for grid in GRIDS if cost <= compare_grids else ("strided",):
                row = {"sampler": name, "evaluations": sampler.evaluations(steps), "grid": grid}
                measure(f"{name}, {grid}, {cost}", draw(sampler, steps, grid=GRIDS[grid]), **row)
    if module.label_dropout:
        for scale in [0.0, 1.0, 1.5, 2.0, 3.0, 5.0] if scales is None else scales:
            row = {"scale": scale, "evaluations": (1 if scale in (0, 1) else 2) * guidance_steps, "grid": "strided"}
            measure(f"guided, {scale:g}", draw(DPMSolverSampler(), guidance_steps, guidance_scale=scale), **row)
    others = {Path(each).name: json.loads((Path(each) / "quality.json").read_text())["rows"] for each in beside or []}
    results.write("quality.png", curves(rows, n, others))
    results.write("quality_samples.png", first_images(rows, images, module.grey_levels))
    print(as_table(rows))


if __name__ == "__main__":
    run_script(main, __doc__)
