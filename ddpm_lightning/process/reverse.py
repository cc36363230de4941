"""The learned reverse process p: Gaussian steps and a decoder at the end."""

from typing import Any

from torch import Tensor

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.ops import as_times, expand_to
from ddpm_lightning.process.denoiser import Denoiser
from ddpm_lightning.process.forward import ForwardProcess
from ddpm_lightning.process.parameterization import Prediction
from ddpm_lightning.process.variance import ReverseVariance

__all__ = ["ReverseProcess"]


class ReverseProcess:
    """p(x_s | x_t): the posterior q(x_s | x_t, x_0) at the denoiser's x_0, with a variance of its own.

    Args:
        denoiser: predicts x_0.
        forward_process: gives the posterior's mean.
        variance: the variance of each step.
    """

    def __init__(self, denoiser: Denoiser, forward_process: ForwardProcess, variance: ReverseVariance) -> None:
        self.denoiser = denoiser
        self.forward_process = forward_process
        self.variance = variance

    def transition(self, x_t: Tensor, s: Tensor, t: Tensor, **cond: Any) -> DiagonalGaussian:
        """p(x_s | x_t) for 0 < s < t; ``x_t`` ``[B, C, H, W]``, times ``[B]`` or ``[]``."""
        return self.transition_from(self.denoiser(x_t, t, **cond), x_t, s, t)

    def transition_from(self, prediction: Prediction, x_t: Tensor, s: Tensor, t: Tensor) -> DiagonalGaussian:
        """:meth:`transition` for a prediction at (x_t, t) that is already there."""
        mean = self.forward_process.posterior_mean(prediction.x0, x_t, s, t)
        schedule = self.forward_process.schedule
        log_var = self.variance.log_var(schedule, as_times(s, x_t), as_times(t, x_t), prediction)
        return DiagonalGaussian(mean, expand_to(log_var, x_t))

    def decoder_gaussian(self, x1: Tensor, t1: Tensor, t2: Tensor, **cond: Any) -> DiagonalGaussian:
        """The Gaussian that the decoder starts from: N(x0-hat(x_1), sigma_1^2); ``t1``, ``t2`` are the first times."""
        return self.decoder_gaussian_from(self.denoiser(x1, t1, **cond), x1, t1, t2)

    def decoder_gaussian_from(self, prediction: Prediction, x1: Tensor, t1: Tensor, t2: Tensor) -> DiagonalGaussian:
        """:meth:`decoder_gaussian` for a prediction at (x_1, t1) that is already there."""
        schedule = self.forward_process.schedule
        log_var = self.variance.decoder_log_var(schedule, as_times(t1, x1), as_times(t2, x1), prediction)
        return DiagonalGaussian(prediction.x0, expand_to(log_var, x1))
