"""What is minimised in training and what is evaluated after it."""

from ddpm_lightning.objectives.elbo import (
    ConsistencyElbo,
    DenoisingElbo,
    ElboEstimator,
    ElboTerms,
    TrajectoryElbo,
)
from ddpm_lightning.objectives.noise_mse import NoiseMSE, Objective
from ddpm_lightning.objectives.times import StratifiedTimes, TimeSampler, UniformTimes

__all__ = [
    "ConsistencyElbo",
    "DenoisingElbo",
    "ElboEstimator",
    "ElboTerms",
    "NoiseMSE",
    "Objective",
    "StratifiedTimes",
    "TimeSampler",
    "TrajectoryElbo",
    "UniformTimes",
]
