#!/usr/bin/env python3
"""Measure the optimal fixed variance of a trained model's reverse steps, and write it down as a configuration.

    python scripts/analytic_variance.py --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt
    ddpm test -c RUN/config.yaml -c RUN/analytic.yaml --ckpt_path last

The mean squared error of the averaged model's eps (clipped where the model clips) is measured on training images at
noise levels spread over the chain, one network evaluation for each image and level, in float32. AnalyticVariance turns
it into the variance of every step, of any number of steps.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor

from ddpm_lightning.data import ImageDataModule, levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import eps_mse_table, spread_times
from ddpm_lightning.runs import load_run
from ddpm_lightning.training import DiffusionModule

BATCH = 100


def training_batches(
    module: DiffusionModule, data: ImageDataModule, count: int, generator: torch.Generator
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """Training images at random in model range and their conditions, with a line of progress for each batch."""
    split = data.split("train")
    rows = torch.randperm(len(split), generator=generator)[:count]
    done = 0
    for part in rows.split(BATCH):
        batch = split.batch(part)
        yield levels_to_model(batch.image, module.levels), {"label": batch.label} if module.class_conditional else {}
        done += len(part)
        print(f"{done} of {len(rows)} images", file=sys.stderr, flush=True)


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run: names the data")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the run")
    parser.add_argument("--images", type=int, default=2000, help="training images, at most all (default: 2000)")
    parser.add_argument("--points", type=int, default=40, help="noise levels, 2 or more, at most (default: 40)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the images and the noise (default: 0)")
    parser.add_argument("--out", type=Path, help="file to write (default: analytic.yaml beside --config)")
    arguments = parser.parse_args()
    if arguments.images < 1:
        parser.error("--images must be 1 or more")
    out = arguments.out or arguments.config.with_name("analytic.yaml")
    try:
        module, data = load_run(arguments.config, arguments.ckpt_path)
        model = module.ema_model
        if model.reverse_process.variance.network_outputs > 1:
            raise InputError(
                f"the variance of this run is {type(model.reverse_process.variance).__name__}, which its network "
                "gives: there is nothing to measure"
            )
        times = spread_times(model, arguments.points)
        generator = torch.Generator().manual_seed(arguments.seed)
        batches = training_batches(module, data, arguments.images, generator)
        gammas, eps_mse = eps_mse_table(model, batches, times, generator)
        variance = {
            "class_path": "ddpm_lightning.process.AnalyticVariance",
            "init_args": {"gammas": gammas, "eps_mse": eps_mse},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(yaml.safe_dump({"model": {"variance": variance}}, sort_keys=False))
    except InputError as error:
        print(f"analytic_variance: error: {error}", file=sys.stderr)
        return 2
    print(f"{'gamma':>9} {'mean squared error of eps':>26}")
    for gamma, error in zip(gammas, eps_mse, strict=True):
        print(f"{gamma:>9.3f} {error:>26.6g}")
    print(f"wrote {out}: ddpm test -c {arguments.config} -c {out} --ckpt_path {arguments.ckpt_path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
