r"""Decoders p(x_0 | x_1): from the last Gaussian of the reverse process to the data's grey levels."""

import torch
from torch import Tensor
from torch.special import log_ndtr

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, log1mexp, sum_per_image

__all__ = ["Decoder", "DiscretizedGaussian", "PlainGaussian"]


class Decoder:
    """Turns the Gaussian N(x0-hat(x_1), sigma_1^2) into a distribution over data.

    Args:
        levels: number of grey levels of the data, 2..256; level k sits at 2 k / (levels - 1) - 1.

    Raises:
        InputError: levels outside 2..256.
    """

    is_density: bool
    """True where log_prob is a density on [-1, 1] rather than a probability of grey levels."""

    def __init__(self, levels: int) -> None:
        if not 2 <= levels <= 256:
            raise InputError(f"levels = {levels} must lie between 2 and 256: these decoders model grey levels")
        self.levels = levels

    @property
    def spacing(self) -> float:
        """Distance of neighbouring levels in model range."""
        return 2 / (self.levels - 1)

    def log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """log p(x_0 | x_1) in nats, float64 ``[B]``, for images ``[B, C, H, W]`` in model range."""
        raise NotImplementedError

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        """The most probable image, ``[B, C, H, W]`` in model range."""
        raise NotImplementedError

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        """One draw of an image, ``[B, C, H, W]`` in model range."""
        raise NotImplementedError


class DiscretizedGaussian(Decoder):
    """The Gaussian's mass in a bin of half a level to either side (Ho et al. 2020, equation 13).

    The bins of the lowest and of the highest level reach to infinity, so the probabilities of all levels sum to 1 for
    every mean and variance. Nothing is clamped: the logarithm of the mass is formed from log-cdfs.
    """

    is_density = False

    def level_log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """log P(level of x_0) for each pixel, ``[B, C, H, W]`` nats, float64."""
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
        """Sum of :meth:`level_log_prob` over pixels, ``[B]`` nats."""
        return sum_per_image(self.level_log_prob(x0, gaussian))

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        """The level nearest to the mean (its mass is the largest but for the end bins' tails)."""
        return self._nearest_level(gaussian.mean)

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        """A Gaussian draw moved to its bin's level: exactly the distribution of :meth:`level_log_prob`."""
        return self._nearest_level(gaussian.sample(generators))

    def _nearest_level(self, x: Tensor) -> Tensor:
        return self._level_index(x) * self.spacing - 1

    def _level_index(self, x: Tensor) -> Tensor:
        return ((x.clamp(-1, 1) + 1) / self.spacing).round()


class PlainGaussian(Decoder):
    """The Gaussian density itself. Its bound is one on a density over [-1, 1]^D, not on grey levels."""

    is_density = True

    def log_prob(self, x0: Tensor, gaussian: DiagonalGaussian) -> Tensor:
        """log density on [-1, 1]^D, ``[B]`` nats."""
        return gaussian.log_prob(x0)

    def mode(self, gaussian: DiagonalGaussian) -> Tensor:
        """The mean."""
        return gaussian.mean

    def sample(self, gaussian: DiagonalGaussian, generators: Generators = None) -> Tensor:
        """A Gaussian draw."""
        return gaussian.sample(generators)
