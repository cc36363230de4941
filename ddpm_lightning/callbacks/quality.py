"""A callback that measures how good the samples are."""

import json
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.data import Batch, ImageDataModule
from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.quality import Labelled, add_images, image_batches, quality_table, sample_batches
from ddpm_lightning.metrics import (
    ClassifierFeatures,
    FrechetDistance,
    QualityMetrics,
    classifier_for,
    load_classifier,
)
from ddpm_lightning.networks import FeatureClassifier
from ddpm_lightning.samplers import DDIMSampler, Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["SampleQuality"]


class SampleQuality(Callback):
    """Compares samples of the averaged model with real images in the features of a classifier of the data.

    In ``fit``, after the validation of every ``every_n_epochs``-th epoch: ``val/frechet``, the Frechet distance of n
    samples from n validation images. In ``test``: every figure of ``QualityMetrics``, of n samples and of n training
    images (the floor), each against the same n test images, as ``test/NAME`` and ``test/floor_NAME``, printed beside
    the bound and written to RUN/quality-test.txt and .json. Where a split has fewer than n images all of it is taken.

    Samples belong to their index and the seed, so no figure depends on the batch size or the number of processes, and
    training draws the numbers that it would draw without.

    Args:
        n: number of samples, and of real images.
        every_n_epochs: how often in ``fit``.
        sampler: how to sample; None for DDIM.
        steps: steps of the sampler, cut to the T of a chain that has fewer; None for all T.
        batch_size: images drawn at a time on each process.
        reference: split that the samples are compared with in ``fit``.
        classifier: name or file of the classifier (``load_classifier``); None for the one shipped for such images.
        guidance_scale: of classifier-free guidance; 1 is none.
        seed: seed of the samples and of the choice of real images.

    Raises:
        InputError: a number out of its range, no classifier for such images, guidance that the model cannot have.
    """

    def __init__(
        self,
        n: int = 1000,
        every_n_epochs: int = 1,
        sampler: Sampler | None = None,
        steps: int | None = 50,
        batch_size: int = 100,
        reference: SplitName = "val",
        classifier: str | None = None,
        guidance_scale: float = 1.0,
        seed: int = 0,
    ) -> None:
        least = {"n": (n, 4), "every_n_epochs": (every_n_epochs, 1), "batch_size": (batch_size, 1)}
        for name, (value, low) in {**least, **({} if steps is None else {"steps": (steps, 1)})}.items():
            if value < low:
                raise InputError(f"SampleQuality: {name} = {value} must be {low} or more")
        self.n, self.every_n_epochs, self.batch_size = n, every_n_epochs, batch_size
        self.sampler, self.steps = DDIMSampler() if sampler is None else sampler, steps
        self.reference, self.classifier = reference, classifier
        self.guidance_scale, self.seed = guidance_scale, seed
        self.figures: dict[str, dict[str, float]] = {}
        self._classifier: FeatureClassifier | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the classifier and refuse what cannot be measured, before anything is trained."""
        assert isinstance(pl_module, DiffusionModule)
        self._request().on(pl_module)
        if self.n < trainer.world_size * 4:
            raise InputError(f"SampleQuality: n = {self.n} is too few for {trainer.world_size} processes")
        name = classifier_for(pl_module.shape, pl_module.levels) if self.classifier is None else self.classifier
        classifier = load_classifier(name)
        expected = (classifier.channels, classifier.size, classifier.size)
        if expected != pl_module.shape:
            raise InputError(f"SampleQuality: classifier {name} knows images {expected}, not {pl_module.shape}")
        self._classifier = classifier

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``val/frechet``, where the validation belongs to training and it is the epoch's turn."""
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or trainer.sanity_checking or not due:
            return
        module, classifier = self._parts(pl_module)
        metric = FrechetDistance(ClassifierFeatures(classifier)).to(module.device)
        add_images(metric, self._real(trainer, self.reference), True, module)
        add_images(metric, self._sampled(trainer, module), False, module)
        module.log("val/frechet", float(metric.compute()))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """``test/frechet`` and the other figures, and those of training images: ``test/floor_frechet``."""
        module, classifier = self._parts(pl_module)
        sets = {"samples": self._sampled(trainer, module), "training images": self._real(trainer, "train")}
        for name, batches in sets.items():
            metric = QualityMetrics(classifier).to(module.device)
            add_images(metric, self._real(trainer, "test"), True, module)
            add_images(metric, batches, False, module)
            self.figures[name] = metric.compute()
        for prefix, name in (("", "samples"), ("floor_", "training images")):
            module.log_dict({f"test/{prefix}{figure}": value for figure, value in self.figures[name].items()})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print and write the table."""
        if not trainer.is_global_zero:
            return
        module, classifier = self._parts(pl_module)
        real = len(self._chosen(trainer, "test").image)
        guidance = "" if self.guidance_scale == 1 else f", guidance scale {self.guidance_scale:g}"
        steps = "all" if self.steps is None else self._request().on(module).steps
        head = (
            f"Quality of {self.n} samples ({type(self.sampler).__name__}, {steps} steps{guidance}, seed {self.seed}; "
            f"averaged weights after {module.steps_trained} steps)\nand of {len(self._chosen(trainer, 'train').image)} "
            f"training images, against {real} test images, in {classifier.num_features} features of a classifier"
        )
        text = f"{head}\n\n{quality_table(self.figures)}\n"
        print(text, flush=True)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "quality-test.txt").write_text(text)
        record = {
            "samples": self.n,
            "real_images": real,
            "sampler": describe(self.sampler),
            "steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "classifier": self.classifier or classifier_for(module.shape, module.levels),
            "steps_trained": module.steps_trained,
            "figures": self.figures,
        }
        (folder / "quality-test.json").write_text(json.dumps(record, indent=1) + "\n")

    def _request(self) -> SampleRequest:
        scale = self.guidance_scale
        return SampleRequest(self.sampler, self.steps, seed=self.seed, guidance_scale=scale, cap_steps=True)

    def _parts(self, module: LightningModule) -> tuple[DiffusionModule, FeatureClassifier]:
        assert isinstance(module, DiffusionModule) and self._classifier is not None
        return module, self._classifier

    def _chosen(self, trainer: Trainer, split: SplitName) -> Batch:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise InputError("SampleQuality needs a datamodule, whose images it compares the samples with")
        return data.split(split).chosen(self.n, self.seed)

    def _real(self, trainer: Trainer, split: SplitName) -> Iterator[Labelled]:
        images = self._chosen(trainer, split)
        return image_batches(images, self.batch_size, trainer.global_rank, trainer.world_size)

    def _sampled(self, trainer: Trainer, module: DiffusionModule) -> Iterator[Labelled]:
        return sample_batches(
            module,
            self.sampler,
            self.n,
            self.batch_size,
            seed=self.seed,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            rank=trainer.global_rank,
            world=trainer.world_size,
            precision=trainer.precision_plugin.forward_context,
        )
