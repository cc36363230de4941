"""What is minimised in training and what is evaluated after it."""

from ddpm_lightning.objectives.elbo import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    ElboTerms,
    TrajectoryElbo,
)
from ddpm_lightning.objectives.negative_elbo import NegativeElbo
from ddpm_lightning.objectives.noise_mse import NoiseMSE
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.path import PathLogProbs, path_log_probs, state_bound
from ddpm_lightning.objectives.times import StratifiedTimes, TimeSampler, UniformTimes

__all__ = [
    "ConsistencyElbo",
    "ContinuousElbo",
    "DenoisingElbo",
    "ElboEstimator",
    "ElboTerms",
    "NegativeElbo",
    "NoiseMSE",
    "Objective",
    "PathLogProbs",
    "StratifiedTimes",
    "TimeSampler",
    "TrajectoryElbo",
    "UniformTimes",
    "path_log_probs",
    "state_bound",
]
