"""The one number by which the network is told how noisy its input is. Training and sampling share this place."""

from torch import Tensor

from ddpm_lightning.errors import positive
from ddpm_lightning.schedules import Schedule

__all__ = ["GammaConditioning", "NoiseConditioning", "TimeConditioning"]


class NoiseConditioning:
    """Maps the time t ``[B]`` of a schedule to the scalar that the network receives, float64 ``[B]``."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        raise NotImplementedError


class TimeConditioning(NoiseConditioning):
    """The time itself, t in (0, 1]: i/T on a chain."""

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return t


class GammaConditioning(NoiseConditioning):
    """gamma(t) / scale: the noise level, whatever the schedule calls its time (as VDM conditions on gamma).

    With a gamma for each pixel it is their mean.

    A network conditioned so can be evaluated under another schedule or another number of steps.

    Args:
        scale: gamma is divided by it, so that the usual range of gamma, about -13 to 20, becomes about -1 to 1.
    """

    def __init__(self, scale: float = 20.0) -> None:
        positive(scale=scale)
        self.scale = scale

    def __call__(self, schedule: Schedule, t: Tensor) -> Tensor:
        return schedule.mean_gamma(t) / self.scale
