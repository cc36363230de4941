"""A model as one safetensors file: weights, and in its metadata what they are the weights of."""

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel

__all__ = ["describe_model", "instantiate", "load_model", "save_model"]

_PARTS = ("network", "schedule", "parameterization", "conditioning", "variance", "decoder")
_ALLOWED = ("ddpm_lightning.networks.", "ddpm_lightning.schedules.", "ddpm_lightning.process.", "torch.nn.modules.")
_KEY = "ddpm_lightning"


def describe_model(model: DiffusionModel) -> dict[str, Any]:
    """The parts of a model as plain data.

    Raises:
        InputError: a part of one's own, which could not be made again from this package alone.
    """
    denoiser = model.denoiser
    parts = {
        "network": model.network,
        "schedule": model.schedule,
        "parameterization": denoiser.parameterization,
        "conditioning": denoiser.conditioning,
        "variance": model.reverse_process.variance,
        "decoder": model.decoder,
    }
    try:
        described: dict[str, Any] = {name: describe(part) for name, part in parts.items()}
    except TypeError as error:
        raise InputError(f"the model cannot be exported: {error}") from None
    _check_allowed(described)
    return {**described, "clip_x0": model.clip_x0}


def save_model(model: DiffusionModel, path: Path) -> None:
    """Write a model to ``path``, a .safetensors file, from which :func:`load_model` makes it again.

    Raises:
        InputError: a part that is not of this package or torch.nn.
    """
    metadata = {_KEY: json.dumps(describe_model(model))}
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, path, metadata=metadata)


def load_model(path: Path) -> DiffusionModel:
    """The model in a file of :func:`save_model`, on the CPU, in evaluation mode.

    No code is taken from the file: it names classes of this package and of torch.nn, and others are refused.

    Raises:
        InputError: no such file, no model in it, a foreign class, weights of another network.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        model = model_of(json.loads(metadata[_KEY]))
        model.load_state_dict(weights)
    except (OSError, ImportError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} holds no model of ddpm export: {error}") from None
    return model.eval()


def model_of(description: dict[str, Any]) -> DiffusionModel:
    """The model that :func:`describe_model` described, with new weights.

    Raises:
        InputError: a foreign class.
    """
    _check_allowed(description)
    parts = {name: instantiate(description[name]) for name in _PARTS}
    return DiffusionModel(**parts, clip_x0=bool(description["clip_x0"]))


def instantiate(description: Any) -> Any:
    """The object that a description of ``describe`` names, made of classes of this package and torch.nn only.

    Raises:
        InputError: another class.
    """
    if isinstance(description, list):
        return [instantiate(item) for item in description]
    if not isinstance(description, dict):
        return description
    if "class_path" not in description:
        return {key: instantiate(item) for key, item in description.items()}
    class_path = description["class_path"]
    _check_class_path(class_path)
    module, _, name = class_path.rpartition(".")
    cls = getattr(import_module(module), name, None)
    if not isinstance(cls, type) or not cls.__module__.startswith(_ALLOWED):
        raise InputError(f"{class_path} is no class that a model is made of")
    arguments = {key: instantiate(item) for key, item in description.get("init_args", {}).items()}
    return cls(**arguments)


def _check_allowed(description: Any) -> None:
    """Every class first, before any of them is made."""
    if isinstance(description, list):
        for item in description:
            _check_allowed(item)
    elif isinstance(description, dict):
        if "class_path" in description:
            _check_class_path(description["class_path"])
        for item in description.values():
            _check_allowed(item)


def _check_class_path(class_path: Any) -> None:
    if not isinstance(class_path, str) or not class_path.startswith(_ALLOWED):
        raise InputError(
            f"the model is made of {class_path}: a model file may name classes of {', '.join(_ALLOWED)} only, so that "
            "loading it runs no code of others"
        )
