"""Forward process, denoiser, reverse process, decoder, and the generative model that they make up."""

from ddpm_lightning.process.conditioning import GammaConditioning, NoiseConditioning, TimeConditioning
from ddpm_lightning.process.decoders import CategoricalDecoder, Decoder, DiscretizedGaussian, PlainGaussian
from ddpm_lightning.process.denoiser import ClippedDenoiser, Denoiser, NetworkDenoiser
from ddpm_lightning.process.encoder import Encoder, IdentityEncoder, NetworkEncoder
from ddpm_lightning.process.eps_mse import eps_mse_table, spread_times
from ddpm_lightning.process.forward import ForwardProcess
from ddpm_lightning.process.generative import GenerativeModel
from ddpm_lightning.process.guidance import (
    AutoguidedDenoiser,
    ClassifierDenoiser,
    ClassifierFreeDenoiser,
    LogFactor,
    ProductDenoiser,
)
from ddpm_lightning.process.hierarchy import HierarchicalVAE
from ddpm_lightning.process.levels import ConvLevel, DiffusionLevel, Level, LinearLevel, VectorLevel
from ddpm_lightning.process.measurement import (
    AverageOperator,
    DenoisingOperator,
    LinearMeasurement,
    LinearOperator,
    MaskOperator,
    MatrixOperator,
)
from ddpm_lightning.process.model import DiffusionModel
from ddpm_lightning.process.parameterization import (
    CategoricalParameterization,
    EpsParameterization,
    Parameterization,
    Prediction,
    ScoreParameterization,
    VelocityParameterization,
    VParameterization,
    X0Parameterization,
)
from ddpm_lightning.process.posterior import DPSDenoiser, MMPSDenoiser
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
    "AutoguidedDenoiser",
    "AverageOperator",
    "CategoricalDecoder",
    "CategoricalParameterization",
    "ClassifierDenoiser",
    "ClassifierFreeDenoiser",
    "ClippedDenoiser",
    "ConvLevel",
    "DPSDenoiser",
    "Decoder",
    "Denoiser",
    "DenoisingOperator",
    "DiffusionLevel",
    "DiffusionModel",
    "DiscretizedGaussian",
    "Encoder",
    "EpsParameterization",
    "FixedLargeVariance",
    "FixedSmallVariance",
    "ForwardProcess",
    "GammaConditioning",
    "GenerativeModel",
    "HierarchicalVAE",
    "IdentityEncoder",
    "LearnedRangeVariance",
    "Level",
    "LinearLevel",
    "LinearMeasurement",
    "LinearOperator",
    "LogFactor",
    "MMPSDenoiser",
    "MaskOperator",
    "MatrixOperator",
    "NetworkDenoiser",
    "NetworkEncoder",
    "NoiseConditioning",
    "Parameterization",
    "PlainGaussian",
    "Prediction",
    "ProductDenoiser",
    "ReverseProcess",
    "ReverseVariance",
    "ScoreParameterization",
    "TimeConditioning",
    "VParameterization",
    "VectorLevel",
    "VelocityParameterization",
    "X0Parameterization",
    "eps_mse_table",
    "spread_times",
]
