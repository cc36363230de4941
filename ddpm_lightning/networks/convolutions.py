"""Convolutions in one, two and three dimensions, by what they see beyond the edge."""

from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["CONVOLUTIONS"]


class _Periodic(nn.Module):
    """Mixed into a convolution: beyond an edge there is what lies at the other one.

    torch's own ``padding_mode="circular"`` gives the same numbers. It copies slices, whose gradients cost as much as
    the convolution.
    """

    def __init__(self, *sizes: int, padding: int = 0, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.margin = padding

    def forward(self, x: Tensor) -> Tensor:
        if self.margin:
            for dim in range(2, x.ndim):
                before, after = x.narrow(dim, -self.margin, self.margin), x.narrow(dim, 0, self.margin)
                x = torch.cat([before, x, after], dim)
        return super().forward(x)


class _Periodic1d(_Periodic, nn.Conv1d):
    """In one dimension."""


class _Periodic2d(_Periodic, nn.Conv2d):
    """In two."""


class _Periodic3d(_Periodic, nn.Conv3d):
    """In three."""


CONVOLUTIONS: dict[str, dict[int, type[nn.Module]]] = {
    "zeros": {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d},
    "circular": {1: _Periodic1d, 2: _Periodic2d, 3: _Periodic3d},
}
"""By padding and dimensions."""
