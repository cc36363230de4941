r"""Noise schedules: :math:`\gamma(t) = -\log \mathrm{SNR}(t)` and the time grids that chains and samplers run on."""

from ddpm_lightning.schedules.base import Schedule
from ddpm_lightning.schedules.chains import BetaChain, CosineChain, LinearChain
from ddpm_lightning.schedules.continuous import CosineGamma, LinearGamma
from ddpm_lightning.schedules.exploding import VarianceExploding
from ddpm_lightning.schedules.grids import (
    KarrasGrid,
    LogSNRGrid,
    StridedGrid,
    TimeGrid,
    chain_grid,
    karras_grid,
    logsnr_grid,
    strided_grid,
)
from ddpm_lightning.schedules.learned import LearnedGamma, PixelwiseGamma
from ddpm_lightning.schedules.straight import StraightPath
from ddpm_lightning.schedules.tabulated import TabulatedSchedule

__all__ = [
    "BetaChain",
    "CosineChain",
    "CosineGamma",
    "KarrasGrid",
    "LearnedGamma",
    "LinearChain",
    "LinearGamma",
    "LogSNRGrid",
    "PixelwiseGamma",
    "Schedule",
    "StraightPath",
    "StridedGrid",
    "TabulatedSchedule",
    "TimeGrid",
    "VarianceExploding",
    "chain_grid",
    "karras_grid",
    "logsnr_grid",
    "strided_grid",
]
