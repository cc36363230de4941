from ddpm_lightning.objectives.times import TimeSampler
from ddpm_lightning.objectives.weighted_mse import WeightedMSE

__all__ = ["NoiseMSE"]


class NoiseMSE(WeightedMSE):
    r"""The error of the noise, averaged over dimensions, at one step for each image (Ho et al. 2020, equation 14).

    .. math:: |\epsilon - \epsilon_\theta(x_t, t)|^2 / D

    Args:
        times: draws the times.
    """

    def __init__(self, times: TimeSampler) -> None:
        super().__init__(times)
