"""What is minimised in training and what is evaluated after it."""

from ddpm_lightning.objectives.elbo import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    ElboTerms,
    ImportanceWeightedElbo,
    TermKind,
    TrajectoryElbo,
)
from ddpm_lightning.objectives.hybrid import HybridObjective
from ddpm_lightning.objectives.negative_elbo import ContinuousNegativeElbo, NegativeElbo
from ddpm_lightning.objectives.noise_mse import NoiseMSE
from ddpm_lightning.objectives.objective import Objective
from ddpm_lightning.objectives.path import PathLogProbs, path_log_probs, state_bound
from ddpm_lightning.objectives.steps import CostProfile, EqualRuns, SpreadSteps, StepChoice, StepDraw
from ddpm_lightning.objectives.times import (
    EquispacedTimes,
    ImportanceTimes,
    LogitNormalTimes,
    StratifiedTimes,
    TimeDraw,
    TimeSampler,
    UniformTimes,
)
from ddpm_lightning.objectives.weighted_mse import WeightedMSE
from ddpm_lightning.objectives.weighting import (
    EDMWeighting,
    ElboWeighting,
    LogitNormalWeighting,
    MinSNRWeighting,
    P2Weighting,
    UniformWeighting,
    VelocityWeighting,
    Weighting,
)

__all__ = [
    "ConsistencyElbo",
    "ContinuousElbo",
    "ContinuousNegativeElbo",
    "CostProfile",
    "DenoisingElbo",
    "EDMWeighting",
    "ElboEstimator",
    "ElboTerms",
    "ElboWeighting",
    "EqualRuns",
    "EquispacedTimes",
    "HybridObjective",
    "ImportanceTimes",
    "ImportanceWeightedElbo",
    "LogitNormalTimes",
    "LogitNormalWeighting",
    "MinSNRWeighting",
    "NegativeElbo",
    "NoiseMSE",
    "Objective",
    "P2Weighting",
    "PathLogProbs",
    "SpreadSteps",
    "StepChoice",
    "StepDraw",
    "StratifiedTimes",
    "TermKind",
    "TimeDraw",
    "TimeSampler",
    "TrajectoryElbo",
    "UniformTimes",
    "UniformWeighting",
    "VelocityWeighting",
    "WeightedMSE",
    "Weighting",
    "path_log_probs",
    "state_bound",
]
