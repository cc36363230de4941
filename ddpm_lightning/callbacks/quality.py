"""A callback that measures how good the samples are."""

from collections.abc import Iterator

from lightning.pytorch import Callback, LightningModule, Trainer

from ddpm_lightning.callbacks.publishing import publish_text
from ddpm_lightning.data import Batch, ImageDataModule
from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.quality import (
    Comparison,
    Labelled,
    Samples,
    labelled_batches,
    named_classifier,
    quality_report,
)
from ddpm_lightning.evaluation.trained import publish
from ddpm_lightning.networks import FeatureClassifier
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import DDIMSampler, Sampler
from ddpm_lightning.training.module import GenerativeModule

__all__ = ["SampleQuality"]


class SampleQuality(Callback):
    """Compares samples of the averaged model with real images in the features of a classifier of the data.

    In ``fit``, after the validation of every ``every_n_epochs``-th epoch: ``val/frechet``, the Frechet distance of n
    samples from n validation images. In ``test``: every measure of ``QualityMetrics``, of n samples and of n training
    images (the floor), each against the same n test images, as ``test/NAME`` and ``test/floor_NAME``, printed beside
    the bound and written to RUN/quality-test.txt and .json. Where a split has fewer than n images all of it is taken.

    Samples belong to their index and the seed, so no measure depends on the batch size or the number of processes, and
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
        at_least(1, every_n_epochs=every_n_epochs)
        self.samples = Samples(
            sampler or DDIMSampler(), steps, seed=seed, guidance_scale=guidance_scale, n=n, batch_size=batch_size
        )
        self.every_n_epochs, self.reference, self.classifier = every_n_epochs, reference, classifier
        self.measured: dict[str, dict[str, float]] = {}
        self._judge: FeatureClassifier | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the classifier and refuse what cannot be measured, before anything is trained."""
        assert isinstance(pl_module, GenerativeModule)
        self.samples.on(pl_module)
        if self.samples.n < trainer.world_size * 4:
            raise InputError(f"SampleQuality: n = {self.samples.n} is too few for {trainer.world_size} processes")
        self.classifier, self._judge = named_classifier(pl_module, self.classifier)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if trainer.state.fn != "fit" or trainer.sanity_checking or not due:
            return
        compare = self._comparison(trainer, pl_module, self.reference, ["frechet"])
        pl_module.log("val/frechet", compare(self._sampled(trainer, pl_module))["frechet"])

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compare = self._comparison(trainer, pl_module, "test")
        self.measured["samples"] = compare(self._sampled(trainer, pl_module))
        self.measured["training images"] = compare(self._real(trainer, "train"))
        for prefix, row in (("", "samples"), ("floor_", "training images")):
            pl_module.log_dict({f"test/{prefix}{name}": value for name, value in self.measured[row].items()})

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            assert isinstance(pl_module, GenerativeModule)
            real = len(self._chosen(trainer, "test").image)
            text, record = quality_report(pl_module, self.samples, self.measured, real, str(self.classifier))
            publish(Run.of(trainer), "quality-test", text, record)
            publish_text(trainer, "test/quality", text)

    def _comparison(
        self, trainer: Trainer, module: LightningModule, split: SplitName, only: list[str] | None = None
    ) -> Comparison:
        assert isinstance(module, GenerativeModule) and self._judge is not None
        return Comparison(module, self._judge, self._real(trainer, split), only)

    def _chosen(self, trainer: Trainer, split: SplitName) -> Batch:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ImageDataModule):
            raise InputError("SampleQuality needs a datamodule, whose images it compares the samples with")
        return data.split(split).chosen(self.samples.n, self.samples.seed)

    def _real(self, trainer: Trainer, split: SplitName) -> Iterator[Labelled]:
        images = self._chosen(trainer, split)
        return labelled_batches(images, self.samples.batch_size, trainer.global_rank, trainer.world_size)

    def _sampled(self, trainer: Trainer, module: LightningModule) -> Iterator[Labelled]:
        assert isinstance(module, GenerativeModule)
        forward = trainer.precision_plugin.forward_context
        return self.samples.batches(module, trainer.global_rank, trainer.world_size, precision=forward)
