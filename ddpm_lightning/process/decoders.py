"""Decoders p(x_0 | x_1): from the last Gaussian of the reverse process to the data's grey levels."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.special import log_ndtr

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, log1mexp, randn_like, sum_per_image

__all__ = ["CategoricalDecoder", "Decoder", "DiscretizedGaussian", "PlainGaussian"]


class Decoder:
    r"""Turns a Gaussian over x_0, :math:`N(\hat x_0(x_1), \sigma_1^2)` in general, into a distribution over data.

    Args:
        levels: number of grey levels of the data, 2..256; level k sits at 2 k / (levels - 1) - 1.
    """

    uses_denoiser = True
    """False where the Gaussian is q(x_1 | x_0) read as a function of x_0, without the network."""
    is_density: bool
    """True where log_prob is a density on [-1, 1] rather than a probability of grey levels."""

    def __init__(self, levels: int) -> None:
        if levels is None:
            raise InputError(f"{type(self).__name__} is for grey levels, and fields have none: use PlainGaussian")
        if not 2 <= levels <= 256:
            raise InputError(f"levels = {levels} must lie between 2 and 256: these decoders model grey levels")
        self.levels = levels

    @property
    def spacing(self) -> float:
        """Distance of neighbouring levels in model range."""
        return 2 / (self.levels - 1)

    def _level_index(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) / self.spacing).round()

    def _nearest_level(self, x: Tensor) -> Tensor:
        return self._level_index(x) * self.spacing - 1

    def log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        r""":math:`\log p(x_0 | x_1)` in nats, float64 ``[B]``."""
        raise NotImplementedError

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        """The most probable image, ``[B, C, *space]`` in model range."""
        raise NotImplementedError

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        """One draw of an image, ``[B, C, *space]`` in model range."""
        raise NotImplementedError


class DiscretizedGaussian(Decoder):
    """The Gaussian's mass in a bin of half a level to either side (Ho et al. 2020, equation 13).

    The bins of the lowest and of the highest level reach to infinity, so the probabilities of all levels sum to 1.
    Nothing is clamped: the logarithm of the mass is formed from log-cdfs.
    """

    is_density = False

    def level_log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """log P(level of x_0) for each pixel, ``[B, C, *space]`` nats, float64."""
        # edges from the level's index, in float64: neighbouring bins then share an edge, whatever x0's dtype
        index = self._level_index(x0).double()
        centred = index * self.spacing - 1 - gaussian.mean
        inverse_std = torch.exp(-0.5 * gaussian.log_var)
        upper = (centred + 0.5 * self.spacing) * inverse_std
        lower = (centred - 0.5 * self.spacing) * inverse_std
        below_upper, above_lower = log_ndtr(upper), log_ndtr(-lower)
        # P(lower < z < upper) is symmetric under (lower, upper) -> (-upper, -lower): take the difference in the left
        # tail, where the logarithms of both cdfs keep their precision
        right = lower > 0
        larger = torch.where(right, above_lower, below_upper)
        smaller = torch.where(right, log_ndtr(-upper), log_ndtr(lower))
        inner = larger + log1mexp(larger - smaller)
        return torch.where(index == 0, below_upper, torch.where(index == self.levels - 1, above_lower, inner))

    def log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        return sum_per_image(self.level_log_prob(x0, gaussian))

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        """The level nearest to the mean. Its mass is the largest, but for the tails of the end bins."""
        return self._nearest_level(gaussian.mean)

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        return self._nearest_level(gaussian.sample(generators))


class CategoricalDecoder(Decoder):
    r"""q(x_1 | x_0) over the levels of each pixel, normalised (Kingma et al. 2021, arXiv 2107.00630, section 3.3).

    .. math:: p(x_0 | x_1) = \prod_i \frac{q(x_{1,i} | x_{0,i})}{\sum_k q(x_{1,i} | \text{level } k)}

    The network has no part in this: it is the exact posterior of independent pixels with equally likely levels. It is
    good where the first state is so clean that each level can be told from the next.
    """

    uses_denoiser = False
    is_density = False
    _images_at_once = 8

    def _logits(self, gaussian: DiagonalGaussian) -> Tensor:
        """log density at each level less that at the nearest one, ``[B, C, *space, levels]``."""
        mean = gaussian.mean
        nearest = self._level_index(mean)
        levels = torch.arange(self.levels, dtype=mean.dtype, device=mean.device)
        # (m - l_k)^2 - (m - l_n)^2 = d (d + 2 (m - l_n)) with d = l_n - l_k: no difference of large numbers
        d = (nearest[..., None] - levels) * self.spacing
        excess = d * (d + 2 * (mean - (nearest * self.spacing - 1))[..., None])
        return -0.5 * excess * torch.exp(-gaussian.log_var).to(mean.dtype)[..., None]

    def level_log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """log P(level of x_0) for each pixel, ``[B, C, *space]`` nats."""
        index = self._level_index(x0).long()[..., None]
        logits = self._logits(gaussian)
        return (logits.gather(-1, index) - logits.logsumexp(-1, keepdim=True)).squeeze(-1)

    def log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        return torch.cat([sum_per_image(self.level_log_prob(x, part)) for x, part in self._parts(x0, gaussian)])

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        return self._nearest_level(gaussian.mean)

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        uniform = torch.special.ndtr(randn_like(gaussian.mean, generators))
        index = torch.cat([self._inverse_cdf(u, part) for u, part in self._parts(uniform, gaussian)])
        return index * self.spacing - 1

    def _parts(self, values: Tensor, gaussian: DiagonalGaussian) -> Iterator[tuple[Tensor, DiagonalGaussian]]:
        """A few images at once, since their logits are ``levels`` times as large as they are."""
        log_var = gaussian.log_var.expand(len(values), *gaussian.log_var.shape[1:])
        for v, *part in zip(*(x.split(self._images_at_once) for x in (values, gaussian.mean, log_var)), strict=True):
            yield v, DiagonalGaussian(*part)

    def _inverse_cdf(self, uniform: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        cdf = self._logits(gaussian).softmax(-1).cumsum(-1)[..., :-1]
        return (cdf < uniform[..., None]).sum(-1).to(uniform.dtype)


class PlainGaussian(Decoder):
    """The Gaussian density itself. Its bound is one on a density over the model's values, not on grey levels.

    Args:
        levels: number of grey levels of the data; None for fields.
    """

    is_density = True

    def __init__(self, levels: int | None = None) -> None:
        if levels is not None:
            super().__init__(levels)
        self.levels = levels  # type: ignore[assignment]  # a density needs none

    def log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        return gaussian.log_prob(x0)

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        return gaussian.mean

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        return gaussian.sample(generators)
