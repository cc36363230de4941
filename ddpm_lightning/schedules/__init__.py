"""Noise schedules: gamma(t) = -log SNR(t) and the time grids that chains and samplers run on."""

from ddpm_lightning.schedules.base import Schedule
from ddpm_lightning.schedules.chains import BetaChain, CosineChain, LinearChain
from ddpm_lightning.schedules.continuous import LinearGamma
from ddpm_lightning.schedules.grids import chain_grid, strided_grid

__all__ = ["BetaChain", "CosineChain", "LinearChain", "LinearGamma", "Schedule", "chain_grid", "strided_grid"]
