"""Denoisers: (x_t, t) -> prediction of x_0 and eps. What changes a prediction wraps a denoiser in another one."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.ops import as_times, expand_to
from ddpm_lightning.process.conditioning import NoiseConditioning
from ddpm_lightning.process.parameterization import Parameterization, Prediction
from ddpm_lightning.schedules import Schedule

__all__ = ["ClippedDenoiser", "Denoiser", "NetworkDenoiser"]


class Denoiser:
    """Base of denoisers: a call gives the prediction at (x_t, t)."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        raise NotImplementedError

    def scales(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t as they meet ``x_t`` (``Schedule.scales``)."""
        return self.schedule.scales(as_times(t, x_t), x_t)


class NetworkDenoiser(Denoiser):
    r"""A network read through a parameterisation.

    The network sees :math:`x_t / \sqrt{\alpha_t^2 + \sigma_t^2}`, which is x_t itself where the schedule preserves
    variance.

    Args:
        network: called as ``network(x, c, **cond)`` with the scalar c of ``conditioning``; returns the channels that
            ``parameterization`` needs, and C more where ``outputs`` is 2.
        schedule: gives alpha_t and sigma_t.
        parameterization: meaning of the network's output.
        conditioning: the scalar that the network is given for t.
        outputs: 2 for a network whose last C channels belong to the reverse variance, else 1.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        conditioning: NoiseConditioning,
        outputs: int = 1,
    ) -> None:
        self.network, self.schedule, self.outputs = network, schedule, outputs
        self.parameterization, self.conditioning = parameterization, conditioning

    def under(self, schedule: Schedule) -> "NetworkDenoiser":
        """The same network, read under another schedule: right for one that is told gamma."""
        return NetworkDenoiser(self.network, schedule, self.parameterization, self.conditioning, self.outputs)

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        """Only the network runs in its own precision, the rest in the precision of ``x_t``."""
        dtype = next((p.dtype for p in self.network.parameters()), x_t.dtype)
        # never below float32: bfloat16 cannot tell the steps of a long chain apart
        level = self.conditioning(self.schedule, as_times(t, x_t)).to(torch.promote_types(dtype, torch.float32))
        x = x_t
        if not self.schedule.preserves_variance:
            scale = torch.exp(-0.5 * self.schedule.log_unit_var(as_times(t, x_t)))
            x = expand_to(scale, x_t).to(x_t.dtype) * x_t
        output = self.network(x.to(dtype), level.expand(x_t.shape[0]), **cond).to(x_t.dtype)
        if self.outputs == 1:
            return self.parameterization.predict(output, x_t, *self.scales(x_t, t))
        channels = x_t.shape[1]
        output, variance_output = output.split((output.shape[1] - channels, channels), dim=1)
        prediction = self.parameterization.predict(output, x_t, *self.scales(x_t, t))
        return replace(prediction, variance_output=variance_output)


class ClippedDenoiser(Denoiser):
    """A denoiser whose x0 is clipped to [-1, 1], the range of the data.

    For data in that range this can only lower the squared error of x0, hence each denoising-matching term.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        self.denoiser, self.schedule = denoiser, denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        return self.denoiser(x_t, t, **cond).clipped(x_t, *self.scales(x_t, t))
