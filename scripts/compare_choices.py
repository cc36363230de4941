#!/usr/bin/env python3
"""What each choice changes: schedule x objective x reverse variance at an equal budget on the embedded digits.

    python scripts/compare_choices.py --steps 600 --out runs/choices

Every pair of schedule and objective is trained by ``ddpm fit -c configs/digits.yaml`` for the same number of steps and
evaluated on all 297 test images with every variance that needs no training, as a chain of few and of many states and in
continuous time, with the same noise for all. A learned variance is a training of its own. A training whose folder
holds its last step already is not repeated.
"""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
import yaml

from ddpm_lightning import process
from ddpm_lightning.checkpoints.files import read_checkpoint
from ddpm_lightning.cli import main as ddpm
from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import levels_to_model
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import image_bits, mean_and_error
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.objectives import ContinuousElbo, DenoisingElbo
from ddpm_lightning.runs import Run
from ddpm_lightning.training import DiffusionModule

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"


def part(name: str, **init_args: Any) -> dict[str, Any]:
    """A part of a configuration."""
    return {"class_path": f"ddpm_lightning.{name}", "init_args": init_args}


def objective(name: str, **init_args: Any) -> dict[str, Any]:
    """An objective with stratified times."""
    return part(f"objectives.{name}", times=part("objectives.StratifiedTimes"), **init_args)


SCHEDULES = {
    "linear betas": part("schedules.LinearChain", T=300, reference_T=1000),
    "cosine betas": part("schedules.CosineChain", T=300),
    "linear gamma": part("schedules.LinearGamma", gamma_min=-9.0, gamma_max=5.0, T=300),
}
OBJECTIVES = {
    "noise MSE": objective("NoiseMSE"),
    "min-SNR": objective("WeightedMSE", weighting=part("objectives.MinSNRWeighting")),
    "bound": objective("WeightedMSE", weighting=part("objectives.ElboWeighting"), continuous=True),
}
TRAININGS: dict[tuple[str, str], dict[str, Any]] = {
    **{(s, o): {"schedule": SCHEDULES[s], "objective": OBJECTIVES[o]} for s in SCHEDULES for o in OBJECTIVES},
    ("learned gamma", "bound"): {
        "schedule": part("schedules.LearnedGamma", gamma_min=-9.0, gamma_max=5.0, T=300),
        "objective": objective("ContinuousNegativeElbo"),
        "decoder": part("process.CategoricalDecoder"),
    },
    ("cosine betas", "hybrid"): {
        "schedule": SCHEDULES["cosine betas"],
        "objective": objective("HybridObjective"),
        "variance": part("process.LearnedRangeVariance"),
        "network": {"init_args": {"out_channels": 2}},
    },
}
COLUMNS = ("few", "many", "continuous")


def train(overlay: dict[str, Any], steps: int, run: Run, config: Path = CONFIG) -> None:
    """Train a configuration that differs from ``config`` by ``overlay``, unless it has been."""
    last = run.checkpoints / "last.ckpt"
    if last.is_file() and read_checkpoint(last)["global_step"] == steps:
        return
    file = run.write("overlay.yaml", yaml.safe_dump(overlay, sort_keys=False))
    options = [f"--run_dir={run.folder}", f"--trainer.max_steps={steps}", "--trainer.max_epochs=-1"]
    with redirect_stdout(sys.stderr):
        ddpm(["fit", f"-c={config}", f"-c={file}", *options, "--trainer.limit_val_batches=0", "--ckpt_path=last"])


def variances(module: DiffusionModule, x0: torch.Tensor) -> dict[str, process.ReverseVariance]:
    """Every variance that the trained model can be given, the analytic one measured on training images ``x0``."""
    own = module.ema_model.reverse_process.variance
    if own.network_outputs > 1:
        return {"learned range": own}
    times, generator = process.spread_times(module.ema_model, 20), torch.Generator().manual_seed(0)
    analytic = process.AnalyticVariance(*process.eps_mse_table(module.ema_model, [(x0, {})], times, generator))
    return {"beta": process.FixedLargeVariance(), "beta-tilde": process.FixedSmallVariance(), "analytic": analytic}


def rows_of(names: tuple[str, str], run: Run, few: int, many: int, images: int | None) -> list[dict[str, Any]]:
    """A row for each variance of one training: mean and standard error of the bound in each column, bits/dim."""
    trained = Trained(str(run.folder), batch_size=images or 1000)
    module, test = trained.diffusion, trained.data.split("test")
    shown = test.batch(torch.arange(len(test))[:images])
    bounds = (DenoisingElbo(T=few), DenoisingElbo(steps=min(many, module.ema_model.T - 1)), ContinuousElbo(many))
    rows = []
    x0 = levels_to_model(trained.data.split("train").images[:500], module.grey_levels)
    for name, variance in variances(module, x0).items():
        module.ema_model.reverse_process.variance = variance
        row: dict[str, Any] = {"schedule": names[0], "objective": names[1], "variance": name}
        for column, bound in zip(COLUMNS, bounds, strict=True):
            row[column] = mean_and_error(image_bits(trained, bound, shown, f"{name}, {column}"))
        rows.append(row)
    return rows


def main(
    steps: int = 600,
    few: int = 10,
    many: int = 50,
    images: int | None = None,
    only: str = "",
    out: Path = Path("runs/choices"),
) -> None:
    """Train and compare.

    Args:
        steps: optimiser steps of each training
        few: states of the short chain
        many: steps evaluated of the long chain
        images: test images, by default all
        only: trainings whose 'schedule, objective' contains this, by default all
        out: folder
    """
    at_least(1, steps=steps, many=many)
    at_least(2, few=few, images=2 if images is None else images)
    chosen = {names: model for names, model in TRAININGS.items() if only in ", ".join(names)}
    if not chosen:
        raise InputError(f"--only {only}: none of {'; '.join(', '.join(names) for names in TRAININGS)}")
    rows: list[dict[str, Any]] = []
    for number, (names, model) in enumerate(chosen.items(), start=1):
        print(f"{number} of {len(chosen)}: {', '.join(names)}", file=sys.stderr, flush=True)
        run = Run(out / "-".join(names).replace(" ", "_"))
        train({"model": model}, steps, run)
        rows += rows_of(names, run, few, many, images)
    print(f"{steps} steps each, test images, averaged weights, bits/dim of the denoising form\n")
    heads = ("schedule", "objective", "variance", f"T = {few}", "own T", "continuous")
    for row in [heads, *(tuple(row.values()) for row in rows)]:
        cells = [cell if isinstance(cell, str) else "{:.3f} +- {:.3f}".format(*cell) for cell in row]
        print("{:<14} {:<10} {:<14}{:>18}{:>18}{:>18}".format(*cells))
    Run(out).write("choices.json", rows)


if __name__ == "__main__":
    run_script(main, __doc__)
