"""Where the channels of an image lie in memory: all images of a channel apart (the default), or pixel by pixel."""

from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer

from ddpm_lightning.errors import InputError

__all__ = ["ChannelsLast", "set_memory_format", "state_like_parameters", "wants_channels_last"]

ChannelsLast = bool | Literal["auto"]


def wants_channels_last(option: ChannelsLast, network: nn.Module, precision: str, device: torch.device) -> bool:
    """What the option means for a network at a Trainer's precision ("bf16-mixed", ...) on a device.

    "auto" is what was measured to gain (docs/speed.md). In half precision it is channels_last for networks without
    GroupNorm: torch's GroupNorm loses in this format what convolutions gain, on a CPU and on a GPU. In float32 it is
    channels_last on a CPU, and the default on a GPU. Networks with three-dimensional convolutions keep the default.

    Raises:
        InputError: ``True`` for a network with three-dimensional convolutions.
    """
    # torch has this format for tensors of four dimensions only
    has_volumes = any(parameter.ndim == 5 for parameter in network.parameters())
    if option is True and has_volumes:
        raise InputError(
            "--model.channels_last true is for images, and this network convolves three-dimensional fields: use auto"
        )
    if option != "auto":
        return option
    if has_volumes:
        return False
    if precision.startswith(("bf16", "16")):
        normed = any(isinstance(part, nn.GroupNorm) for part in network.modules())
        return device.type in ("cpu", "cuda") and not normed
    return device.type == "cpu" and not precision.startswith("64")


def set_memory_format(network: nn.Module, channels_last: bool) -> None:
    """Lay out the weights of the convolutions, in place. Images follow: a convolution takes its format from either."""
    network.to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@torch.no_grad()
def state_like_parameters(optimizer: Optimizer) -> None:
    """Lay out an optimiser's state as its parameters.

    A state from a checkpoint has the layout of the run that wrote it, and fused optimisers go through the memory of
    parameter and state side by side, whatever the layouts: with two of them they would update the wrong weights.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if torch.is_tensor(value) and value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
