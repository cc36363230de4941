"""What a configuration leaves open about its network, and the data and the other parts say."""

from importlib import import_module
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

from ddpm_lightning.data.datamodule import ArrayDataModule

__all__ = ["fact_of", "follow_data", "keep_scale"]


def follow_data(model: Namespace, data: LightningDataModule) -> None:
    """Fill in, in place, arguments of the network and the encoder that are null, in the configuration of a model.

    ``channels`` are the data's, ``num_classes`` too where the model is class-conditional, ``vector_size`` and
    ``vector_scale`` where it is told a vector, and ``out_channels`` where the parameterisation or a learned variance
    needs more than the data's. A network within a network is filled in, too. What is given stays; a network that has no
    such arguments is left as it is.
    """
    if "network" not in model:
        return
    channels = data.shape[0]  # type: ignore[attr-defined]  # checked
    levels = data.levels  # type: ignore[attr-defined]
    outputs = _class(model.parameterization).output_channels(channels, levels)
    outputs += (_class(model.variance).network_outputs - 1) * channels
    known = {"channels": channels, "levels": levels}
    if len(data.shape) != 3:  # type: ignore[attr-defined]  # for pictures it stays null, as in older checkpoints
        known["dims"] = len(data.shape) - 1  # type: ignore[attr-defined]
    if outputs > channels:
        known["out_channels"] = outputs
    if model.class_conditional:
        known["num_classes"] = getattr(data, "num_classes", None)
    told = (("vector_conditional", ("vector_size", "vector_scale")), ("field_conditional", ("field_channels",)))
    for flag, facts in told:
        if model.get(flag):
            known |= {fact: fact_of(data, fact) for fact in facts}
    _fill(model.network, known)
    _fill(model.get("encoder"), {"channels": channels})


def fact_of(data: LightningDataModule, fact: str) -> Any:
    """A fact of fields; None for other data, where an attribute of that name may be anything."""
    return getattr(data, fact) if isinstance(data, ArrayDataModule) else None


def keep_scale(described: Namespace, data: LightningDataModule) -> None:
    """Write the mean and the standard deviation of fields, once measured, into the configuration of the data, so that
    the run keeps them whatever file it is given later.
    """
    arguments: Any = described.get("init_args")
    for name, values in (fact_of(data, "scale") or {}).items():
        if isinstance(arguments, Namespace) and name in arguments:
            arguments[name] = list(values)


def _class(part: Namespace) -> Any:
    """The class of a part of a configuration."""
    module, _, name = part.class_path.rpartition(".")
    return getattr(import_module(module), name)


def _fill(part: Any, known: dict[str, Any]) -> None:
    arguments: Any = part.get("init_args") if isinstance(part, Namespace) else None
    for name, value in vars(arguments).items() if isinstance(arguments, Namespace) else ():
        if value is None and name in known:
            arguments[name] = known[name]
        _fill(value, known)
