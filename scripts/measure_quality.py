#!/usr/bin/env python3
"""How good are a run's samples, and are they copies of training images?

    python scripts/measure_quality.py RUN --n 1000 --sampler DDIMSampler --steps 50 --out RUN/quality

n samples of the averaged model, n training images (the floor) and n validation images are compared with the same n test
images, in the features of a small classifier of the data (docs/quality.md says what each figure is). A figure compares
with others of the same n and the same classifier only. All of a split is taken where it has fewer than n images.

Then each sample's nearest training image is looked for, of all of them, by Euclidean distance in pixels (model range)
and in features, and that of each test image, which cannot be a copy. Samples much nearer than the test images were
learnt by heart. neighbours.png shows some of both: samples, below them the two nearest training images in pixels and
the two nearest in features, then the same for test images.

Writes quality.txt, quality.json, neighbours.png to --out.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning import samplers
from ddpm_lightning.callbacks.reports import model_facts
from ddpm_lightning.data import MNIST, levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.quality import Labelled, add_images, image_batches, quality_table, sample_batches
from ddpm_lightning.figures import nearest_neighbours, save_png
from ddpm_lightning.metrics import QualityMetrics, classifier_for, load_classifier, nearest
from ddpm_lightning.networks import FeatureClassifier
from ddpm_lightning.runs import load_run

SAMPLERS = ("AncestralSampler", "DDIMSampler", "DPMSolverSampler", "HeunSampler")
SHOWN = 16
NEIGHBOURS = 2


def with_progress(batches: Iterable[Labelled], total: int) -> Iterator[Labelled]:
    """The batches, with a line of progress for each."""
    done, start = 0, time.perf_counter()
    for levels, label in batches:
        yield levels, label
        done += len(levels)
        print(f"{done} of {total} samples, {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def spaces(images: Tensor, levels: int, classifier: FeatureClassifier) -> dict[str, Tensor]:
    """Grey levels ``[N, C, H, W]`` as points in both spaces, ``[N, D]``."""
    parts = [levels_to_model(part, levels) for part in images.split(500)]
    with torch.inference_mode():
        features = torch.cat([classifier.features(part) for part in parts])
    return {"pixels": torch.cat(parts).flatten(1), "features": features}


def neighbours_of(
    images: Tensor, train: Tensor, points: dict[str, Tensor], levels: int, classifier: FeatureClassifier
) -> tuple[dict[str, float], Tensor]:
    """Median distance to the nearest training image in each space, and the picture of the first images."""
    medians, shown = {}, []
    for space, queries in spaces(images, levels, classifier).items():
        distances, rows = nearest(queries, points[space], NEIGHBOURS)
        medians[space] = float(distances[:, 0].median())
        shown.append(train[rows[:SHOWN]])
    return medians, nearest_neighbours(images[:SHOWN], torch.cat(shown, 1), levels)


def neighbour_table(medians: dict[str, dict[str, float]]) -> str:
    """Median distances and their ratios as text."""
    lines = [f"{'median distance to the nearest training image':<46} {'pixels':>10} {'features':>10}"]
    rows = {f"of {name}": row for name, row in medians.items()}
    rows["ratio"] = {space: medians["samples"][space] / medians["test images"][space] for space in medians["samples"]}
    lines += [f"{name:<46} {row['pixels']:>10.4f} {row['features']:>10.4f}" for name, row in rows.items()]
    return "\n".join(lines)


def measured(arguments: argparse.Namespace) -> tuple[dict[str, Any], str, Tensor]:
    """The record, the text and the picture of a run."""
    ckpt_path = arguments.ckpt_path or arguments.run / "checkpoints" / "last.ckpt"
    module, data = load_run(arguments.run / "config.yaml", ckpt_path)
    if arguments.data_root is not None and isinstance(data, MNIST):
        data.root = arguments.data_root
    module.to(arguments.device)
    name = arguments.classifier or classifier_for(module.shape, module.levels)
    classifier, cpu_classifier = load_classifier(name).to(arguments.device), load_classifier(name)
    size, seed = arguments.batch_size, arguments.seed
    test = data.split("test").chosen(arguments.n, seed)
    drawn = list(
        with_progress(
            sample_batches(
                module,
                getattr(samplers, arguments.sampler)(),
                arguments.n,
                size,
                seed=seed,
                steps=arguments.steps,
                guidance_scale=arguments.guidance_scale,
            ),
            arguments.n,
        )
    )
    sets: dict[str, Iterable[Labelled]] = {"samples": drawn}
    for split in ("train", "val"):
        images = data.split(split).chosen(arguments.n, seed)
        what = "training" if split == "train" else "validation"
        sets[f"{len(images.image)} {what} images"] = image_batches(images, size)
    figures = {}
    for row, batches in sets.items():
        metric = QualityMetrics(classifier).to(arguments.device)
        add_images(metric, image_batches(test, size), True, module)
        add_images(metric, batches, False, module)
        figures[row] = metric.compute()
    train = data.split("train").images
    points = spaces(train, module.levels, cpu_classifier)
    medians, pictures = {}, []
    for row, levels in {"samples": torch.cat([x.cpu() for x, _ in drawn]), "test images": test.image}.items():
        medians[row], picture = neighbours_of(levels, train, points, module.levels, cpu_classifier)
        pictures.append(picture)
    guidance = "" if arguments.guidance_scale == 1 else f", guidance scale {arguments.guidance_scale:g}"
    head = (
        f"{arguments.n} samples ({arguments.sampler}, {arguments.steps or 'all'} steps{guidance}, seed {seed}; "
        f"averaged weights after {module.steps_trained} steps)\nagainst {len(test.image)} test images, in the "
        f"{classifier.num_features} features of the classifier {name}"
    )
    text = f"{head}\n\n{quality_table(figures)}\n\n{neighbour_table(medians)}\n"
    record = {
        **model_facts(module),
        "samples": arguments.n,
        "test_images": len(test.image),
        "sampler": arguments.sampler,
        "steps": arguments.steps,
        "guidance_scale": arguments.guidance_scale,
        "seed": seed,
        "classifier": name,
        "figures": figures,
        "median_distance_to_nearest_training_image": medians,
    }
    gap = torch.full((3, 12, pictures[0].shape[2]), 255, dtype=torch.uint8)
    return record, text, torch.cat([pictures[0], gap, pictures[1]], 1)


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", type=Path, help="folder of the run, with config.yaml")
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint (default: checkpoints/last.ckpt of the run)")
    parser.add_argument("--data_root", help="folder that holds MNIST/raw (default: as the run's configuration has it)")
    parser.add_argument("--n", type=int, default=1000, help="samples, and real images (default: 1000)")
    parser.add_argument("--sampler", choices=SAMPLERS, default="DDIMSampler", help="(default: DDIMSampler)")
    parser.add_argument("--steps", type=int, help="steps of the sampler (default: all T)")
    parser.add_argument("--guidance_scale", type=float, default=1.0, help="classifier-free guidance (default: 1, none)")
    parser.add_argument("--classifier", help="mnist, digits or a file (default: the one for such images)")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples and choice of images (default: 0)")
    parser.add_argument("--batch_size", type=int, default=100, help="images at a time (default: 100)")
    parser.add_argument("--device", default="cpu", help="where to sample, cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args()
    if arguments.n < 4 or arguments.batch_size < 1 or (arguments.steps is not None and arguments.steps < 1):
        parser.error("--n must be 4 or more, --steps and --batch_size 1 or more")
    try:
        record, text, picture = measured(arguments)
    except InputError as error:
        print(f"measure_quality: error: {error}", file=sys.stderr)
        return 2
    save_png(picture, arguments.out / "neighbours.png")
    (arguments.out / "quality.txt").write_text(text)
    (arguments.out / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
