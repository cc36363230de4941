"""The network alone, as a graph that runs without this package: ONNX, and torch.export."""

from pathlib import Path

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel

__all__ = ["export_onnx", "export_program", "network_inputs"]


def network_inputs(shape: tuple[int, ...], num_classes: int | None) -> dict[str, Tensor]:
    """What the graphs are traced with: ``x`` float32 ``[2, C, H, W]``, ``t`` ``[2]``, and ``label`` int64 ``[2]``."""
    inputs = {"x": torch.zeros(2, *shape), "t": torch.full((2,), 0.5)}
    return inputs if num_classes is None else {**inputs, "label": torch.zeros(2, dtype=torch.long)}


class _Positional(torch.nn.Module):
    """The network with its label as third argument, for formats that know no others."""

    def __init__(self, network: torch.nn.Module) -> None:
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
    inputs = network_inputs(shape, num_classes)
    batch = torch.export.Dim("batch", min=1)
    shapes = {name: {0: batch} for name in inputs}
    program = torch.export.export(_Positional(model.network).eval(), tuple(inputs.values()), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
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
    inputs = network_inputs(shape, num_classes)
    batch = torch.export.Dim("batch", min=1)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        _Positional(model.network).eval(),
        tuple(inputs.values()),
        str(path),
        dynamo=True,
        input_names=list(inputs),
        output_names=["output"],
        dynamic_shapes={name: {0: batch} for name in inputs},
        external_data=False,
        verbose=False,
    )
