"""A LightningModule that trains a model and keeps an average of it, wherever the weights of the two lie."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.plugins.precision import MixedPrecision, Precision
from lightning.pytorch.utilities.enums import GradClipAlgorithmType
from torch import Tensor
from torch.optim import Optimizer

from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel, GenerativeModel
from ddpm_lightning.training.checks import check_network
from ddpm_lightning.training.ema import WeightAverage, decay_at
from ddpm_lightning.training.memory_format import ChannelsLast, set_memory_format, wants_channels_last
from ddpm_lightning.training.restorable import RestorableModule
from ddpm_lightning.training.sharding import (
    ShardedStrategy,
    ShardedWeights,
    check_shardable,
    refuse_unknown_sharding,
    shard_network,
    synchronise,
)

__all__ = ["AveragedModule"]


class AveragedModule(RestorableModule):
    """The model, its average, and where their weights lie: in memory and among the processes.

    Args:
        model: the generative model that is trained. ``ema_model`` is its average, which is only ever evaluated. It
            stays in float32 where the precision of the Trainer is bf16-true or 16-true.
        ema_decay: decay of the average (``training/ema.py``).
        channels_last: memory format of the weights (``training/memory_format.py``).
        compile: compile the network of ``model`` when training begins.
    """

    shape: tuple[int, ...]
    levels: int | None
    conditions: Sequence[str]
    num_classes: int | None

    def __init__(self, model: GenerativeModel, ema_decay: float, channels_last: ChannelsLast, compile: bool) -> None:
        super().__init__()
        self.model = model
        # eval() here: Lightning leaves modules in the mode that they were built in
        self.ema_model = deepcopy(model).requires_grad_(False).eval()
        self.ema_decay, self.channels_last, self.compile_network = ema_decay, channels_last, compile
        self._average: WeightAverage | None = None
        self._sharded: ShardedWeights | None = None  # of the averaged model

    def train(self, mode: bool = True) -> "AveragedModule":
        super().train(mode)
        self.ema_model.eval()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "AveragedModule":
        """Moves all weights and changes their type, but of the average to a more precise type only."""
        averages = {id(value) for value in (*self.ema_model.parameters(), *self.ema_model.buffers())}

        def apply(value: Tensor) -> Tensor:
            changed = fn(value)
            loses = id(value) in averages and changed.is_floating_point() and changed.itemsize < value.itemsize
            return value.to(changed.device) if loses else changed

        super()._apply(apply, recurse)
        return self

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, ShardedStrategy):
            if not isinstance(self.model, DiffusionModel):
                raise InputError("sharded weights are those of a diffusion model's network: use --trainer.strategy ddp")
            check_shardable(self, type(self.model.schedule).__name__, self.channels_last, self.compile_network)
        self.lay_out(self.trainer)
        if self.compile_network and stage == "fit" and self.model.network._compiled_call_impl is None:
            self.model.network.compile()  # in place, so that the state dict keeps its names

    def lay_out(self, trainer: Trainer) -> None:
        """Lay out the weights in memory as ``channels_last`` says for a Trainer's precision and device."""
        if self._sharded is not None:
            return  # in the default format
        option = False if isinstance(trainer.strategy, ShardedStrategy) else self.channels_last
        device, precision = trainer.strategy.root_device, str(trainer.precision)
        channels_last = wants_channels_last(option, self.model.network, precision, device)
        for model in (self.model, self.ema_model):
            set_memory_format(model.network, channels_last)

    def configure_model(self) -> None:
        """Shard the weights, in ``fit`` under :class:`ShardedStrategy`; once, since Lightning may ask again.

        Raises:
            InputError: another strategy that shards weights; a network that cannot be sharded.
        """
        if self._trainer is None:  # load_from_checkpoint
            return
        strategy = self.trainer.strategy
        refuse_unknown_sharding(strategy)
        if not isinstance(strategy, ShardedStrategy) or self.trainer.state.fn != "fit" or self._sharded is not None:
            return
        assert isinstance(self.model, DiffusionModel)  # setup
        network, parts = self.model.network, (self.model.denoiser.parameterization, self.model.reverse_process.variance)
        sizes = {"label": self.num_classes or 1} if "label" in self.conditions else {}
        for model in (self.model, self.ema_model):
            model.to(strategy.root_device)
            synchronise(model)
        shard_network(network, strategy.mesh, partial(check_network, network, *parts, self.shape, self.levels, sizes))
        self._sharded = ShardedWeights(self.ema_model.network, strategy.mesh)

    @contextmanager
    def whole_average(self) -> Iterator[None]:
        """Have the averaged model's weights whole, to evaluate it in a hook of training where they may be sharded.

        All processes must enter it. In validation, test and predict they are whole anyway.
        """
        self._gather_average()
        try:
            yield
        finally:
            self._put_average_away()

    def _gather_average(self) -> None:
        if self._sharded is not None:
            self._sharded.gather()

    def _put_average_away(self) -> None:
        if self._sharded is not None:
            self._sharded.put_away()

    on_validation_start = on_test_start = on_predict_start = _gather_average
    on_validation_end = on_test_end = on_predict_end = _put_average_away

    def on_train_start(self) -> None:
        super().on_train_start()  # the weights are restored and on their device
        self._put_average_away()
        self._average = WeightAverage(self.ema_model, self.model)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        # Lightning counts the step when this hook has returned
        self.steps_trained = self.trainer.global_step + 1
        assert self._average is not None  # on_train_start
        self._average.update(decay_at(self.steps_trained, self.ema_decay))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, with a fused optimiser too.

        Lightning refuses that in mixed precision, because a fused optimiser divides the gradients by the scale of the
        loss in its step, after clipping. In bf16-mixed there is no such scale. In 16-mixed the gradients are divided
        by it here, and torch's ``GradScaler`` then does not do it again.
        """
        plugin = self.trainer.precision_plugin
        if not isinstance(plugin, MixedPrecision) or not getattr(optimizer, "_step_supports_amp_scaling", False):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif gradient_clip_val:
            if plugin.scaler is not None:
                plugin.scaler.unscale_(optimizer)
            algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
            Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
