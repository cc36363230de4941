import math
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ddpm_lightning.networks.arguments import at_least
from ddpm_lightning.networks.unet import UNet

__all__ = ["LevelsUNet"]


class LevelsUNet(UNet):
    r"""A U-Net that returns a logit for each grey level of each pixel: (x ``[B, C, *space]``, t ``[B]``) to ``[B, C
    levels, *space]``, the levels of one channel after another. All are 0 at first.

    .. math:: \ell_{ik} = \sum_{j=1}^{\text{rank}} o_{ij} \, \phi_j(k) + b_k(\text{histogram of } x, t)

    The U-Net gives each pixel i a few numbers o, the coefficients of smooth functions of the level k (cosines) and of
    peaks at the lowest and the highest level. What the pixels of an image share is in b, from a perceptron of the
    image's histogram: an image that was resampled has greys of its own, and saturated pixels of one value.

    For :class:`~ddpm_lightning.process.CategoricalParameterization`.

    Args:
        channels: C; None for 1. On the command line None is the data's number, and so for ``levels``.
        levels: number of grey levels; None for 256.
        rank: number of functions of the level, at least 3; as many as there are levels can give any distribution.
        context: width of the perceptron; 0 for none, and b = 0.
        width: and all that follow: see :class:`UNet`.
    """

    def __init__(
        self,
        channels: int | None = None,
        levels: int | None = None,
        rank: int = 24,
        context: int = 256,
        width: int = 32,
        multipliers: Sequence[int] = (1, 2, 2),
        blocks: int | Sequence[int] = 2,
        attention: Sequence[int] = (),
        heads: int = 1,
        dropout: float = 0.0,
        num_classes: int | None = None,
        time_scale: float = 1000.0,
        fourier: Sequence[float] = (),
        dims: int | None = None,
        padding: Literal["zeros", "circular"] = "zeros",
        vector_size: int | None = None,
        field_channels: int | None = None,
        vector_scale: Mapping[str, Sequence[float]] | None = None,
        patch: int = 1,
    ) -> None:
        colours, levels = channels or 1, 256 if levels is None else levels
        at_least(2, levels=levels)
        at_least(3, rank=rank)
        at_least(0, context=context)
        functions = min(rank, levels)
        super().__init__(
            channels, width, multipliers, blocks, attention, heads, dropout, num_classes, functions * colours,
            time_scale, fourier, dims, padding, vector_size, field_channels, vector_scale,
            patch,
        )  # fmt: skip
        self.levels, self.rank, self.context = levels, rank, context
        k = torch.arange(levels)
        peaks = [(k == end).float() for end in (0, levels - 1)]
        cosines = [torch.cos(math.pi * j * (k + 0.5) / levels) for j in range(1, functions - 1)]
        self.register_buffer("_functions", torch.stack(peaks + cosines), persistent=False)
        self.shared: nn.ModuleDict | None = None
        if context:
            values = colours * levels
            self.shared = nn.ModuleDict(
                {
                    "histogram": nn.Linear(values, context),
                    "embedding": nn.Linear(4 * width, context),
                    "out": nn.Linear(context, values),
                }
            )
            for parameter in self.shared["out"].parameters():
                nn.init.zeros_(parameter)

    def _output(self, h: Tensor, x: Tensor, embedding: Tensor) -> Tensor:
        # products with a constant matrix, in float32 at least: the logits of 256 levels need more than 8 bits
        coefficients = h.unflatten(1, (x.shape[1], -1))
        with torch.autocast(x.device.type, enabled=False):
            functions = self.get_buffer("_functions").to(torch.promote_types(coefficients.dtype, torch.float32))
            coefficients = coefficients.to(functions.dtype)
            logits = coefficients.movedim(2, -1) @ functions
        if self.shared is not None:
            counts = ((self._histogram(x) + 0.05).log() + 1).to(x.dtype)
            hidden = self.shared["histogram"](counts)
            common = self.shared["out"](silu(hidden + self.shared["embedding"](embedding)))
            logits = logits + common.view(*x.shape[:2], *(1,) * (x.ndim - 2), -1).to(logits.dtype)
        return logits.movedim(-1, 2).flatten(1, 2)

    def _histogram(self, x: Tensor) -> Tensor:
        """Pixels at each level, ``[B, C levels]``; one between two levels counts for both, by its distances."""
        fine = x.flatten(2).to(torch.promote_types(x.dtype, torch.float32))
        place = (fine.clamp(-1, 1) + 1) * (0.5 * (self.levels - 1))
        # NaN has no place; by its share it reaches the output all the same
        below = place.floor().nan_to_num().clamp(max=self.levels - 2)
        share, below = place - below, below.long()
        counts = place.new_zeros(*place.shape[:2], self.levels)
        return counts.scatter_add(2, below, 1 - share).scatter_add(2, below + 1, share).flatten(1)
