"""The LightningModule: it composes a generative model from parts and trains it."""

from collections.abc import Mapping, Sequence
from inspect import currentframe
from typing import Any

from torch import Tensor, nn

from ddpm_lightning.data import Batch
from ddpm_lightning.data.own import OwnBatches
from ddpm_lightning.data.transforms import scale_of
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ElboEstimator, Objective
from ddpm_lightning.ops import Generators
from ddpm_lightning.process import (
    Decoder,
    DiffusionModel,
    Encoder,
    GenerativeModel,
    NoiseConditioning,
    Parameterization,
    ReverseVariance,
)
from ddpm_lightning.schedules import Schedule
from ddpm_lightning.training.checks import check_network, check_options, check_shapes
from ddpm_lightning.training.conditions import chosen_conditions, drop_conditions
from ddpm_lightning.training.measured import MeasuredModule
from ddpm_lightning.training.memory_format import ChannelsLast
from ddpm_lightning.training.optimization import OptimizerFactory, SchedulerFactory, make_optimizer, make_scheduler
from ddpm_lightning.training.optimizers import MuonAdamW, WarmupDecay  # noqa: F401  # for configurations to name
from ddpm_lightning.training.seeding import seed_batch

__all__ = ["DiffusionModule", "GenerativeModule", "OptimizerFactory", "SchedulerFactory"]


class GenerativeModule(MeasuredModule):
    """A generative model in training.

    One batch: uint8 images -> [-1, 1] on the model's device -> objective -> ``train/loss``. Validation, test, predict
    and sampling use the averaged model, in every process and without swapping weights: it is a submodule of its own,
    ``ema_model``, and is in every checkpoint's state dict beside the raw ``model``.

    Noise is a pure function of (seed, number of batches done, place in the batch of all processes) in training and of
    (eval_seed, index of the image) in evaluation, so a resumed run draws what the uninterrupted one would have drawn,
    on any number of processes, and an image's bound does not depend on the batch or the process that it is in. Dropout
    alone is drawn by each process for itself. What the batches of one optimiser step share
    (``BatchGenerator.step_generator``) is a function of (seed, number of batches done before them).

    A subclass makes the model of its parts, and keeps its arguments by ``keep_hyperparameters``. The arguments are
    described at DiffusionModule.

    Raises:
        InputError: a decoder for other levels, a form of the bound named twice or not for such a model, a form with too
            few states, an objective that cannot train this model, a decay outside [0, 1).
    """

    conditions: Sequence[str] = ()
    """What the model is told of each row: ``label``, ``vector``, ``field``."""
    num_classes: int | None = None
    label_dropout = 0.0

    def __init__(
        self,
        model: GenerativeModel,
        objective: Objective,
        validation_bounds: Sequence[ElboEstimator],
        test_bounds: Sequence[ElboEstimator],
        shape: Sequence[int],
        levels: int | None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        ema_decay: float = 0.999,
        seed: int = 0,
        eval_seed: int = 0,
        channels_last: ChannelsLast = "auto",
        compile: bool = False,
        scale: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        check_options(model.decoder, levels, ema_decay)
        objective.check(model)
        bounds = {"val": validation_bounds, "test": test_bounds}
        super().__init__(model, bounds, shape, scale_of(levels, scale), eval_seed, ema_decay, channels_last, compile)
        self.objective, self.optimizer_factory, self.scheduler_factory = objective, optimizer, lr_scheduler
        self.seed = seed
        self._own_batches = OwnBatches(self.shape, levels or 0)
        self._generator: Generators = None

    def setup(self, stage: str) -> None:
        """Check that the data are what the model was made for; lay out the weights, compile.

        Raises:
            InputError: another shape or number of levels.
        """
        data = getattr(self.trainer, "datamodule", None)
        for name in ("shape", "levels"):
            theirs = getattr(data, name, None)
            if theirs is not None and theirs != getattr(self, name):
                raise InputError(
                    f"the model was made for images with {name} {getattr(self, name)} and the data have {theirs}"
                )
        super().setup(stage)

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Batch:
        """A batch of the user's own DataLoader as :class:`Batch`; after the public hook, which the data may have, too.

        Raises:
            InputError: it is not what the model needs.
        """
        batch = super()._on_before_batch_transfer(batch, dataloader_idx)
        if isinstance(batch, Batch):
            return batch
        return self._own_batches(batch, self.num_classes if "label" in self.conditions else None, self.trainer)

    def _restart_own_batches(self) -> None:
        self._own_batches.restart()

    on_validation_epoch_start = on_test_epoch_start = on_predict_epoch_start = _restart_own_batches

    @property
    def class_conditional(self) -> bool:
        return "label" in self.conditions

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._generator = seed_batch(self.seed, self.trainer, self.device, batch_idx)

    def _with_dropped(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return drop_conditions(cond, self.label_dropout, self.num_classes, self._generator)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective's mean over the batch, logged as ``train/loss`` every ``log_every_n_steps`` steps."""
        x0, cond = self.scale.to_model(batch.image), self._with_dropped(self.condition(batch))
        loss = self.objective(self.model, x0, self._generator, **cond).mean()
        # logging costs as much as a step of a tiny network: only where the logger will write
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's connectors set it
        if interval and (self.trainer.global_step + 1) % interval == 0:
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(x0), sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        """The injected optimiser of the model's parameters, and its scheduler, stepped after each optimiser step.

        Raises:
            InputError: the module has no optimiser, or one of the two cannot be made or used.
        """
        optimizer = make_optimizer(self.optimizer_factory, self.model.parameters())
        if self.scheduler_factory is None:
            return optimizer
        bound = next((estimator.name for estimator in self.bounds["val"]), None)
        return [optimizer], [make_scheduler(self.scheduler_factory, optimizer, bound, self._trainer)]


class DiffusionModule(GenerativeModule):
    """A denoising diffusion model in training.

    Args:
        network: ``network(x, c, **cond) -> [B, C, H, W]``, or ``[B, 2 C, H, W]`` where ``variance`` is learned.
        schedule: the noise schedule.
        parameterization: what the network's output means.
        conditioning: the scalar c that the network is given for the time.
        variance: variance of the reverse steps.
        decoder: p(x_0 | x_1), made for the data's grey levels.
        objective: the training loss.
        validation_bounds: estimators of the bound to run in validation.
        test_bounds: estimators of the bound to run in test and predict.
        optimizer: makes the optimiser of the model's parameters; None for a module that is only evaluated.
        lr_scheduler: makes a learning-rate scheduler, stepped after each optimiser step; ReduceLROnPlateau after each
            validation, on the first of validation_bounds.
        ema_decay: decay of the average of the weights, in [0, 1), reached after a warm-up (``training/ema.py``). 0
            makes the average the weights themselves.
        clip_x0: clip predicted x0 to [-1, 1] in reverse steps, decoder and samplers.
        class_conditional: give the network each image's class as ``label``.
        num_classes: number of classes in the data; a class-conditional model needs it.
        label_dropout: probability that the network sees a training row of a conditional model without its conditions
            (label ``num_classes``, NaN in a vector or field), in [0, 1): 0.1 or 0.2 for classifier-free guidance.
            Bounds are those of the conditional model.
        shape: ``(C, *space)`` of the data.
        levels: number of grey levels; None for fields.
        seed: seed of the training noise.
        eval_seed: seed of the noise in validation, test and predict.
        channels_last: let the channels of a pixel lie side by side in memory, which suits convolutions; "auto" does
            where it gains (``training/memory_format.py``). Results differ by rounding.
        compile: let ``torch.compile`` fuse the network's operations in training. The first step takes minutes, and
            results differ by rounding. The averaged model is not compiled.
        encoder: m(x_0, t) of the forward process; None for the identity. Set ``clip_x0`` to false with another one.
        scale: ``mean`` and ``std`` of each channel of fields; None for grey levels.
        vector_conditional: give the network the data's condition ``vector``.
        vector_size: numbers in it.
        field_conditional: give the network the data's condition ``field``.
        field_channels: channels of it.

    Raises:
        InputError: a network that does not take images of ``shape`` or does not return as many channels as the
            variance needs, a decoder for other levels, a decay outside [0, 1), a form of the bound named twice, a
            class-conditional model without ``num_classes``, a label dropout outside [0, 1) or without classes, an
            objective that cannot train this model, a form with too few states.
    """

    model: DiffusionModel
    ema_model: DiffusionModel

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        conditioning: NoiseConditioning,
        variance: ReverseVariance,
        decoder: Decoder,
        objective: Objective,
        validation_bounds: Sequence[ElboEstimator],
        test_bounds: Sequence[ElboEstimator],
        shape: tuple[int, ...],
        levels: int | None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        ema_decay: float = 0.999,
        clip_x0: bool = True,
        class_conditional: bool = False,
        num_classes: int | None = None,
        label_dropout: float = 0.0,
        seed: int = 0,
        eval_seed: int = 0,
        channels_last: ChannelsLast = "auto",
        compile: bool = False,
        encoder: Encoder | None = None,
        scale: Mapping[str, Sequence[float]] | None = None,
        vector_conditional: bool = False,
        vector_size: int | None = None,
        field_conditional: bool = False,
        field_channels: int | None = None,
    ) -> None:
        sizes = {"label": num_classes, "vector": vector_size, "field": field_channels}
        flags = {"label": class_conditional, "vector": vector_conditional, "field": field_conditional}
        conditions = chosen_conditions(flags, sizes, label_dropout)
        if clip_x0 and scale is not None:
            raise InputError("--model.clip_x0 true clips x0 to [-1, 1], and fields go further: set it to false")
        check_network(network, parameterization, variance, tuple(shape), levels, conditions, label_dropout)
        model = DiffusionModel(network, schedule, parameterization, conditioning, variance, decoder, clip_x0, encoder)
        check_shapes(model, tuple(shape))
        super().__init__(
            model,
            objective,
            validation_bounds,
            test_bounds,
            shape,
            levels,
            optimizer,
            lr_scheduler,
            ema_decay,
            seed,
            eval_seed,
            channels_last,
            compile,
            scale,
        )
        self.keep_hyperparameters(currentframe())
        self.conditions, self.num_classes, self.label_dropout = [*conditions], num_classes, label_dropout
