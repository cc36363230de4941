r"""The forward process q (Ho et al. 2020, equations 2, 4, 6, 7; any pair of times, after Kingma et al. 2021).

With an encoder :math:`m_t = m(x_0, t)` in the place of x_0 (Nielsen et al. 2023, DiffEnc, arXiv 2310.19789, section 3):

.. math::

    q(x_t | x_0) &= N(\alpha_t m_t, \; \sigma_t^2 I) \\
    q(x_t | x_s, x_0) &= N(\alpha_{t|s} x_s + \alpha_t (m_t - m_s), \; \sigma^2_{t|s} I) \\
    q(x_s | x_t, x_0) &= N\left( r \tfrac{\alpha_s}{\alpha_t} x_t + (1 - r) \alpha_s m_t + \alpha_s (m_s - m_t),
        \; \sigma_s^2 (1 - r) \right)

The identity, :math:`m_t = x_0`, makes the middle line :math:`q(x_t | x_s)`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import Generators, as_times, expand_to, randn_like
from ddpm_lightning.process.encoder import Encoder, IdentityEncoder
from ddpm_lightning.schedules import Schedule

__all__ = ["ForwardProcess"]


class ForwardProcess:
    """:math:`q(x_t | x_0)`, :math:`q(x_t | x_s, x_0)`, :math:`q(x_s | x_t, x_0)` and whole paths of them.

    Args:
        schedule: the noise schedule.
        encoder: m(x_0, t); None for the identity.
    """

    def __init__(self, schedule: Schedule, encoder: Encoder | None = None) -> None:
        self.schedule, self.encoder = schedule, IdentityEncoder() if encoder is None else encoder

    def marginal(self, x0: Tensor, t: Tensor) -> DiagonalGaussian:
        r""":math:`q(x_t | x_0) = N(\alpha_t m(x_0, t), \sigma_t^2 I)`."""
        t = as_times(t, x0)
        alpha_t = expand_to(self.schedule.alpha(t), x0).to(x0.dtype)
        return DiagonalGaussian(
            alpha_t * self.encoder(self.schedule, x0, t), expand_to(self.schedule.log_sigma2(t), x0)
        )

    def noised(self, x0: Tensor, t: Tensor, generators: Generators = None) -> tuple[Tensor, Tensor]:
        r"""A draw :math:`x_t = \alpha_t m(x_0, t) + \sigma_t \epsilon`, and its standard normal eps: ``[B, C, *space]``
        both."""
        eps = randn_like(x0, generators)
        marginal = self.marginal(x0, t)
        return marginal.mean + marginal.std * eps, eps

    def likelihood(self, x_t: Tensor, t: Tensor) -> DiagonalGaussian:
        r""":math:`q(x_t | x_0)` as a function of m(x_0, t), normalised:
        :math:`N(m; x_t / \alpha_t, \sigma_t^2 / \alpha_t^2 I)`."""
        t = as_times(t, x_t)
        inverse_alpha = torch.exp(-self.schedule.log_alpha(t))
        mean = expand_to(inverse_alpha, x_t).to(x_t.dtype) * x_t
        return DiagonalGaussian(mean, expand_to(self.schedule.gamma(t), x_t))

    def transition(self, x_s: Tensor, s: Tensor, t: Tensor, x0: Tensor | None = None) -> DiagonalGaussian:
        """:math:`q(x_t | x_s, x_0)`; from the time of the data this is the marginal. The identity encoder needs no x_0.

        Raises:
            InputError: no x_0 for an encoder that is not the identity.
        """
        s, t = as_times(s, x_s), as_times(t, x_s)
        ratio = torch.exp(self.schedule.log_alpha(t) - self.schedule.log_alpha(s))
        mean = expand_to(ratio, x_s).to(x_s.dtype) * x_s
        if not self.encoder.is_identity:
            if x0 is None:
                raise InputError(
                    f"q(x_t | x_s) is not known for {type(self.encoder).__name__}, whose process is Markov only given "
                    "x_0: give x0"
                )
            alpha_t = expand_to(self.schedule.alpha(t), x_s).to(x_s.dtype)
            mean = mean + alpha_t * (self.encoder(self.schedule, x0, t) - self.encoder(self.schedule, x0, s))
        return DiagonalGaussian(mean, expand_to(self.schedule.log_step_var(s, t), x_s))

    def posterior_mean(self, x0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Mean of :math:`q(x_s | x_t, x_0)` if ``x0`` ``[B, C, *space]`` stood for both m_t and m_s; x_0 itself where s
        is the time of the data."""
        s, t = as_times(s, x_t), as_times(t, x_t)
        fraction = torch.exp(self.schedule.log_step_fraction(s, t))
        log_alpha_s = self.schedule.log_alpha(s)
        weight_x0 = fraction * torch.exp(log_alpha_s)
        weight_x_t = (1 - fraction) * torch.exp(log_alpha_s - self.schedule.log_alpha(t))
        return expand_to(weight_x_t, x_t).to(x_t.dtype) * x_t + expand_to(weight_x0, x_t).to(x_t.dtype) * x0

    def posterior(self, x0: Tensor, x_t: Tensor, s: Tensor, t: Tensor) -> DiagonalGaussian:
        """:math:`q(x_s | x_t, x_0)` for s < t, s not the time of the data."""
        s, t = as_times(s, x_t), as_times(t, x_t)
        log_var = self.schedule.log_posterior_var(s, t)
        m_t = self.encoder(self.schedule, x0, t)
        mean = self.posterior_mean(m_t, x_t, s, t)
        if not self.encoder.is_identity:
            alpha_s = expand_to(self.schedule.alpha(s), x_t).to(x_t.dtype)
            mean = mean + alpha_s * (self.encoder(self.schedule, x0, s) - m_t)
        return DiagonalGaussian(mean, expand_to(log_var, x_t))

    def path(
        self, x: Tensor, times: Tensor, generators: Generators = None, start: Tensor | None = None
    ) -> Iterator[Tensor]:
        r"""A joint draw of :math:`q(x_{t_1}, \dots, x_{t_K} | x)`, one state after the other; one state is kept.

        ``times`` ``[K]`` increase strictly from above ``start``, the time of ``x``. None stands for data x_0, and is
        what an encoder that is not the identity needs.
        """
        x_t, s, x0 = x, start, x if start is None else None
        for t in times:
            step = self.marginal(x, t) if s is None else self.transition(x_t, s, t, x0)
            x_t, s = step.sample(generators), t
            yield x_t
