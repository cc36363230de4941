"""Quality of a trained module's samples: drawn, compared with real images, and looked through for copies."""

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.data import Batch, levels_to_model
from ddpm_lightning.data.batches import EvalBatches, IndexBatches, Split
from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import model_facts
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.figures import nearest_neighbours
from ddpm_lightning.metrics import QualityMetrics, classifier_for, load_classifier, nearest
from ddpm_lightning.networks import FeatureClassifier
from ddpm_lightning.progress import tracked
from ddpm_lightning.samplers import DDIMSampler, Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training.module import DiffusionModule, GenerativeModule

__all__ = [
    "Comparison", "Labelled", "Samples", "labelled_batches", "named_classifier", "neighbours_of", "points_of",
    "quality", "quality_report",
]  # fmt: skip

Labelled = tuple[Tensor, Tensor | None]
"""Grey levels uint8 ``[B, C, H, W]`` and the classes ``[B]`` that they have or are meant to have, or None."""
SHOWN = 16
NEIGHBOURS = 2


@dataclass(frozen=True)
class Samples(SampleRequest):
    """Images 0..n-1 of a request, the same images on any number of processes.

    Args:
        sampler: how to sample.
        n: number of images of all processes together.
        batch_size: images drawn at a time on each process.
        cap_steps: as it is in a request, and the default here.

    Raises:
        InputError: a number out of its range.
    """

    sampler: Sampler = field(default_factory=DDIMSampler)
    n: int = 1000
    batch_size: int = 100
    cap_steps: bool = True

    def __post_init__(self) -> None:
        at_least(4, n=self.n)
        at_least(1, batch_size=self.batch_size, steps=1 if self.steps is None else self.steps)

    def batches(
        self,
        module: GenerativeModule,
        rank: int = 0,
        world: int = 1,
        precision: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> Iterator[Labelled]:
        """The share of process ``rank`` of ``world``; ``precision`` is a context for the network."""
        draw = self.on(module)
        for indices in IndexBatches(self.n, self.batch_size, rank, world):
            with torch.inference_mode(), precision():
                images = draw(indices)
            yield images, draw.label(indices)


def labelled_batches(images: Batch, batch_size: int, rank: int = 0, world: int = 1) -> Iterator[Labelled]:
    """This process's share of real images, with their classes."""
    for batch in EvalBatches(Split(images.image, images.label), batch_size, rank, world):
        yield batch.image, batch.label


@rank_zero_only
def _warn(sentence: str) -> None:
    print(f"WARNING: {sentence}", file=sys.stderr, flush=True)


def named_classifier(
    module: GenerativeModule, name: str | None, data: LightningDataModule | None = None
) -> tuple[str, FeatureClassifier]:
    """The name and the classifier in whose features a module's images are compared.

    ``name`` is a name or a file (``load_classifier``), or None for the one that is shipped for such images. Where this
    one was trained on other data than ``data``, by default those of the module's Trainer, standard error says so.

    Raises:
        InputError: no such classifier, or one for other images.
    """
    if name is None:
        name = classifier_for(module.shape, module.grey_levels)
        data = data or getattr(module._trainer, "datamodule", None)
        if data is not None and type(data).__name__.lower() != name:
            _warn(
                f"the classifier {name} was trained on other images than these of {type(data).__name__}, and "
                "its features are those of digits; train one of these data as scripts/train_classifier.py does, and "
                "give its file as classifier"
            )
    classifier = load_classifier(name)
    expected = (classifier.channels, classifier.size, classifier.size)
    if expected != module.shape:
        raise InputError(f"classifier {name} knows images {expected}, not {module.shape}")
    return name, classifier


class Comparison:
    """Measures sets of images, each against the same real images, whose features are computed once.

    Args:
        module: says how many grey levels there are and on which device to work.
        classifier: gives the features.
        real: the real images.
        only: what to measure (``QualityMetrics``); None for all.
    """

    def __init__(
        self,
        module: GenerativeModule,
        classifier: FeatureClassifier,
        real: Iterable[Labelled],
        only: Collection[str] | None = None,
    ) -> None:
        self.levels, self.device = module.grey_levels, module.device
        self.metrics = QualityMetrics(classifier, only).to(module.device)
        self._add(real, True)

    def __call__(self, images: Iterable[Labelled]) -> dict[str, float]:
        """The measures of a set of images by name; a collective on many processes."""
        self._add(images, False)
        values = self.metrics.compute()
        self.metrics.reset()
        return values

    @torch.inference_mode()
    def _add(self, batches: Iterable[Labelled], real: bool) -> None:
        for levels, label in batches:
            x = levels_to_model(levels.to(self.device), self.levels)
            self.metrics.update(x, real, None if label is None else label.to(self.device))


def quality_report(
    module: GenerativeModule, samples: Samples, rows: Mapping[str, Mapping[str, float]], real: int, classifier: str
) -> tuple[str, dict[str, Any]]:
    """The measures ``rows`` of each set of images, against ``real`` test images, as text and as plain data."""
    how = "drawn level by level"
    if isinstance(module, DiffusionModule):
        steps = None if samples.steps is None else samples.on(module).steps
        guidance = "" if samples.guidance_scale == 1 else f", guidance scale {samples.guidance_scale:g}"
        guidance += "" if samples.guide is None else f" away from {samples.guide}"
        how = f"{type(samples.sampler).__name__}, {steps or 'all'} steps{guidance}"
    head = (
        f"Quality of {samples.n} samples ({how}, seed {samples.seed}; averaged weights after {module.steps_trained} "
        f"steps)\nand of real images, against {real} test images, in the features of the classifier {classifier}"
    )
    record = {
        **model_facts(module),
        "samples": samples.n,
        "real_images": real,
        "sampler": describe(samples.sampler),
        "steps": samples.steps,
        "guidance_scale": samples.guidance_scale,
        "guide": samples.guide,
        "seed": samples.seed,
        "classifier": classifier,
        "figures": rows,
    }
    return f"{head}\n\n{_table(rows)}", record


def _table(rows: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in rows.values() for name in values))
    first = max(map(len, rows))
    lines = [f"{'':<{first}}" + "".join(f" {name:>13}" for name in names)]
    for row, values in rows.items():
        cells = (f"{values[name]:.4f}" if name in values else "-" for name in names)
        lines.append(f"{row:<{first}}" + "".join(f" {cell:>13}" for cell in cells))
    return "\n".join(lines)


def quality(
    trained: Trained,
    n: int = 1000,
    sampler: Sampler | None = None,
    steps: int | None = None,
    guidance_scale: float = 1.0,
    guide: str | None = None,
    classifier: str | None = None,
) -> dict[str, Any]:
    """How good are the samples, and are they copies of training images?

    n samples of the averaged model, n training images (the floor) and n validation images are compared with the same n
    test images, in the features of a small classifier of the data (docs/quality.md says what is measured). Numbers
    compare with others of the same n and the same classifier only.

    Then the training image nearest to each sample is looked for, by Euclidean distance in pixels (model range) and in
    features, and the one nearest to each test image, which cannot be a copy. Samples much nearer than the test images
    were learnt by heart. neighbours.png shows some of both: samples, below them the two nearest training images in
    pixels and the two nearest in features, then the same for test images.

    Writes quality.txt, quality.json and neighbours.png.

    Args:
        trained: the run
        n: samples, and real images
        sampler: class of the sampler, by default DDIMSampler; its arguments as --sampler.eta 1
        steps: steps of the sampler, by default all T
        guidance_scale: scale of classifier-free guidance, or with a guide of autoguidance; 1 for none
        guide: run or checkpoint of a weaker model of the same data, which the samples are pushed away from
        classifier: mnist, digits or a file, by default the one for such images
    """
    samples = Samples(
        sampler or DDIMSampler(), steps, seed=trained.seed, guidance_scale=guidance_scale, guide=guide,
        n=n, batch_size=trained.batch_size,
    )  # fmt: skip
    module, data = trained.module, trained.data
    name, judge = named_classifier(module, classifier, data)
    size, test = samples.batch_size, data.split("test").chosen(samples.n, samples.seed)
    compare = Comparison(module, judge, labelled_batches(test, size))
    drawn = list(tracked(samples.batches(module), samples.n, "sampling"))
    rows = {"samples": compare(drawn)}
    splits: dict[SplitName, str] = {"train": "training", "val": "validation"}
    for split, what in splits.items():
        images = data.split(split).chosen(samples.n, samples.seed)
        rows[f"{len(images.image)} {what} images"] = compare(labelled_batches(images, size))
    text, record = quality_report(module, samples, rows, len(test.image), name)

    train, on_cpu = data.split("train").images, judge.cpu()
    points = points_of(train, module.grey_levels, on_cpu)
    medians, pictures = {}, []
    for row, levels in {"samples": torch.cat([x.cpu() for x, _ in drawn]), "test images": test.image}.items():
        medians[row], picture = neighbours_of(levels, train, points, module.grey_levels, on_cpu)
        pictures.append(picture)
    gap = torch.full((3, 12, pictures[0].shape[2]), 255, dtype=torch.uint8)
    picture = torch.cat([pictures[0], gap, pictures[1]], 1)
    record["median_distance_to_nearest_training_image"] = medians
    trained.report("quality", f"{text}\n\n{_neighbour_table(medians)}", record, {"neighbours.png": picture})
    return record


def points_of(images: Tensor, levels: int, classifier: FeatureClassifier) -> dict[str, Tensor]:
    """Grey levels ``[N, C, H, W]`` as points in pixels and in features, ``[N, D]``."""
    parts = [levels_to_model(part, levels) for part in images.split(500)]
    with torch.inference_mode():
        features = torch.cat([classifier.features(part) for part in parts])
    return {"pixels": torch.cat(parts).flatten(1), "features": features}


def neighbours_of(
    images: Tensor, train: Tensor, points: dict[str, Tensor], levels: int, classifier: FeatureClassifier
) -> tuple[dict[str, float], Tensor]:
    """Median distance to the nearest training image in each space, and a picture of the first images' neighbours.

    ``images`` and ``train`` are grey levels ``[N, C, H, W]``; ``points`` are the latter (:func:`points_of`).
    """
    medians, shown = {}, []
    for space, queries in points_of(images, levels, classifier).items():
        distances, rows = nearest(queries, points[space], NEIGHBOURS)
        medians[space] = float(distances[:, 0].median())
        shown.append(train[rows[:SHOWN]])
    return medians, nearest_neighbours(images[:SHOWN], torch.cat(shown, 1), levels)


def _neighbour_table(medians: dict[str, dict[str, float]]) -> str:
    lines = [f"{'median distance to the nearest training image':<46} {'pixels':>10} {'features':>10}"]
    rows = {f"of {name}": row for name, row in medians.items()}
    rows["ratio"] = {space: medians["samples"][space] / medians["test images"][space] for space in medians["samples"]}
    lines += [f"{name:<46} {row['pixels']:>10.4f} {row['features']:>10.4f}" for name, row in rows.items()]
    return "\n".join(lines)
