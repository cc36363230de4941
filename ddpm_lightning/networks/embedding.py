r"""Sines and cosines: of a real scalar (Vaswani et al. 2017, arXiv 1706.03762, section 3.5), and of an image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpm_lightning.networks.arguments import positive

__all__ = ["FourierFeatures", "SinusoidalEmbedding"]


class SinusoidalEmbedding(nn.Module):
    r"""Cosines and sines of ``scale * t`` at ``dim / 2`` angular frequencies from 1 down to 1 / ``max_period``.

    With s = ``scale``, P = ``max_period`` and d = ``dim`` the features are

    .. math:: (\cos \omega_k s t, \; \sin \omega_k s t), \quad \omega_k = P^{-k / (d/2 - 1)}, \; k = 0, \dots, d/2 - 1

    With ``scale = 1000``, steps that are 1/1000 apart differ by a whole radian at the highest frequency. Each entry is
    in [-1, 1], so bfloat16 keeps neighbouring steps apart.

    Args:
        dim: number of features, even and at least 4.
        scale: factor on t, in radians at the highest frequency; positive.
        max_period: ratio of the highest to the lowest frequency, at least 1.
    """

    def __init__(self, dim: int, scale: float = 1000.0, max_period: float = 10_000.0) -> None:
        super().__init__()
        if dim < 4 or dim % 2:
            raise ValueError(f"dim = {dim} must be even and 4 or more")
        positive(scale=scale)
        if not max_period >= 1:
            raise ValueError(f"max_period = {max_period:g} must be 1 or more")
        self.dim, self.scale, self.max_period = dim, scale, max_period

    def forward(self, t: Tensor) -> Tensor:
        """Embed ``t`` ``[B]`` as ``[B, dim]``, in float32 or in float64 if ``t`` is float64."""
        # never below float32: bfloat16 has 8 bits, and 1000 t needs 10 of them before the point. For the same reason
        # the frequencies are no buffer: module.bfloat16() would round them
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        half = self.dim // 2
        k = torch.arange(half, dtype=t.dtype, device=t.device)
        frequencies = torch.exp(-math.log(self.max_period) / (half - 1) * k)
        angles = self.scale * t[:, None] * frequencies
        return torch.cat((angles.cos(), angles.sin()), dim=1)


class FourierFeatures(nn.Module):
    r"""An image with its own sines and cosines as further channels (Kingma et al. 2021, arXiv 2107.00630, section 3.4).

    .. math:: (x, \; \sin 2\pi f_1 x, \; \cos 2\pi f_1 x, \; \sin 2\pi f_2 x, \; \dots)

    Args:
        frequencies: f_1, f_2, ... in cycles per unit of x, positive; without any the image is returned as it is.

    Attributes:
        copies: channels of the output for each channel of the input, 1 + 2 len(frequencies).
    """

    def __init__(self, frequencies: Sequence[float] = ()) -> None:
        super().__init__()
        if not all(f > 0 for f in frequencies):
            raise ValueError(f"fourier = {list(frequencies)} must hold positive frequencies")
        self.frequencies = frequencies
        self.copies = 1 + 2 * len(frequencies)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, C, *space]`` to ``[B, copies C, *space]``, in the dtype of ``x``."""
        # the phase is formed in float32 at least, autocast or not: bfloat16 would round the noise itself away
        fine = x.to(torch.promote_types(x.dtype, torch.float32))
        waves = [wave(2 * math.pi * f * fine).to(x.dtype) for f in self.frequencies for wave in (torch.sin, torch.cos)]
        return torch.cat([x, *waves], dim=1) if waves else x
