"""Callbacks: each decides when something is logged, drawn, written or saved."""

from ddpm_lightning.callbacks.averages import PowerAverages
from ddpm_lightning.callbacks.checkpoint import LastCheckpoint
from ddpm_lightning.callbacks.cuda_graphs import CudaGraphs
from ddpm_lightning.callbacks.diagnostics import CostByTime, GradientNorm, LossByTime, RunOptions
from ddpm_lightning.callbacks.finders import BatchSizeTest, LearningRateTest
from ddpm_lightning.callbacks.finite import StopOnNonFinite
from ddpm_lightning.callbacks.hierarchy import LevelPictures
from ddpm_lightning.callbacks.observables import LatticeObservables
from ddpm_lightning.callbacks.pictures import ForwardStrip, SampleGrid, ScheduleCurves
from ddpm_lightning.callbacks.progress import EpochLines, ImagesPerSecond
from ddpm_lightning.callbacks.quality import SampleQuality
from ddpm_lightning.callbacks.reports import BoundTable, ImageTermsWriter

__all__ = [
    "BatchSizeTest", "BoundTable", "CostByTime", "CudaGraphs", "EpochLines", "ForwardStrip", "GradientNorm",
    "ImageTermsWriter", "ImagesPerSecond", "LastCheckpoint", "LatticeObservables", "LearningRateTest", "LevelPictures",
    "LossByTime", "PowerAverages", "RunOptions", "SampleGrid", "SampleQuality", "ScheduleCurves", "StopOnNonFinite",
]  # fmt: skip
