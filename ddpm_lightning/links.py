"""What a configuration leaves open about its network, and the data and the other parts say."""

from importlib import import_module
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule

__all__ = ["follow_data"]


def follow_data(model: Namespace, data: LightningDataModule) -> None:
    """Fill in, in place, arguments of the network and the encoder that are null, in the configuration of a model.

    ``channels`` are the data's, ``num_classes`` too where the model is class-conditional, and ``out_channels`` twice as
    many where the variance is learned. A network within a network is filled in, too. What is given stays; a network
    that has no such arguments is left as it is.
    """
    if "network" not in model:
        return
    channels = data.shape[0]  # type: ignore[attr-defined]  # checked
    module, _, name = model.variance.class_path.rpartition(".")
    outputs = getattr(import_module(module), name).network_outputs
    known = {"channels": channels}
    if outputs > 1:
        known["out_channels"] = outputs * channels
    if model.class_conditional:
        known["num_classes"] = getattr(data, "num_classes", None)
    _fill(model.network, known)
    _fill(model.get("encoder"), {"channels": channels})


def _fill(part: Any, known: dict[str, Any]) -> None:
    arguments: Any = part.get("init_args") if isinstance(part, Namespace) else None
    for name, value in vars(arguments).items() if isinstance(arguments, Namespace) else ():
        if value is None and name in known:
            arguments[name] = known[name]
        _fill(value, known)
