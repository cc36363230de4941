"""The LightningModule of hierarchical VAEs."""

from collections.abc import Mapping, Sequence
from inspect import currentframe

from ddpm_lightning.objectives import ElboEstimator, Objective
from ddpm_lightning.process import Decoder, HierarchicalVAE, Level
from ddpm_lightning.training.memory_format import ChannelsLast
from ddpm_lightning.training.module import GenerativeModule, OptimizerFactory, SchedulerFactory

__all__ = ["HierarchyModule"]


class HierarchyModule(GenerativeModule):
    """A hierarchical VAE in training.

    Args:
        hierarchy: the levels, from the data upwards; each with its encoder and its decoder.
        decoder: p(x_0 | x_1), made for the data's grey levels.
        objective: the training loss: NegativeElbo.
        validation_bounds: estimators of the bound to run in validation: ConsistencyElbo, TrajectoryElbo or
            ImportanceWeightedElbo.
        test_bounds: estimators of the bound to run in test and predict.
        shape: ``(C, *space)`` of the data.
        levels: number of grey levels; None for fields.
        optimizer: makes the optimiser of the model's parameters; None for a module that is only evaluated.
        lr_scheduler: makes a learning-rate scheduler, stepped after each optimiser step.
        ema_decay: decay of the average of the weights, in [0, 1).
        num_classes: number of classes in the data, which the model does not use.
        seed: seed of the training noise.
        eval_seed: seed of the noise in validation, test and predict.
        channels_last: memory format of the weights (``training/memory_format.py``).
        scale: ``mean`` and ``std`` of each channel of fields; None for grey levels.

    Raises:
        InputError: no level, levels whose shapes do not chain, a decoder for other grey levels, an objective or a form
            of the bound for diffusion models only.
    """

    model: HierarchicalVAE
    ema_model: HierarchicalVAE

    def __init__(
        self,
        hierarchy: Sequence[Level],
        decoder: Decoder,
        objective: Objective,
        validation_bounds: Sequence[ElboEstimator],
        test_bounds: Sequence[ElboEstimator],
        shape: tuple[int, ...],
        levels: int | None,
        optimizer: OptimizerFactory | None = None,
        lr_scheduler: SchedulerFactory | None = None,
        ema_decay: float = 0.999,
        num_classes: int | None = None,
        seed: int = 0,
        eval_seed: int = 0,
        channels_last: ChannelsLast = "auto",
        scale: Mapping[str, Sequence[float]] | None = None,
    ) -> None:
        super().__init__(
            HierarchicalVAE(hierarchy, decoder, shape),
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
            scale=scale,
        )
        self.keep_hyperparameters(currentframe())
