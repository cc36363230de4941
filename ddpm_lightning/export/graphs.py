"""The network alone, as a graph that runs without this package: ONNX, and torch.export."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel

__all__ = ["export_onnx", "export_program"]


def _traced(
    model: DiffusionModel, path: Path, shape: tuple[int, ...], num_classes: int | None
) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    """The network, the inputs that it is traced with, and which of their dimensions are free; a folder for the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    inputs = {"x": torch.zeros(2, *shape), "t": torch.full((2,), 0.5)}
    if num_classes is not None:
        inputs["label"] = torch.zeros(2, dtype=torch.long)
    batch = torch.export.Dim("batch", min=1)
    return _Positional(model.network).eval(), inputs, {name: {0: batch} for name in inputs}


class _Positional(nn.Module):
    """The network with its label as third argument, for formats that know no others."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        output: Tensor = self.network(x, t) if label is None else self.network(x, t, label=label)
        return output


def export_program(
    model: DiffusionModel, path: Path, shape: tuple[int, ...], num_classes: int | None = None
) -> torch.export.ExportedProgram:
    """Write the network as a torch.export program (.pt2), for any batch size.

    ``torch.export.load(path).module()`` is called as (x, t) or (x, t, label), where t is the scalar that the model's
    conditioning gives the network.

    Args:
        model: whose network.
        path: a .pt2 file.
        shape: (C, H, W) of the images.
        num_classes: of a class-conditional network, which then takes a label.
    """
    network, inputs, dynamic = _traced(model, path, shape, num_classes)
    program = torch.export.export(network, tuple(inputs.values()), dynamic_shapes=dynamic)
    torch.export.save(program, path)
    return program


def export_onnx(model: DiffusionModel, path: Path, shape: tuple[int, ...], num_classes: int | None = None) -> None:
    """Write the network as an ONNX graph with inputs ``x``, ``t`` (and ``label``) and output ``output``.

    Arguments as in :func:`export_program`.

    Raises:
        InputError: the packages for it are not installed.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install 'ddpm-lightning[export]'") from None
    network, inputs, dynamic = _traced(model, path, shape, num_classes)
    torch.onnx.export(
        network,
        tuple(inputs.values()),
        str(path),
        dynamo=True,
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes=dynamic,
        external_data=False,
        verbose=False,
    )
