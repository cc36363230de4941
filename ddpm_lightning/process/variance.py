"""Variances of the reverse steps p(x_s | x_t). Named by what they are; all return natural logarithms of variances."""

from torch import Tensor

from ddpm_lightning.schedules import Schedule

__all__ = ["FixedLargeVariance", "FixedSmallVariance", "ReverseVariance"]


class ReverseVariance:
    """log sigma_p^2 of the reverse step from t to s."""

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor) -> Tensor:
        """For 0 < s < t, shape of ``s`` and ``t``, float64."""
        raise NotImplementedError

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor) -> Tensor:
        """For the decoder, which stands between the chain's first state (time ``t1``) and the data."""
        raise NotImplementedError


class FixedLargeVariance(ReverseVariance):
    """beta_t: the variance of q(x_t | x_s); right for data ~ N(0, I) (Ho et al. 2020, section 3.2)."""

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor) -> Tensor:
        """log sigma^2_{t|s}."""
        return schedule.log_step_var(s, t)

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor) -> Tensor:
        """log beta_1."""
        return schedule.log_sigma2(t1)


class FixedSmallVariance(ReverseVariance):
    """beta-tilde_t: the variance of q(x_s | x_t, x_0); right for data at one point (Ho et al. 2020, section 3.2)."""

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor) -> Tensor:
        """log of sigma_s^2 (1 - SNR(t)/SNR(s))."""
        return schedule.log_posterior_var(s, t)

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor) -> Tensor:
        """beta-tilde_1 is 0, so beta-tilde_2 stands in for it (Nichol & Dhariwal 2021)."""
        return schedule.log_posterior_var(t1, t2)
