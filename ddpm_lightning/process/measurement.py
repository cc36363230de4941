r"""Linear measurements of an image: :math:`y = A x_0 + \text{noise}`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, avg_pool2d, avg_pool3d, interpolate

from ddpm_lightning.errors import InputError, at_least, positive
from ddpm_lightning.ops import expand_mask, sum_per_image

__all__ = [
    "AverageOperator",
    "DenoisingOperator",
    "LinearMeasurement",
    "LinearOperator",
    "MaskOperator",
    "MatrixOperator",
]

_AVERAGES: dict[int, Callable[[Tensor, int], Tensor]] = {3: avg_pool1d, 4: avg_pool2d, 5: avg_pool3d}


class LinearOperator:
    r"""A. Subclasses define both methods; :math:`\langle A x, y \rangle = \langle x, A^T y \rangle` for all x and y."""

    def apply(self, x: Tensor) -> Tensor:
        """A x for images ``[B, C, *space]``: ``[B, ...]``."""
        raise NotImplementedError

    def adjoint(self, y: Tensor) -> Tensor:
        """:math:`A^T y`: ``[B, C, *space]``."""
        raise NotImplementedError


class DenoisingOperator(LinearOperator):
    """The whole image, as it is."""

    def apply(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y


class MaskOperator(LinearOperator):
    """The pixels where ``mask`` (shapes: ``ops.expand_mask``) is True; A x has the shape of x, with 0 elsewhere."""

    def __init__(self, mask: Tensor) -> None:
        self.mask = _kept(mask)

    def apply(self, x: Tensor) -> Tensor:
        return torch.where(expand_mask(self.mask, x), x, 0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.apply(y)


class AverageOperator(LinearOperator):
    """Averages of blocks of ``factor`` pixels along each of the one to three axes of space, squares for images.

    Each size of space is a multiple of ``factor`` (1 or more).
    """

    def __init__(self, factor: int) -> None:
        at_least(1, "the side of the squares that are averaged", factor=factor)
        self.factor = factor

    def apply(self, x: Tensor) -> Tensor:
        if x.ndim not in _AVERAGES:
            raise InputError(f"x of shape {list(x.shape)} must be [B, C, *space] with one to three axes of space")
        space = x.shape[2:]
        if any(size % self.factor for size in space):
            raise InputError(f"factor = {self.factor} does not divide images of {' x '.join(map(str, space))} pixels")
        return _AVERAGES[x.ndim](x, self.factor)

    def adjoint(self, y: Tensor) -> Tensor:
        return interpolate(y, scale_factor=float(self.factor), mode="nearest") / self.factor ** (y.ndim - 2)


class MatrixOperator(LinearOperator):
    """Any A, as a matrix ``[M, N]`` for images of ``shape`` ``(C, *space)`` with N values."""

    def __init__(self, matrix: Tensor, shape: tuple[int, ...]) -> None:
        if matrix.ndim != 2 or matrix.shape[1] != math.prod(shape):
            raise InputError(f"matrix has shape {list(matrix.shape)}: give [M, {math.prod(shape)}] for images {shape}")
        self.matrix, self.shape = _kept(matrix), tuple(shape)

    def apply(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix.to(x).T

    def adjoint(self, y: Tensor) -> Tensor:
        return (y @ self.matrix.to(y)).reshape(-1, *self.shape)


class LinearMeasurement:
    r"""What was measured: :math:`y = A x_0 + \text{noise}`, :math:`\text{noise} \sim N(0, \mathrm{noise\_var} \, I)`.

    Args:
        operator: A.
        y: ``[B, ...]``, or ``[1, ...]`` for one measurement of all images.
        noise_var: variance of the noise for each component of y, in the square of model range; positive.
    """

    def __init__(self, operator: LinearOperator, y: Tensor, noise_var: float) -> None:
        positive(
            "the variance of the measurement's noise. For pixels that are known exactly use ReplacementSampler, or a "
            "variance below that of rounding to levels",
            noise_var=noise_var,
        )
        self.operator, self.y, self.noise_var = operator, _kept(y), noise_var

    def residual(self, x0: Tensor) -> Tensor:
        """:math:`y - A x_0`, ``[B, ...]``."""
        expected = self.operator.apply(x0)
        if self.y.shape[1:] != expected.shape[1:] or self.y.shape[0] not in (1, expected.shape[0]):
            raise InputError(f"y has shape {list(self.y.shape)}, a measurement of these images {list(expected.shape)}")
        return self.y.to(expected) - expected

    def log_prob(self, x0: Tensor) -> Tensor:
        r""":math:`\log p(y | x_0)` up to a constant, ``[B]`` nats, float64."""
        return -0.5 * sum_per_image(self.residual(x0).square()) / self.noise_var


def _kept(values: Tensor) -> Tensor:
    """A copy that autograd may keep, even of a tensor that was made in inference mode."""
    with torch.inference_mode(False):
        return values.detach().clone()
