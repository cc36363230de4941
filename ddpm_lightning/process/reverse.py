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
    """The learned :math:`p(x_s | x_t)`: the posterior :math:`q(x_s | x_t, x_0)` at the denoiser's x_0, with a variance
    of its own.

    It knows no x_0, so it has no encoder. The denoiser's x0 stands for m_t and m_s both, and the network learns to make
    up for their difference."""

    def __init__(self, denoiser: Denoiser, forward_process: ForwardProcess, variance: ReverseVariance) -> None:
        self.denoiser, self.forward_process, self.variance = denoiser, forward_process, variance

    def transition(
        self, x_t: Tensor, s: Tensor, t: Tensor, prediction: Prediction | None = None, **cond: Any
    ) -> DiagonalGaussian:
        """:math:`p(x_s | x_t)` for 0 < s < t. ``prediction`` is the denoiser's at (x_t, t); None to make it."""
        prediction = self.denoiser(x_t, t, **cond) if prediction is None else prediction
        mean = self.forward_process.posterior_mean(prediction.x0, x_t, s, t)
        schedule = self.forward_process.schedule
        log_var = self.variance.log_var(schedule, as_times(s, x_t), as_times(t, x_t), prediction)
        return DiagonalGaussian(mean, expand_to(log_var, x_t))

    def decoder_gaussian(self, prediction: Prediction, x1: Tensor, t1: Tensor, t2: Tensor) -> DiagonalGaussian:
        r""":math:`N(\hat x_0(x_1), \sigma_1^2)`, from which the decoder starts. t1, t2: the first two times of the
        chain."""
        schedule = self.forward_process.schedule
        log_var = self.variance.decoder_log_var(schedule, as_times(t1, x1), as_times(t2, x1), prediction)
        return DiagonalGaussian(prediction.x0, expand_to(log_var, x1))
