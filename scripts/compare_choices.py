#!/usr/bin/env python3
"""What each choice changes: schedule x objective x reverse variance at an equal budget on the embedded digits.

    python scripts/compare_choices.py --steps 600 --out runs/choices

Every pair of schedule and objective is trained by ``ddpm fit -c configs/digits.yaml`` for the same number of steps and
evaluated on all 297 test images with every variance that needs no training, as a chain of few and of many states and in
continuous time, with the same noise for all. A learned variance is a training of its own. A training whose folder
holds its last step already is not repeated.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import levels_to_model
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import image_bits, mean_and_error
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.objectives import ContinuousElbo, DenoisingElbo
from ddpm_lightning.process import (
    AnalyticVariance,
    FixedLargeVariance,
    FixedSmallVariance,
    ReverseVariance,
    eps_mse_table,
    spread_times,
)
from ddpm_lightning.runs import Run
from ddpm_lightning.training import DiffusionModule

CONFIG = Path(__file__).parents[1] / "configs" / "digits.yaml"
STRATIFIED = {"class_path": "ddpm_lightning.objectives.StratifiedTimes"}
CATEGORICAL = {"class_path": "ddpm_lightning.process.CategoricalDecoder"}


def part(name: str, **init_args: Any) -> dict[str, Any]:
    """A part of a configuration."""
    return {"class_path": f"ddpm_lightning.{name}", "init_args": init_args}


def weighted(weighting: str, **options: Any) -> dict[str, Any]:
    """WeightedMSE with this weighting."""
    weights = {"class_path": f"ddpm_lightning.objectives.{weighting}"}
    return part("objectives.WeightedMSE", times=STRATIFIED, weighting=weights, **options)


SCHEDULES = {
    "linear betas": part("schedules.LinearChain", T=300, reference_T=1000),
    "cosine betas": part("schedules.CosineChain", T=300),
    "linear gamma": part("schedules.LinearGamma", gamma_min=-9.0, gamma_max=5.0, T=300),
}
OBJECTIVES = {
    "noise MSE": part("objectives.NoiseMSE", times=STRATIFIED),
    "min-SNR": weighted("MinSNRWeighting"),
    "bound": weighted("ElboWeighting", continuous=True),
}
LEARNED = {
    "schedule": part("schedules.LearnedGamma", gamma_min=-9.0, gamma_max=5.0, T=300),
    "objective": part("objectives.ContinuousNegativeElbo", times=STRATIFIED),
    "decoder": CATEGORICAL,
}
RANGE = {
    "schedule": SCHEDULES["cosine betas"],
    "objective": part("objectives.HybridObjective", times=STRATIFIED),
    "variance": part("process.LearnedRangeVariance"),
    "network": {"init_args": {"out_channels": 2}},
}
TRAININGS: dict[tuple[str, str], dict[str, Any]] = {
    **{(s, o): {"schedule": SCHEDULES[s], "objective": OBJECTIVES[o]} for s in SCHEDULES for o in OBJECTIVES},
    ("learned gamma", "bound"): LEARNED,
    ("cosine betas", "hybrid"): RANGE,
}


def train(model: dict[str, Any], steps: int, folder: Path) -> None:
    """Train a configuration that differs from digits.yaml by ``model``, unless it has been."""
    checkpoint = folder / "checkpoints" / "last.ckpt"
    if checkpoint.is_file() and torch.load(checkpoint, weights_only=True)["global_step"] == steps:
        return
    folder.mkdir(parents=True, exist_ok=True)
    overlay = folder / "overlay.yaml"
    overlay.write_text(yaml.safe_dump({"model": model}, sort_keys=False))
    command = [sys.executable, "-m", "ddpm_lightning", "fit", "-c", str(CONFIG), "-c", str(overlay)]
    command += [f"--run_dir={folder}", f"--trainer.max_steps={steps}", "--trainer.limit_val_batches=0"]
    command += ["--trainer.max_epochs=-1"] + (["--ckpt_path=last"] if checkpoint.is_file() else [])
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise InputError(f"training in {folder} failed:\n{done.stdout[-2000:]}")


def variances(module: DiffusionModule, x0: torch.Tensor) -> dict[str, ReverseVariance]:
    """Every variance that the trained model can be given, the analytic one measured on training images ``x0``."""
    own = module.ema_model.reverse_process.variance
    if own.network_outputs > 1:
        return {"learned range": own}
    times, generator = spread_times(module.ema_model, 20), torch.Generator().manual_seed(0)
    table = eps_mse_table(module.ema_model, [(x0, {})], times, generator)
    return {"beta": FixedLargeVariance(), "beta-tilde": FixedSmallVariance(), "analytic": AnalyticVariance(*table)}


def rows_of(names: tuple[str, str], folder: Path, few: int, many: int, images: int | None) -> list[dict[str, Any]]:
    """A row for each variance of one training."""
    trained = Trained(str(folder), batch_size=images or 1000)
    module, test = trained.module, trained.data.split("test")
    shown = test.batch(torch.arange(len(test))[:images])
    fitted = variances(module, levels_to_model(trained.data.split("train").images[:500], module.levels))
    estimators = {
        "few": DenoisingElbo(T=few),
        "many": DenoisingElbo(steps=min(many, module.ema_model.T - 1)),
        "continuous": ContinuousElbo(many),
    }
    rows = []
    for name, variance in fitted.items():
        module.ema_model.reverse_process.variance = variance
        row: dict[str, Any] = {"schedule": names[0], "objective": names[1], "variance": name}
        for column, estimator in estimators.items():
            row[column] = mean_and_error(image_bits(trained, estimator, shown, f"{name}, {column}"))
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]], few: int) -> str:
    """The rows as text, bits/dim."""
    columns = (f"T = {few}", "own T", "continuous")
    lines = [f"{'schedule':<14} {'objective':<10} {'variance':<14}" + "".join(f"{name:>18}" for name in columns)]
    for row in rows:
        cells = [f"{mean:.3f} +- {error:.3f}" for mean, error in (row["few"], row["many"], row["continuous"])]
        figures = "".join(f"{cell:>18}" for cell in cells)
        lines.append(f"{row['schedule']:<14} {row['objective']:<10} {row['variance']:<14}{figures}")
    return "\n".join(lines)


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
    at_least(2, few=few, **({} if images is None else {"images": images}))
    chosen = {names: model for names, model in TRAININGS.items() if only in ", ".join(names)}
    if not chosen:
        raise InputError(f"--only {only}: none of {'; '.join(', '.join(names) for names in TRAININGS)}")
    rows: list[dict[str, Any]] = []
    for number, (names, model) in enumerate(chosen.items(), start=1):
        print(f"{number} of {len(chosen)}: {', '.join(names)}", file=sys.stderr, flush=True)
        folder = out / "-".join(names).replace(" ", "_")
        train(model, steps, folder)
        rows += rows_of(names, folder, few, many, images)
    print(f"{steps} steps each, test images, averaged weights, bits/dim of the denoising form\n")
    print(table(rows, few))
    Run(out).write("choices.json", rows)


if __name__ == "__main__":
    run_script(main, __doc__)
