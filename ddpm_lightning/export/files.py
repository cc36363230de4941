"""A model as one safetensors file: weights, and in its metadata what they are the weights of."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ddpm_lightning.checkpoints.descriptions import describe, instantiate_arguments, trusted_class
from ddpm_lightning.checkpoints.weights import check_finite, check_state, limited_weights
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel

__all__ = ["describe_model", "load_model", "model_of", "save_model"]

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
        **({} if model.encoder.is_identity else {"encoder": model.encoder}),
    }
    try:
        described: dict[str, Any] = {name: describe(part) for name, part in parts.items()}
    except TypeError as error:
        raise InputError(f"the model cannot be exported: {error}") from None
    for class_path in _class_paths(described):
        trusted_class(class_path, "the model")
    return {**described, "clip_x0": model.clip_x0}


def save_model(model: DiffusionModel, path: Path, scale: Mapping[str, Sequence[float]] | None = None) -> None:
    """Write a model to ``path``, a .safetensors file, from which :func:`load_model` makes it again.

    ``scale`` is the ``mean`` and ``std`` of fields, by which the model's values become the data's. It is kept as JSON
    under ``scale`` in the metadata.

    Raises:
        InputError: a part that is not trusted.
    """
    metadata = {_KEY: json.dumps(describe_model(model))}
    if scale is not None:
        metadata["scale"] = json.dumps({name: list(values) for name, values in scale.items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous().cpu() for name, value in model.state_dict().items()}, path, metadata=metadata)


def load_model(path: str | Path) -> DiffusionModel:
    """The model in a file of :func:`save_model`, on the CPU, in evaluation mode.

    No code is taken from the file: it names trusted classes, and others are refused.

    Raises:
        InputError: no such file, no model in it, a class that is not trusted, weights of another network.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dictionary
        with limited_weights(weights):
            model = model_of(json.loads(metadata[_KEY]))
        check_state(type(model.network).__name__, model.state_dict(), weights)
        check_finite(model.state_dict(), weights)
        model.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path} holds no model of ddpm export: {error}") from error
    return model.eval()


def model_of(description: dict[str, Any]) -> DiffusionModel:
    """The model that :func:`describe_model` described, with new weights.

    Raises:
        InputError: a class that is not trusted, or does not fit its place.
    """
    return DiffusionModel(**instantiate_arguments(DiffusionModel, description, "the model"))


def _class_paths(description: Any) -> Iterator[str]:
    if isinstance(description, dict) and "class_path" in description:
        yield description["class_path"]
    items = description.values() if isinstance(description, dict) else description
    for item in items if isinstance(description, dict | list) else ():
        yield from _class_paths(item)
