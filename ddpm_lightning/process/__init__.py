"""Forward process, denoiser, reverse process, decoder, and the generative model that they make up."""

from ddpm_lightning.process.conditioning import GammaConditioning, NoiseConditioning, TimeConditioning
from ddpm_lightning.process.decoders import CategoricalDecoder, Decoder, DiscretizedGaussian, PlainGaussian
from ddpm_lightning.process.denoiser import ClippedDenoiser, Denoiser, NetworkDenoiser
from ddpm_lightning.process.eps_mse import eps_mse_table, spread_times
from ddpm_lightning.process.forward import ForwardProcess
from ddpm_lightning.process.model import DiffusionModel
from ddpm_lightning.process.parameterization import (
    EpsParameterization,
    Parameterization,
    Prediction,
    ScoreParameterization,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.process.reverse import ReverseProcess
from ddpm_lightning.process.variance import (
    AnalyticVariance,
    FixedLargeVariance,
    FixedSmallVariance,
    LearnedRangeVariance,
    ReverseVariance,
)

__all__ = [
    "AnalyticVariance",
    "CategoricalDecoder",
    "ClippedDenoiser",
    "Decoder",
    "Denoiser",
    "DiffusionModel",
    "DiscretizedGaussian",
    "EpsParameterization",
    "FixedLargeVariance",
    "FixedSmallVariance",
    "ForwardProcess",
    "GammaConditioning",
    "LearnedRangeVariance",
    "NetworkDenoiser",
    "NoiseConditioning",
    "Parameterization",
    "PlainGaussian",
    "Prediction",
    "ReverseProcess",
    "ReverseVariance",
    "ScoreParameterization",
    "TimeConditioning",
    "VParameterization",
    "X0Parameterization",
    "eps_mse_table",
    "spread_times",
]
