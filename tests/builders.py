"""Modules, trainers and command lines that several test files build, and what their checkpoints hold."""

import os
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from picture_files import pixels, save
from torch import nn

from ddpm_lightning.cli import BuiltOnly, main
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, NoiseMSE, UniformTimes
from ddpm_lightning.process import DiscretizedGaussian, EpsParameterization, FixedLargeVariance, TimeConditioning
from ddpm_lightning.schedules import LinearChain
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule

__all__ = [
    "OLD_RUN",
    "BuiltOnly",
    "Evil",
    "build",
    "checkpoint",
    "compared",
    "conditional",
    "differences",
    "equal",
    "losses",
    "refused",
    "run_trainer",
    "state",
    "torn",
    "trainer",
    "weights",
]


OLD_RUN = Path(__file__).parent / "data" / "run_of_0_1"
"""A run that version 0.1 trained for two epochs of ten steps."""

# --- modules and trainers


def build(**changes: object) -> DiffusionModule:
    torch.manual_seed(0)
    arguments: dict = {
        "network": UNet(1, width=8, multipliers=(1, 2), blocks=1),
        "schedule": LinearChain(T=10, beta_start=0.02, beta_end=0.5),
        "parameterization": EpsParameterization(),
        "conditioning": TimeConditioning(),
        "variance": FixedLargeVariance(),
        "decoder": DiscretizedGaussian(17),
        "objective": NoiseMSE(UniformTimes()),
        "validation_bounds": [DenoisingElbo(steps=2)],
        "test_bounds": [DenoisingElbo(), ConsistencyElbo()],
        "optimizer": partial(torch.optim.Adam, lr=1e-3),
        "shape": (1, 8, 8),
        "levels": 17,
    }
    return DiffusionModule(**{**arguments, **changes})


def conditional(**changes: object) -> DiffusionModule:
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, num_classes=10)
    return build(**{"network": network, "class_conditional": True, "num_classes": 10, **changes})


QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}


def trainer(folder: Path, **options: object) -> pl.Trainer:
    return pl.Trainer(default_root_dir=folder, accelerator="cpu", **{**QUIET, "max_epochs": 1, **options})


def run_trainer(folder: Path, *callbacks: pl.Callback, **options: object) -> DiffusionTrainer:
    """The Trainer of the command line, for two epochs."""
    options = {**QUIET, "max_epochs": 2, **options}
    return DiffusionTrainer(default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **options)


def state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].cpu(), b[name].cpu()) for name in a)


# --- command lines


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message of a command that ends with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- runs and their checkpoints


def losses(run_dir: Path) -> list[float]:
    """train/loss of each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [event.value for event in EventAccumulator(str(run_dir)).Reload().Scalars("train/loss")]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def checkpoint(step: int) -> dict:
    """The least that is one."""
    return {"state_dict": {"w": torch.full((64, 64), float(step))}, "global_step": step}


def compared(path: Path) -> dict[str, object]:
    checkpoint = torch.load(path, weights_only=True)
    return {key: checkpoint[key] for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step")}


def differences(a: object, b: object, name: str = "") -> list[str]:
    """Names of what is not the same, to the bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) and a.dtype == b.dtype else [name]
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in a.keys() | b.keys() for d in differences(a.get(key), b.get(key), f"{name}.{key}")]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{name}.{i}")]
    return [] if a == b else [name]


def torn(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:1000])


class Evil:
    """Runs a command when it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple:
        return os.system, (self.command,)


def own_data(config: str, folder: Path) -> list[str]:
    """Options of a configuration for data of the user's own or simulated ones: small files, written into the folder."""
    if config in ("ising.yaml", "phi4.yaml", "free_field.yaml"):
        return [f"--data.root={folder}", *(f"--data.n_{split}=64" for split in ("train", "val", "test"))]
    if config == "images.yaml":
        for seed in range(20):
            save(folder / "photos" / f"{seed}.png", pixels(seed))
        return [f"--data.path={folder}/photos"]
    if config != "fields.yaml":
        return []
    path = folder / "own.npy"
    np.save(path, np.random.default_rng(0).normal(size=(40, 1, 4, 6)).astype(np.float32))
    return [f"--data.path={path}"]
