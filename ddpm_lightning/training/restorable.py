"""A LightningModule whose checkpoints are plain data, run no code, and are checked before they are used."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Self

from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.core.saving import _default_map_location

from ddpm_lightning.checkpoints.descriptions import describe, instantiate_arguments, trusted_class
from ddpm_lightning.checkpoints.files import read_checkpoint
from ddpm_lightning.checkpoints.weights import check_finite, check_state, limited_weights
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel, GenerativeModel
from ddpm_lightning.training.logged_step import LogAtCheckpoint
from ddpm_lightning.training.memory_format import state_like_parameters
from ddpm_lightning.training.restored import (
    Changes,
    apply_optimization,
    changed_options,
    check_schedule,
    in_words,
    keep_callback_options,
    refuse_changes,
    schedule_marks,
)
from ddpm_lightning.training.resume import ExactResume
from ddpm_lightning.training.training_state import check_training_state

__all__ = ["RestorableModule"]


class RestorableModule(LightningModule):
    """What the checkpoints of a diffusion model's module need, for a subclass that trains it."""

    model: GenerativeModel

    def __init__(self) -> None:
        super().__init__()
        self.steps_trained = 0  # optimiser steps behind the weights, whichever process took them
        self.epochs_trained = 0  # epochs done when the checkpoint was written that is evaluated
        self.sigma_rel: float | None = None  # of an average that was made after training (runs/averages.py)
        self._changes: Changes = {}  # against the checkpoint that training goes on from

    def keep_hyperparameters(self, frame: Any) -> None:
        """Keep the arguments of the constructor, whose frame it is, as the command line would have given them."""
        with warnings.catch_warnings():
            # Lightning advises against keeping modules as hyper-parameters; they are about to become plain data
            warnings.filterwarnings("ignore", message=".*already saved during checkpointing.*")
            self.save_hyperparameters(logger=False, frame=frame)
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
        return cls.from_checkpoint(checkpoint, str(checkpoint_path), strict, kwargs)

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: dict[str, Any],
        name: str = "the checkpoint",
        strict: bool | None = None,
        given: Mapping[str, Any] | None = None,
    ) -> Self:
        """The module of a checkpoint that is in memory; otherwise as :meth:`load_from_checkpoint`.

        Args:
            checkpoint: what ``read_checkpoint`` returns; its state of training may be taken out.
            name: what errors call it.
            strict: False lets tensors be missing or left over.
            given: arguments of the module to use instead of the checkpoint's.
        """
        cls = cls._that_wrote(checkpoint)
        described = checkpoint.get("hyper_parameters", {})
        if not isinstance(described, Mapping):
            raise InputError(f"{name}: its hyper_parameters are no mapping of names to descriptions")
        described = {key: value for key, value in described.items() if not str(key).startswith("_")}
        try:
            with limited_weights(checkpoint["state_dict"]) if strict is not False else nullcontext():
                module = cls(**instantiate_arguments(cls, described, "hyper_parameters", given))
        except (ArithmeticError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"{name} cannot be used: {error}") from error
        module.configure_model()
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading if strict is None else strict)
        return module.to(next((value.device for value in checkpoint["state_dict"].values()), module.device))

    @classmethod
    def _that_wrote(cls, checkpoint: Mapping[str, Any]) -> type[Self]:
        """The class of the module that wrote a checkpoint, or this class where it is one of that kind.

        Raises:
            InputError: it is another class, or one that is not trusted.
        """
        # before there were others, the class was not noted
        name = checkpoint.get("module", "ddpm_lightning.training.module.DiffusionModule")
        known = {f"{each.__module__}.{each.__qualname__}": each for each in _subclasses(RestorableModule)}
        wrote = known[name] if name in known else trusted_class(name, "module")
        if issubclass(cls, wrote):
            return cls
        if not issubclass(wrote, cls):
            raise InputError(f"the checkpoint was written by {wrote.__name__}, which is no {cls.__name__}")
        return wrote

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit, in one sentence.

        Raises:
            InputError: weights that are NaN, or of another model; where training goes on, a training state that is
                incomplete or of another optimiser.
        """
        check_finite(self.state_dict(), checkpoint["state_dict"])
        self._changes = changed_options(self.hparams, checkpoint.get("hyper_parameters", {}))
        training = self._trainer is not None and self.trainer.training
        refuse_changes(self._changes, training)
        if "schedule" in checkpoint and isinstance(self.model, DiffusionModel):
            check_schedule(self.model, checkpoint["schedule"])
        if training:
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
        self.epochs_trained = checkpoint.get("epoch", 0)
        width = checkpoint.get("sigma_rel")
        self.sigma_rel = width if isinstance(width, float) else None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Lightning's; a tensor that does not fit is named.

        Raises:
            InputError: a tensor is of another shape or type, or, if ``strict``, missing or left over.
        """
        check_state(type(self.model.network).__name__, self.state_dict(), state_dict, strict)
        return super().load_state_dict(dict(state_dict), strict, assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["module"] = f"{type(self).__module__}.{type(self).__qualname__}"
        if isinstance(self.model, DiffusionModel):
            checkpoint["schedule"] = schedule_marks(self.model)

    def configure_callbacks(self) -> list[Callback]:
        return [ExactResume(), LogAtCheckpoint()]

    def on_train_start(self) -> None:
        apply_optimization(self, self.trainer, self._changes)
        if self._changes and self.trainer.is_global_zero:
            print(f"changed since the checkpoint: {in_words(self._changes)}", flush=True)
        self._changes = {}
        for optimizer in self.trainer.optimizers:
            state_like_parameters(optimizer)


def _subclasses(cls: type[RestorableModule]) -> Iterator[type[RestorableModule]]:
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)
