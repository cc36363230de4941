"""Samplers: from noise to images on any time grid; and the flow that gives states a density."""

from ddpm_lightning.samplers.ancestral import AncestralSampler
from ddpm_lightning.samplers.base import Context, MultistepState, Sampler, State
from ddpm_lightning.samplers.ddim import DDIMSampler
from ddpm_lightning.samplers.dpm_solver import DPMSolverSampler
from ddpm_lightning.samplers.heun import HeunSampler
from ddpm_lightning.samplers.inpainting import (
    InpaintingFactory,
    InpaintingSampler,
    MomentMatchingSampler,
    ReplacementSampler,
)
from ddpm_lightning.samplers.paths import WeightedPaths, draw_paths, effective_sample_size, log_mean_weight
from ddpm_lightning.samplers.probability_flow import (
    Divergence,
    ExactDivergence,
    FlowLikelihood,
    HutchinsonDivergence,
    ProbabilityFlow,
)

__all__ = [
    "AncestralSampler",
    "Context",
    "DDIMSampler",
    "DPMSolverSampler",
    "Divergence",
    "ExactDivergence",
    "FlowLikelihood",
    "HeunSampler",
    "HutchinsonDivergence",
    "InpaintingFactory",
    "InpaintingSampler",
    "MomentMatchingSampler",
    "MultistepState",
    "ProbabilityFlow",
    "ReplacementSampler",
    "Sampler",
    "State",
    "WeightedPaths",
    "draw_paths",
    "effective_sample_size",
    "log_mean_weight",
]
