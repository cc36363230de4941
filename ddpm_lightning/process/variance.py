"""Variances of the reverse steps p(x_s | x_t), as natural logarithms."""

import math
from itertools import pairwise

import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import DeviceTable, expand_to
from ddpm_lightning.process.parameterization import Prediction
from ddpm_lightning.schedules import Schedule

__all__ = ["AnalyticVariance", "FixedLargeVariance", "FixedSmallVariance", "LearnedRangeVariance", "ReverseVariance"]


class ReverseVariance:
    r""":math:`\log \sigma_p^2` of the reverse step from t to s.

    Both methods return float64: the shape of the times for one variance an image, ``[B, C, *space]`` for one a pixel.
    """

    network_outputs: int = 1
    """How many images' worth of channels the network must return: 1, or 2 where the second is ``variance_output``."""
    min_T: int = 1
    """The smallest number of states of a chain that this variance is defined for."""
    needs_plain_process: bool = False
    """True where it is derived for a model that ``has_plain_process``."""

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        """For 0 < s < t, with the prediction at t."""
        raise NotImplementedError

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor, prediction: Prediction) -> Tensor:
        """For the decoder, which stands between the chain's first state (time ``t1``) and the data."""
        raise NotImplementedError


class FixedLargeVariance(ReverseVariance):
    r""":math:`\beta_t`: the variance of :math:`q(x_t | x_s)`; right for data ~ N(0, I) (Ho et al. 2020, section
    3.2)."""

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        return schedule.log_step_var(s, t)

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor, prediction: Prediction) -> Tensor:
        return schedule.log_sigma2(t1)


class FixedSmallVariance(ReverseVariance):
    r""":math:`\tilde\beta_t`: the variance of :math:`q(x_s | x_t, x_0)`; right for data at one point (Ho et al. 2020,
    section 3.2)."""

    min_T = 2

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        return schedule.log_posterior_var(s, t)

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor, prediction: Prediction) -> Tensor:
        r""":math:`\tilde\beta_1` is 0, so :math:`\tilde\beta_2` stands in for it (Nichol & Dhariwal 2021).

        In continuous time the first state does not move when T grows, and :math:`\tilde\beta_2` goes to 0 as 1/T. There
        take ``CategoricalDecoder``, which needs no variance, or few steps."""
        return schedule.log_posterior_var(t1, t2)


class LearnedRangeVariance(ReverseVariance):
    r"""Between :math:`\tilde\beta_t` and :math:`\beta_t` of the step that is taken, pixel by pixel, as the network says
    (Nichol & Dhariwal 2021, arXiv 2102.09672, equation 15):

    .. math::

        \log \sigma_p^2 = v \log \beta_t + (1 - v) \log \tilde\beta_t, \quad v = (\mathrm{variance\_output} + 1) / 2

    v is not held to [0, 1]. HybridObjective and NegativeElbo train it.
    """

    network_outputs = 2
    min_T = 2

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        return self._between(schedule.log_posterior_var(s, t), schedule.log_step_var(s, t), prediction)

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor, prediction: Prediction) -> Tensor:
        return self._between(schedule.log_posterior_var(t1, t2), schedule.log_sigma2(t1), prediction)

    @staticmethod
    def _between(small: Tensor, large: Tensor, prediction: Prediction) -> Tensor:
        if prediction.variance_output is None:
            raise ValueError("LearnedRangeVariance needs a denoiser that gives variance_output")
        fraction = (prediction.variance_output.double() + 1) / 2
        small, large = expand_to(small, fraction), expand_to(large, fraction)
        return fraction * large + (1 - fraction) * small


class AnalyticVariance(ReverseVariance):
    r"""The best variance that is one number for a step, from the measured error of the denoiser.

    By the law of total variance the expected :math:`\mathrm{KL}(q(x_s|x_t, x_0) \| p(x_s|x_t))` is smallest, for *any*
    denoiser, at

    .. math:: \sigma_p^2 = \tilde\beta + c_0^2 \, E|x_0 - \hat x_0(x_t)|^2 / D

    with c_0 the weight of x_0 in the posterior's mean and D the number of dimensions. Since
    :math:`E|x_0 - \hat x_0|^2 = e^\gamma E|\epsilon - \hat\epsilon|^2`, one function of the noise level is enough:

    .. math:: \mathrm{eps\_mse}(\gamma) = E|\epsilon - \hat\epsilon|^2 / D

    For the optimal denoiser it is :math:`1 - \sigma_t^2 E|\text{score}|^2 / D`, and the variance is that of
    Analytic-DPM (Bao et al. 2022, arXiv 2201.06503, theorem 1).

    The decoder's variance, :math:`E|x_0 - \hat x_0(x_1)|^2 / D`, maximises the expected Gaussian density. For the
    discretised Gaussian another variance can be better: its end bins are open, and its bins may be wider than the
    Gaussian.

    The table serves any number of steps and any schedule. Between its entries log eps_mse is linear in gamma, beyond
    them constant. ``ddpm evaluate variance`` measures it.

    Args:
        gammas: noise levels gamma = -log SNR, increasing.
        eps_mse: mean squared error of the predicted eps for a dimension at each gamma, positive.
    """

    needs_plain_process = True

    def __init__(self, gammas: list[float], eps_mse: list[float]) -> None:
        if len(gammas) != len(eps_mse) or not gammas:
            raise InputError(
                f"gammas has {len(gammas)} entries and eps_mse has {len(eps_mse)}: give one error for each noise "
                "level, and at least one"
            )
        if not all(map(math.isfinite, gammas)) or not all(a < b for a, b in pairwise(gammas)):
            raise InputError("gammas must be finite and increase: sort the table by gamma")
        if not all(math.isfinite(value) and value > 0 for value in eps_mse):
            raise InputError("eps_mse must be finite and above 0: each is a mean squared error")
        self.gammas, self.eps_mse = list(gammas), list(eps_mse)
        # one more point beyond each end, so that the lines through the end points are constant and one point is enough
        points = [gammas[0] - 1, *gammas, gammas[-1] + 1], [eps_mse[0], *eps_mse, eps_mse[-1]]
        knots = torch.tensor(points, dtype=torch.float64, device="cpu")
        self._table = DeviceTable(torch.stack([knots[0], knots[1].log()]))

    def log_eps_mse(self, gamma: Tensor) -> Tensor:
        knots, values = self._table.on(gamma.device)
        upper = torch.searchsorted(knots, gamma.double()).clamp(1, len(knots) - 1)
        # take, since indexing with a scalar tensor would wait for the device
        low, high = torch.take(knots, upper - 1), torch.take(knots, upper)
        fraction = (gamma.double() - low) / (high - low)
        return torch.lerp(torch.take(values, upper - 1), torch.take(values, upper), fraction)

    def _log_x0_mse(self, schedule: Schedule, t: Tensor) -> Tensor:
        gamma = schedule.gamma(t)
        return gamma + self.log_eps_mse(gamma)

    def log_var(self, schedule: Schedule, s: Tensor, t: Tensor, prediction: Prediction) -> Tensor:
        log_weight_x0 = schedule.log_step_fraction(s, t) + schedule.log_alpha(s)
        explained = 2 * log_weight_x0 + self._log_x0_mse(schedule, t)
        return torch.logaddexp(schedule.log_posterior_var(s, t), explained)

    def decoder_log_var(self, schedule: Schedule, t1: Tensor, t2: Tensor, prediction: Prediction) -> Tensor:
        return self._log_x0_mse(schedule, t1)
