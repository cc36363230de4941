"""The variational bound in its three forms, in continuous time, and by importance weights, unreduced, in nats."""

from ddpm_lightning.objectives.elbo.consistency import ConsistencyElbo
from ddpm_lightning.objectives.elbo.continuous import ContinuousElbo, diffusion_cost
from ddpm_lightning.objectives.elbo.denoising import DenoisingElbo
from ddpm_lightning.objectives.elbo.estimator import ElboEstimator
from ddpm_lightning.objectives.elbo.importance import ImportanceWeightedElbo
from ddpm_lightning.objectives.elbo.terms import ElboTerms, TermKind
from ddpm_lightning.objectives.elbo.trajectory import TrajectoryElbo

__all__ = [
    "ConsistencyElbo",
    "ContinuousElbo",
    "DenoisingElbo",
    "ElboEstimator",
    "ElboTerms",
    "ImportanceWeightedElbo",
    "TermKind",
    "TrajectoryElbo",
    "diffusion_cost",
]
