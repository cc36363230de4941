"""Convolutions from one grid to another, for the levels of a hierarchy: a stack of residual blocks without time."""

from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from ddpm_lightning.networks.arguments import at_least
from ddpm_lightning.networks.unet import _group_norm, _zeroed

__all__ = ["ResidualStack"]


class ResidualStack(nn.Module):
    """``[B, inputs, H, W]`` to ``[B, outputs, H', W']``, 0 at first. The blocks work at the smaller of the two sizes.

    Args:
        inputs: channels of the input.
        outputs: channels of the output.
        width: channels of the blocks.
        blocks: number of residual blocks.
        factor: by which the size falls (from H to H / factor) or, with ``up``, grows.
        up: whether it grows.
    """

    def __init__(self, inputs: int, outputs: int, width: int, blocks: int, factor: int = 1, up: bool = False) -> None:
        super().__init__()
        at_least(1, inputs=inputs, outputs=outputs, width=width, factor=factor)
        at_least(0, blocks=blocks)
        self.factor, self.up = factor, up
        kernel = 3 if factor == 1 or up else 2 * factor - 1
        stride = 1 if up else factor
        self.stem = nn.Conv2d(inputs, width, kernel, stride=stride, padding=kernel // 2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                _group_norm(width),
                nn.SiLU(),
                nn.Conv2d(width, width, 3, padding=1),
                _group_norm(width),
                nn.SiLU(),
                _zeroed(nn.Conv2d(width, width, 3, padding=1)),
            )
            for _ in range(blocks)
        )
        self.norm = _group_norm(width)
        self.head = _zeroed(nn.Conv2d(width, outputs, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.stem(x)
        for block in self.blocks:
            h = h + block(h)
        h = silu(self.norm(h))
        if self.up and self.factor > 1:
            h = interpolate(h, scale_factor=float(self.factor), mode="nearest")
        output: Tensor = self.head(h)
        return output.to(x.dtype)
