"""What is minimised in training and what is evaluated after it."""

from ddpm_lightning.objectives.elbo import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    ElboTerms,
    TrajectoryElbo,
)
from ddpm_lightning.objectives.hybrid import HybridObjective
from ddpm_lightning.objectives.negative_elbo import NegativeElbo
from ddpm_lightning.objectives.noise_mse import NoiseMSE
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.times import StratifiedTimes, TimeSampler, UniformTimes

__all__ = [
    "ConsistencyElbo",
    "ContinuousElbo",
    "DenoisingElbo",
    "ElboEstimator",
    "ElboTerms",
    "HybridObjective",
    "NegativeElbo",
    "NoiseMSE",
    "Objective",
    "StratifiedTimes",
    "TimeSampler",
    "TrajectoryElbo",
    "UniformTimes",
]
