#!/usr/bin/env python3
"""Optimisers at equal FLOPs and equal tuning: each has the same learning rates to choose from.

    python scripts/compare_optimizers.py --steps 600 --seeds 3 --out runs/optimizers
    python scripts/compare_optimizers.py --config configs/mnist_likelihood.yaml --batch_size 64 --steps 350

Every training has the same images and noise for the same seed. Its learning rate rises for a tenth of the steps and
falls to 0 (OneCycleLR). Each optimiser takes the learning rate with the best bound on the validation images, with seed
0; the table then holds its bound on the test images for all seeds. SOAP is pytorch_optimizer's (pip install
pytorch_optimizer; DDPM_TRUSTED=pytorch_optimizer lets checkpoints name it). A training whose folder holds its last step
already is not repeated.
"""

import statistics
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from compare_choices import part, train

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import image_bits
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.objectives import ContinuousElbo
from ddpm_lightning.runs import Run

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.0, "fused": True}},
    "MuonAdamW": part("training.optimizers.MuonAdamW"),
    "SOAP": {
        "class_path": "pytorch_optimizer.SOAP",
        "init_args": {"weight_decay": 0.0, "precondition_frequency": 10, "max_precondition_dim": 512},
    },
}


def bits(run: Run, split: Any, times: int, device: str, root: str | None) -> float:
    """Mean bits/dim of the continuous bound on the images of a split."""
    trained = Trained(str(run.folder), batch_size=500, device=device, data_root=root)
    images = trained.data.split(split)
    shown = images.batch(torch.arange(min(2000, len(images))))
    return float(image_bits(trained, ContinuousElbo(times), shown, f"{run.folder.name}, {split}").mean())


def main(
    config: Path = Path(__file__).parents[1] / "configs" / "digits.yaml",
    steps: int = 600,
    batch_size: int = 128,
    lr: list[float] | None = None,
    seeds: int = 3,
    times: int = 50,
    only: str = "",
    device: str = "cpu",
    data_root: str | None = None,
    out: Path = Path("runs/optimizers"),
) -> None:
    """Train and compare.

    Args:
        config: configuration of the trainings
        steps: optimiser steps of each training
        batch_size: images in a step
        lr: largest learning rates to choose from, by default 1e-3 2e-3 4e-3 8e-3
        seeds: trainings of each optimiser with its best learning rate
        times: times at which each image's bound is evaluated
        only: an optimiser, or all whose name contains this; by default all
        device: where the bound is evaluated, cpu or cuda
        data_root: folder that holds MNIST/raw, where the data need one
        out: folder
    """
    at_least(1, steps=steps, seeds=seeds, batch_size=batch_size, times=times)
    rates, rows = lr or [1e-3, 2e-3, 4e-3, 8e-3], []
    chosen = [only] if only in OPTIMIZERS else [name for name in OPTIMIZERS if only in name]
    if not chosen:
        raise InputError(f"--only {only}: none of {', '.join(OPTIMIZERS)}")

    def trained(name: str, rate: float, seed: int) -> Run:
        run, optimizer = Run(out / f"{name}-{rate:g}-{seed}"), OPTIMIZERS[name]
        cycle = {"max_lr": rate, "total_steps": steps, "pct_start": 0.1}
        data: dict[str, Any] = {"init_args": {"batch_size": batch_size}}
        if data_root is not None:
            data["init_args"]["root"] = data_root
        overlay = {
            "seed_everything": seed,
            "trainer": {"callbacks": [part("callbacks.LastCheckpoint")]},
            "data": data,
            "model": {
                "optimizer": {**optimizer, "init_args": {**optimizer.get("init_args", {}), "lr": rate}},
                "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": cycle},
            },
        }
        train(overlay, steps, run, config)
        return run

    for name in chosen:
        if name == "SOAP" and find_spec("pytorch_optimizer") is None:
            print("SOAP is left out: pip install pytorch_optimizer", file=sys.stderr)
            continue
        scores = {rate: bits(trained(name, rate, 0), "val", times, device, data_root) for rate in rates}
        best = min(scores, key=lambda rate: scores[rate])
        values = [bits(trained(name, best, seed), "test", times, device, data_root) for seed in range(seeds)]
        rows.append({"optimizer": name, "lr": best, "validation": scores, "test": values})
        print(
            f"{name:<10} lr {best:g}  {statistics.mean(values):.4f}  seeds {[round(v, 4) for v in values]}", flush=True
        )
    Run(out).write("optimizers.json", rows)


if __name__ == "__main__":
    run_script(main, __doc__)
