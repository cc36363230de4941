"""The network alone, as a graph that runs without this package: ONNX, and torch.export."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel

__all__ = ["export_onnx", "export_program", "network_inputs"]


def network_inputs(
    shape: tuple[int, ...],
    num_classes: int | None = None,
    vector_size: int | None = None,
    field_channels: int | None = None,
) -> dict[str, Tensor]:
    """What the graphs are traced with: ``x`` float32 ``[2, C, *space]``, ``t`` ``[2]``, and conditions of the given
    sizes: ``label`` int64 ``[2]``, ``vector`` ``[2, K]``, ``field`` ``[2, C', *space]``."""
    inputs = {"x": torch.zeros(2, *shape), "t": torch.full((2,), 0.5)}
    if num_classes is not None:
        inputs["label"] = torch.zeros(2, dtype=torch.long)
    if vector_size is not None:
        inputs["vector"] = torch.zeros(2, vector_size)
    if field_channels is not None:
        inputs["field"] = torch.zeros(2, field_channels, *shape[1:])
    return inputs


class _Positional(torch.nn.Module):
    """The network with its conditions by their places, for formats that know no others."""

    def __init__(self, network: torch.nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network, self.names = network, names

    def forward(self, x: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        output: Tensor = self.network(x, t, **dict(zip(self.names, conditions, strict=True)))
        return output


def _traced(model: DiffusionModel, inputs: dict[str, Tensor]) -> tuple[torch.nn.Module, Any]:
    """What is traced, and which of its inputs' sizes are free."""
    batch = {0: torch.export.Dim("batch", min=1)}
    names = [name for name in inputs if name not in ("x", "t")]
    conditions = [(batch,) * len(names)] if names else []
    return _Positional(model.network, names).eval(), (batch, batch, *conditions)


def export_program(
    model: DiffusionModel, path: Path, shape: tuple[int, ...], num_classes: int | None = None, **sizes: int
) -> torch.export.ExportedProgram:
    """Write the network as a torch.export program (.pt2), for any batch size.

    ``torch.export.load(path).module()`` is called as (x, t), and after them the conditions that there are, in the order
    label, vector, field. t is the scalar that the model's conditioning gives the network.

    Args:
        model: whose network.
        path: a .pt2 file.
        shape: ``(C, *space)`` of the data.
        num_classes: of a class-conditional network, which then takes a label.
        sizes: ``vector_size`` and ``field_channels`` of a network that takes a vector or a field.
    """
    inputs = network_inputs(shape, num_classes, **sizes)
    traced, shapes = _traced(model, inputs)
    program = torch.export.export(traced, tuple(inputs.values()), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    return program


def export_onnx(
    model: DiffusionModel, path: Path, shape: tuple[int, ...], num_classes: int | None = None, **sizes: int
) -> None:
    """Write the network as an ONNX graph with inputs ``x``, ``t`` (and ``label``, ``vector``, ``field``) and output
    ``output``.

    Arguments as in :func:`export_program`.

    Raises:
        InputError: the packages for it are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'ddpm-lightning[export]'") from None
    inputs = network_inputs(shape, num_classes, **sizes)
    traced, shapes = _traced(model, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        traced,
        tuple(inputs.values()),
        str(path),
        dynamo=True,
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes=shapes,
        external_data=False,
        verbose=False,
    )
