r"""A noise schedule is one function, :math:`\gamma(t) = -\log \mathrm{SNR}(t)`, increasing in t on [0, 1].

With :math:`\mathrm{SNR} = \alpha^2 / \sigma^2` and variance preservation (:math:`\alpha^2 + \sigma^2 = 1`):

.. math:: \alpha^2 = \mathrm{sigmoid}(-\gamma), \qquad \sigma^2 = \mathrm{sigmoid}(\gamma)

and a step s -> t (s < t) follows from differences of gamma alone (Kingma et al. 2021, arXiv 2107.00630, appendix A):

.. math::

    r &= \mathrm{SNR}(t) / \mathrm{SNR}(s) = e^{\gamma_s - \gamma_t} \\
    \alpha_{t|s} &= \alpha_t / \alpha_s \\
    \sigma^2_{t|s} &= \sigma_t^2 (1 - r) \\
    q(x_s | x_t, x_0) &= N\left( r \tfrac{\alpha_s}{\alpha_t} x_t + (1 - r) \alpha_s x_0, \; \sigma_s^2 (1 - r) \right)

Variance exploding (:math:`\alpha = 1, \sigma^2 = e^\gamma`) is the same process in other units of x, and the step
formulas hold for it as they stand: a schedule of that kind defines alpha, sigma and ``log_unit_var`` anew.

With one gamma for each pixel (:class:`~ddpm_lightning.schedules.PixelwiseGamma`) all of this holds pixel by pixel.

gamma(0) may be -inf (a clean image): every formula above stays finite there. All of it is computed in float64.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from ddpm_lightning.ops import expand_to, log1mexp

__all__ = ["Schedule"]


class Schedule(nn.Module):
    """Base of all schedules. Subclasses define :meth:`gamma` and ``T``; everything else follows.

    Times ``t``, ``s`` are float64 tensors of any shape with values in [0, 1]; results have the same shape, float64.
    Where pixels have a gamma of their own, times are ``[n]`` or ``[]``, and results ``[n, C, *space]`` or
    ``[1, C, *space]``.
    """

    T: int
    """Number of states x_1, ..., x_T of the discrete chain that the schedule stands for."""

    @property
    def is_learned(self) -> bool:
        """True where gamma has parameters."""
        return any(True for _ in self.parameters())

    @property
    def pixel_shape(self) -> tuple[int, ...] | None:
        """``(C, *space)`` where each pixel has a gamma of its own; None for one gamma for an image."""
        return None

    @property
    def preserves_variance(self) -> bool:
        r"""True where :math:`\alpha^2 + \sigma^2 = 1`: for every schedule that does not define ``log_unit_var``
        anew."""
        return type(self).log_unit_var is Schedule.log_unit_var

    def grid(self, T: int | None = None) -> Tensor:
        """Times of the data and of T states (None: the schedule's own number), up to t = 1, float64 ``[T + 1]``."""
        raise NotImplementedError

    def gamma_slope(self, t: Tensor) -> Tensor:
        r""":math:`d\gamma / dt`."""
        raise NotImplementedError

    def gamma(self, t: Tensor) -> Tensor:
        r""":math:`-\log \mathrm{SNR}(t)`, increasing in t."""
        raise NotImplementedError

    def mean_gamma(self, t: Tensor) -> Tensor:
        """gamma(t), averaged over pixels that have a gamma of their own: always in the shape of ``t``."""
        gamma = self.gamma(t)
        return gamma if self.pixel_shape is None else gamma.flatten(1).mean(1).reshape(t.shape)

    def log_alpha(self, t: Tensor) -> Tensor:
        r""":math:`\log \alpha_t`, the signal's scale; :math:`\alpha_t^2` is :math:`\bar\alpha_t` of Ho et al. 2020."""
        return 0.5 * logsigmoid(-self.gamma(t))

    def log_sigma2(self, t: Tensor) -> Tensor:
        r""":math:`\log \sigma_t^2`, the noise variance (-inf at a clean t = 0)."""
        return logsigmoid(self.gamma(t))

    def log_unit_var(self, t: Tensor) -> Tensor:
        r""":math:`\log(\alpha_t^2 + \sigma_t^2)`: the log variance of x_t for data of variance 1, and at t = 1 of the
        prior p(x_T).

        It is 0 for variance preservation. The network's input is divided by this standard deviation.
        """
        return torch.zeros_like(t, dtype=torch.float64)

    def held_interior(self) -> AbstractContextManager[None]:
        """A context in which gradients reach gamma's end points but not its shape between them."""
        return nullcontext()

    def slope_ratio(self, t: Tensor) -> Tensor | None:
        r""":math:`d\gamma/dt` at the fixed :math:`\gamma(t)`, divided by its own value; None where the shape of gamma
        is not learned.

        Its value is 1. Its gradient is the gradient in the shape of gamma, so ``L(t)^2 slope_ratio(t)`` has the
        gradient of the second moment of an estimator L drawn at uniform t.
        """
        return None

    def alpha(self, t: Tensor) -> Tensor:
        r"""Scale of the signal in :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`."""
        return torch.exp(self.log_alpha(t))

    def sigma(self, t: Tensor) -> Tensor:
        r"""Standard deviation of the noise in :math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`."""
        return torch.exp(0.5 * self.log_sigma2(t))

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t of times ``[B]`` or ``[]`` as they meet images: ``[B, 1, ...]``, or ``[B, C, *space]``
        where pixels have a gamma of their own; dtype of ``like``."""
        return expand_to(self.alpha(t), like).to(like.dtype), expand_to(self.sigma(t), like).to(like.dtype)

    def log_step_fraction(self, s: Tensor, t: Tensor) -> Tensor:
        r""":math:`\log(1 - r)` with :math:`r = \mathrm{SNR}(t) / \mathrm{SNR}(s)`: the part of :math:`\sigma_t^2` that
        the step s -> t adds."""
        return log1mexp(self.gamma(t) - self.gamma(s))

    def log_step_var(self, s: Tensor, t: Tensor) -> Tensor:
        r""":math:`\log \sigma^2_{t|s}`, the variance of :math:`q(x_t | x_s)`: :math:`\log \beta_t` on the chain's own
        grid."""
        return self.log_sigma2(t) + self.log_step_fraction(s, t)

    def log_posterior_var(self, s: Tensor, t: Tensor) -> Tensor:
        r"""Log variance of :math:`q(x_s | x_t, x_0)`: :math:`\log \tilde\beta_t` on the chain's own grid (-inf
        at s = 0)."""
        return self.log_sigma2(s) + self.log_step_fraction(s, t)
