"""``ddpm sweep``: trainings with many options, side by side, and the best of them."""

from ddpm_lightning.sweeps.command import run_sweep

__all__ = ["run_sweep"]
