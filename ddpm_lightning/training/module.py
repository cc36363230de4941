"""The LightningModule: it composes a generative model from parts, trains it, averages it and measures its bound."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from typing import Any, Self, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.saving import _default_map_location
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ddpm_lightning.checkpoints.descriptions import describe, instantiate_arguments, limited_weights
from ddpm_lightning.checkpoints.files import read_checkpoint
from ddpm_lightning.data import Batch, levels_to_model
from ddpm_lightning.data.datamodule import batches_done
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import BoundMeans, BoundScores
from ddpm_lightning.objectives import ElboEstimator, Objective
from ddpm_lightning.ops import BatchGenerator, Generators, image_generators, rand
from ddpm_lightning.process import (
    Decoder,
    DiffusionModel,
    NoiseConditioning,
    Parameterization,
    ReverseVariance,
)
from ddpm_lightning.schedules import Schedule
from ddpm_lightning.training.checks import (
    check_bounds,
    check_finite,
    check_network,
    check_schedule,
    check_state,
    schedule_marks,
)
from ddpm_lightning.training.ema import WeightAverage, decay_at
from ddpm_lightning.training.memory_format import (
    ChannelsLast,
    set_memory_format,
    state_like_parameters,
    wants_channels_last,
)
from ddpm_lightning.training.restored import (
    Changes,
    apply_optimization,
    changed_options,
    in_words,
    keep_callback_options,
    refuse_another_optimizer,
    refuse_changed_weights,
)
from ddpm_lightning.training.resume import ExactResume
from ddpm_lightning.training.sharding import (
    ShardedStrategy,
    ShardedWeights,
    check_shardable,
    refuse_unknown_sharding,
    shard_network,
    synchronise,
)
from ddpm_lightning.training.training_state import check_training_state

__all__ = ["DiffusionModule"]

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


class DiffusionModule(LightningModule):
    """A denoising diffusion model in training.

    One batch: uint8 images -> [-1, 1] on the model's device -> objective -> ``train/loss``. Validation, test, predict
    and sampling use the averaged model, in every process and without swapping weights: it is a submodule of its own,
    ``ema_model``, and is in every checkpoint's state dict beside the raw ``model``.

    Noise is a pure function of (seed, number of batches done, place in the batch of all processes) in training and of
    (eval_seed, index of the image) in evaluation, so a resumed run draws what the uninterrupted one would have drawn,
    on any number of processes, and an image's bound does not depend on the batch or the process that it is in. Dropout
    alone is drawn by each process for itself. What the batches of one optimiser step share
    (``BatchGenerator.step_generator``) is a function of (seed, number of batches done before them).

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
        lr_scheduler: makes a learning-rate scheduler, stepped after each optimiser step.
        ema_decay: decay of the average of the weights, in [0, 1), reached after a warm-up (``training/ema.py``). 0
            makes the average the weights themselves.
        clip_x0: clip predicted x0 to [-1, 1] in reverse steps, decoder and samplers.
        class_conditional: give the network each image's class as ``label``.
        num_classes: number of classes in the data; a class-conditional model needs it.
        label_dropout: probability that the network sees a training image of a class-conditional model without its class
            (label ``num_classes``), in [0, 1): 0.1 or 0.2 for classifier-free guidance. Bounds are those of the
            class-conditional model.
        shape: (C, H, W) of the images.
        levels: number of grey levels.
        seed: seed of the training noise.
        eval_seed: seed of the noise in validation, test and predict.
        channels_last: let the channels of a pixel lie side by side in memory, which suits convolutions; "auto" does
            where it gains (``training/memory_format.py``). Results differ by rounding.
        compile: let ``torch.compile`` fuse the network's operations in training. The first step takes minutes, and
            results differ by rounding. The averaged model is not compiled.

    Raises:
        InputError: a network that does not take images of ``shape`` or does not return as many channels as the
            variance needs, a decoder for other levels, a decay outside [0, 1), a form of the bound named twice, a
            class-conditional model without ``num_classes``, a label dropout outside [0, 1) or without classes, an
            objective that cannot train this model, a form with too few states.
    """

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
        shape: tuple[int, int, int],
        levels: int,
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
    ) -> None:
        super().__init__()
        with warnings.catch_warnings():
            # Lightning advises against keeping modules as hyper-parameters; they are about to become plain data
            warnings.filterwarnings("ignore", message=".*already saved during checkpointing.*")
            self.save_hyperparameters(logger=False)
        self._keep_plain_hyperparameters()
        if decoder.levels != levels:
            raise InputError(
                f"the decoder is made for {decoder.levels} grey levels and the data have {levels}: "
                f"set --model.decoder.init_args.levels to {levels}, or leave it out and it follows the data"
            )
        if not 0 <= ema_decay < 1:
            raise InputError(f"--model.ema_decay {ema_decay:g} must lie in [0, 1)")
        self.shape, self.levels = tuple(shape), levels
        self.objective = objective
        self.bounds = {"val": list(validation_bounds), "test": list(test_bounds)}
        self.optimizer_factory, self.scheduler_factory = optimizer, lr_scheduler
        if class_conditional and num_classes is None:
            raise InputError("a class-conditional model needs to know how many classes there are: num_classes")
        if not 0 <= label_dropout < 1:
            raise InputError(f"--model.label_dropout {label_dropout:g} must lie in [0, 1)")
        if label_dropout > 0 and not class_conditional:
            raise InputError(f"--model.label_dropout {label_dropout:g} needs --model.class_conditional true")
        self.label_dropout = label_dropout
        self.ema_decay, self.class_conditional, self.num_classes = ema_decay, class_conditional, num_classes
        self.seed, self.eval_seed = seed, eval_seed
        self.channels_last, self.compile_network = channels_last, compile
        # num_classes itself stands for "no class"
        last_label = (num_classes if label_dropout else num_classes - 1) if class_conditional and num_classes else None
        check_network(network, variance, self.shape, last_label)
        self.model = DiffusionModel(network, schedule, parameterization, conditioning, variance, decoder, clip_x0)
        objective.check(self.model)
        check_bounds(self.model, self.bounds)
        # eval() here: Lightning leaves modules in the mode that they were built in
        self.ema_model = deepcopy(self.model).requires_grad_(False).eval()
        self.means = nn.ModuleDict(
            {stage: BoundMeans({e.name: e.term_kinds for e in estimators}) for stage, estimators in self.bounds.items()}
        )
        self.bound_scores: dict[str, BoundScores] = {}
        self.images_evaluated: dict[str, int] = {}
        self.steps_trained = 0  # optimiser steps behind the weights, whichever process took them
        self._generator: Generators = None
        self._average: WeightAverage | None = None
        self._changes: Changes = {}  # against the checkpoint that training goes on from
        self._sharded: ShardedWeights | None = None  # of the averaged model

    @property
    def dims(self) -> int:
        """Number of dimensions of an image, C*H*W."""
        return int(np.prod(self.shape))

    # ---------------------------------------------------------------- construction and checkpoints

    def _keep_plain_hyperparameters(self) -> None:
        """Give a module built in Python the hyper-parameters that the command line would have given it."""
        if "_instantiator" in self.hparams:
            return
        plain: dict[str, Any] = {"_instantiator": "lightning.pytorch.cli.instantiate_module"}
        for name, value in self.hparams.items():
            try:
                plain[name] = describe(value)
            except TypeError:
                continue  # load_from_checkpoint then asks for this argument by name
        self.hparams.clear()
        self.hparams.update(plain)

    @classmethod
    def load_from_checkpoint(
        cls,
        checkpoint_path: Any,
        map_location: Any = None,
        hparams_file: Any = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        **kwargs: Any,
    ) -> Self:
        """The module that a checkpoint was written for, with its weights, without running code that the file names.

        Args:
            checkpoint_path: the file, a string or a Path; a damaged ``last.ckpt`` is replaced by the
                ``previous.ckpt`` beside it.
            map_location: where the weights go, as in ``torch.load``; None for the devices that they were saved from.
            hparams_file: not supported.
            strict: False lets tensors be missing or left over.
            weights_only: False lets the file run code.
            kwargs: arguments of the module to use instead of the checkpoint's.

        Raises:
            InputError: the file is missing, damaged or refused; what it describes is not trusted, or does not fit.
        """
        if hparams_file is not None:
            raise InputError("hparams_file is not supported: give the module's arguments by name")
        checkpoint = read_checkpoint(checkpoint_path, map_location or _default_map_location, weights_only is not False)
        described = checkpoint.get("hyper_parameters", {})
        if not isinstance(described, Mapping):
            raise InputError(f"{checkpoint_path}: its hyper_parameters are no mapping of names to descriptions")
        described = {name: value for name, value in described.items() if not str(name).startswith("_")}
        try:
            with limited_weights(checkpoint["state_dict"]) if strict is not False else nullcontext():
                module = cls(**instantiate_arguments(cls, described, "hyper_parameters", kwargs))
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{checkpoint_path} cannot be used: {error}") from error
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
        return module.to(next((value.device for value in checkpoint["state_dict"].values()), module.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, in one sentence, and remember how long it was trained.

        Raises:
            InputError: weights that are not finite; another schedule, for a network that is told the time; where
                training goes on, a training state that is incomplete or of another optimiser.
        """
        check_finite(self.state_dict(), checkpoint["state_dict"])
        self._changes = changed_options(self.hparams, checkpoint.get("hyper_parameters", {}))
        refuse_changed_weights(self._changes)
        if "schedule" in checkpoint:
            check_schedule(self.model, checkpoint["schedule"])
        if self._trainer is not None and self.trainer.training:
            refuse_another_optimizer(self._changes)
            another_scheduler = any(path.startswith("lr_scheduler") for path in self._changes)
            check_training_state(self, self.trainer, checkpoint, another_scheduler)
            if another_scheduler:
                checkpoint["lr_schedulers"] = []  # apply_optimization brings the new one to where it would be
            keep_callback_options(self.trainer, checkpoint)
        else:
            # Lightning would restore them for an evaluation, too
            for name in ("loops", "callbacks"):
                checkpoint.pop(name, None)
        self.steps_trained = checkpoint.get("global_step", 0)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Lightning's; a tensor that does not fit is named.

        Raises:
            InputError: a tensor is of another shape or type, or, if ``strict``, missing or left over.
        """
        check_state(type(self.model.network).__name__, self.state_dict(), state_dict, strict)
        return super().load_state_dict(dict(state_dict), strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which schedule the weights belong to."""
        checkpoint["schedule"] = schedule_marks(self.model)

    def configure_callbacks(self) -> list[Callback]:
        """What every Trainer needs, so that a run can go on from its checkpoints."""
        return [ExactResume()]

    # ---------------------------------------------------------------- training

    def train(self, mode: bool = True) -> "DiffusionModule":
        """Training mode for all but the averaged model, which is only ever evaluated."""
        super().train(mode)
        self.ema_model.eval()
        return self

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
        if isinstance(self.trainer.strategy, ShardedStrategy):
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
        if not isinstance(strategy, ShardedStrategy):
            refuse_unknown_sharding(strategy)
            return
        if self.trainer.state.fn != "fit" or self._sharded is not None:
            return
        network, variance = self.model.network, self.model.reverse_process.variance
        label = 0 if self.class_conditional else None
        for model in (self.model, self.ema_model):
            model.to(strategy.root_device)
            synchronise(model)
        shard_network(network, strategy.mesh, partial(check_network, network, variance, self.shape, label))
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
        """Make what belongs to weights that are restored and on their device."""
        apply_optimization(self, self.trainer, self._changes)
        if self._changes and self.trainer.is_global_zero:
            print(f"changed since the checkpoint: {in_words(self._changes)}", flush=True)
        self._changes = {}
        for optimizer in self.trainer.optimizers:
            state_like_parameters(optimizer)
        self._put_average_away()
        self._average = WeightAverage(self.ema_model, self.model)

    def _condition(self, label: Tensor) -> dict[str, Tensor]:
        return {"label": label} if self.class_conditional else {}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Seed the step: noise and times from a generator of our own, dropout from torch's."""
        done = batches_done(self.trainer)
        batches = self.trainer.accumulate_grad_batches
        place = batch_idx % batches
        self._generator = BatchGenerator(
            torch.Generator(device=self.device).manual_seed(self._key(done, 0)),
            self.global_rank,
            self.trainer.world_size,
            # three numbers, so that it is not the key of any batch's noise
            torch.Generator(device=self.device).manual_seed(self._key(done - place, 0, 0)),
            place,
            batches,
        )
        key = self._key(done, self.global_rank)
        torch.default_generator.manual_seed(key)
        if self.device.type == "cuda":
            torch.cuda.default_generators[self.device.index].manual_seed(key)

    def _key(self, *numbers: int) -> int:
        return int(np.random.SeedSequence(self.seed, spawn_key=numbers).generate_state(1)[0])

    def _with_dropped(self, label: Tensor) -> Tensor:
        """Each label ``[B]`` replaced by "no class" with probability ``label_dropout``; else nothing is drawn."""
        if self.label_dropout == 0:
            return label
        return torch.where(rand(label, self._generator) < self.label_dropout, cast(int, self.num_classes), label)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The objective's mean over the batch, logged as ``train/loss`` every ``log_every_n_steps`` steps."""
        x0 = levels_to_model(batch.image, self.levels)
        label = self._with_dropped(batch.label)
        loss = self.objective(self.model, x0, self._generator, **self._condition(label)).mean()
        # logging costs as much as a step of a tiny network: only where the logger will write
        interval = self.trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's connectors set it
        if interval and (self.trainer.global_step + 1) % interval == 0:
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(x0), sync_dist=True)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimiser, then the average."""
        super().optimizer_step(*args, **kwargs)
        # Lightning counts the step when this hook has returned
        self.steps_trained = self.trainer.global_step + 1
        assert self._average is not None  # on_train_start
        self._average.update(decay_at(self.steps_trained, self.ema_decay))

    def make_optimizer(self) -> Optimizer:
        """The injected optimiser of the model's parameters.

        Raises:
            InputError: the module has none.
        """
        if self.optimizer_factory is None:
            raise InputError("this module has no optimiser: give --model.optimizer, for example torch.optim.Adam")
        return self.optimizer_factory(self.model.parameters())

    def make_scheduler(self, optimizer: Optimizer) -> LRScheduler | None:
        """The injected learning-rate scheduler, which is stepped after each optimiser step; None for none."""
        return None if self.scheduler_factory is None else self.scheduler_factory(optimizer)

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        scheduler = self.make_scheduler(optimizer)
        return optimizer if scheduler is None else ([optimizer], [{"scheduler": scheduler, "interval": "step"}])

    # ---------------------------------------------------------------- the bound

    def bound(self, estimator: ElboEstimator, batch: Batch) -> dict[str, Tensor]:
        """The averaged model's bound on each image: ``[B]`` nats by name, from noise that belongs to the image."""
        x0 = levels_to_model(batch.image, self.levels)
        generators = image_generators(self.eval_seed, batch.index)
        return estimator(self.ema_model, x0, generators, **self._condition(batch.label)).named()

    def _means(self, stage: str) -> BoundMeans:
        return cast(BoundMeans, self.means[stage])

    def _evaluate(self, stage: str, batch: Batch) -> None:
        for estimator in self.bounds[stage]:
            self._means(stage).update(estimator.name, self.bound(estimator, batch))

    def _report(self, stage: str) -> None:
        scores, self.images_evaluated[stage] = self._means(stage).compute()
        self._means(stage).reset()
        for form, terms in scores.items():
            for name, score in {**terms, "bits_per_dim": terms["elbo"].in_bits(self.dims)}.items():
                self.log_dict({f"{stage}/{form}/{name}": score.mean, f"{stage}/{form}/{name}_se": score.se})
        self.bound_scores[stage] = scores

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch's bound to the stage's means."""
        self._evaluate("val", batch)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/FORM/NAME`` (nats an image, ``bits_per_dim``) and ``..._se``."""
        self._report("val")

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add the batch's bound to the stage's means."""
        self._evaluate("test", batch)

    def on_test_epoch_end(self) -> None:
        """Log ``test/FORM/NAME`` (nats an image, ``bits_per_dim``) and ``..._se``."""
        self._report("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Every image's terms: ``index``, ``label`` and ``FORM/NAME`` ``[B]`` in nats."""
        columns = {"index": batch.index, "label": batch.label}
        for estimator in self.bounds["test"]:
            columns |= {f"{estimator.name}/{name}": v for name, v in self.bound(estimator, batch).items()}
        return columns
