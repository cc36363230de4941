"""A LightningModule that measures the bound of its averaged model."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from ddpm_lightning.data import Batch
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.data.transforms import Scale
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import BoundMeans, BoundScores
from ddpm_lightning.objectives import CostProfile, ElboEstimator, ElboTerms
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import GenerativeModel
from ddpm_lightning.training.averaged import AveragedModule
from ddpm_lightning.training.checks import check_bounds
from ddpm_lightning.training.memory_format import ChannelsLast

__all__ = ["MeasuredModule"]

_IMAGES = 16  # training images on which the costs of steps are measured


class MeasuredModule(AveragedModule):
    """The bound of the averaged model: in validation, test and predict, each image once, on any number of processes.

    A form that evaluates some of the steps draws them by their typical cost (:class:`CostProfile`). Each validation of
    ``fit`` begins with measuring it on a few training images, with noise of their own: the same on all processes. It is
    kept in the checkpoint. Where it was not measured (in a checkpoint of an older version, or with data of another kind
    than ArrayDataModule) one step is drawn from each of equal runs.

    Args:
        model: the generative model.
        bounds: estimators of the bound by stage, ``val`` and ``test``.
        shape: (C, *space) of the data.
        scale: maps data to model range.
        eval_seed: seed of the noise. That of an image belongs to the image.
        ema_decay, channels_last, compile: as of :class:`AveragedModule`.
    """

    def __init__(
        self,
        model: GenerativeModel,
        bounds: Mapping[str, Sequence[ElboEstimator]],
        shape: Sequence[int],
        scale: Scale,
        eval_seed: int,
        ema_decay: float,
        channels_last: ChannelsLast,
        compile: bool,
    ) -> None:
        super().__init__(model, ema_decay, channels_last, compile)
        self.shape, self.levels, self.scale, self.eval_seed = tuple(shape), scale.levels, scale, eval_seed
        self.bounds = {stage: list(estimators) for stage, estimators in bounds.items()}
        check_bounds(model, self.bounds)
        self.means = nn.ModuleDict(
            {stage: BoundMeans({e.name: e.term_kinds for e in estimators}) for stage, estimators in self.bounds.items()}
        )
        names = [estimator.name for estimators in self.bounds.values() for estimator in estimators]
        self.profiles = nn.ModuleDict({name: CostProfile() for name in names})
        self.bound_scores: dict[str, BoundScores] = {}
        self.images_evaluated: dict[str, int] = {}

    @property
    def dims(self) -> int:
        """Number of values of an image or field, C*H*W."""
        return int(np.prod(self.shape))

    @property
    def grey_levels(self) -> int:
        """Number of grey levels; InputError for a model of fields, which has none."""
        if self.levels is None:
            raise InputError("this measures pictures of grey levels, and the model is one of fields")
        return self.levels

    def condition(self, batch: Batch) -> dict[str, Tensor]:
        """What the model is told of a batch, by name."""
        known = {"label": batch.label, **batch.cond}
        return {name: known[name] for name in self.conditions}

    def bound(self, estimator: ElboEstimator, batch: Batch) -> dict[str, Tensor]:
        """The averaged model's bound on each image: ``[B]`` nats by name, from noise that belongs to the image."""
        return self._terms(estimator, batch).named()

    def _terms(self, estimator: ElboEstimator, batch: Batch) -> ElboTerms:
        generators, x0 = image_generators(self.eval_seed, batch.index), self.scale.to_model(batch.image)
        return self.drawing(estimator)(self.ema_model, x0, generators, **self.condition(batch))

    def drawing(self, estimator: ElboEstimator) -> ElboEstimator:
        """The estimator as it is used, with its steps drawn by their typical cost where this is known."""
        profile = self._profile(estimator.name)
        return estimator if profile is None or not profile.is_measured else estimator.choosing(profile)

    def _profile(self, name: str) -> CostProfile | None:
        return cast(CostProfile, self.profiles[name]) if name in self.profiles else None

    def on_validation_start(self) -> None:
        super().on_validation_start()
        data = getattr(self.trainer, "datamodule", None)
        if self.trainer.state.fn == "fit" and not self.trainer.sanity_checking and isinstance(data, ArrayDataModule):
            self._measure_costs(data.split("train").chosen(_IMAGES, seed=0).map(lambda column: column.to(self.device)))

    def _measure_costs(self, batch: Batch) -> None:
        """Measure what the steps cost of the first estimator of each form that does not evaluate all of them."""
        chosen = [estimator for estimators in self.bounds.values() for estimator in estimators if estimator.steps]
        x0, cond = self.scale.to_model(batch.image), self.condition(batch)
        for name, estimator in {estimator.name: estimator for estimator in reversed(chosen)}.items():
            # no row of a split has a negative number, so no image that is evaluated has this noise
            generators = image_generators(self.eval_seed, -1 - batch.index)
            with self.trainer.precision_plugin.val_step_context():
                estimator.measure(cast(CostProfile, self.profiles[name]), self.ema_model, x0, generators, **cond)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As in the base class. What steps cost may be missing, or be that of other forms than are measured now."""
        own = {name: value for name, value in self.state_dict().items() if name.startswith("profiles.")}
        theirs = {name: v for name, v in state_dict.items() if name in own or not name.startswith("profiles.")}
        return super().load_state_dict({**own, **theirs}, strict, assign)

    def _means(self, stage: str) -> BoundMeans:
        return cast(BoundMeans, self.means[stage])

    def _evaluate(self, stage: str, batch: Batch) -> dict[str, ElboTerms]:
        estimators = self.bounds[stage] if len(batch.index) else ()
        found = {estimator.name: self._terms(estimator, batch) for estimator in estimators}
        for form, terms in found.items():
            self._means(stage).update(form, terms.named())
        return found

    def _report(self, stage: str) -> None:
        scores, self.images_evaluated[stage] = self._means(stage).compute()
        self._means(stage).reset()
        for form, terms in scores.items():
            for name, score in {**terms, "bits_per_dim": terms["elbo"].in_bits(self.dims)}.items():
                key = f"{stage}/{form}/{name}"
                # errors have a prefix of their own in the loggers, where they would double the cards
                self.log_dict({key: score.mean, f"standard_error/{key}": score.se})
                self.log(f"{key}_se", score.se, logger=False)
        if first := next(iter(scores.values()), None):  # what waits for "the bound" need not know its form
            self.log(f"{stage}/bits_per_dim", first["elbo"].in_bits(self.dims).mean, logger=False)
        self.bound_scores[stage] = scores

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, ElboTerms]:
        """The terms of each form, for callbacks."""
        return self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/FORM/NAME`` (nats an image, ``bits_per_dim``) and its standard error: to the loggers as
        ``standard_error/val/FORM/NAME``, to callbacks also as ``val/FORM/NAME_se``. ``val/bits_per_dim``, for callbacks
        only, is that of the first form."""
        self._report("val")
        if self.trainer.state.fn != "fit" or self.trainer.sanity_checking:
            return
        for config in self.trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ReduceLROnPlateau):
                first = self.bound_scores["val"][self.bounds["val"][0].name]
                config.scheduler.step(first["elbo"].in_bits(self.dims).mean)

    def test_step(self, batch: Batch, batch_idx: int) -> dict[str, ElboTerms]:
        return self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """As in validation, ``test/FORM/NAME``."""
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Every image's terms: ``index``, ``label`` and ``FORM/NAME`` ``[B]`` in nats."""
        columns = {"index": batch.index, "label": batch.label}
        for estimator in self.bounds["test"]:
            columns |= {f"{estimator.name}/{name}": v for name, v in self.bound(estimator, batch).items()}
        return columns
