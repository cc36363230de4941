#!/usr/bin/env python3
"""What each restriction costs on the way from a hierarchical VAE to a diffusion model, at equal training compute.

    python scripts/compare_hierarchies.py --gflops 3000 --out runs/hierarchies
    python scripts/compare_hierarchies.py --data mnist --gflops 8000 --data_root data --out runs/hierarchies_mnist

Every model is trained by ``ddpm fit`` with as many steps (of 128 digits, or 32 images of MNIST) as fit into --gflops
(convolutions and matrix products, forward and backward), by AdamW with one cycle of the learning rate. Its averaged
weights are evaluated on --images test images: the bound of its own T states, term by term. The errors are standard
errors over training seeds. A training whose folder holds its last step already is not repeated.
"""

import statistics
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from bench_tools import flops_of
from compare_choices import CONFIG, part, train

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.metrics import bits_per_dim
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo
from ddpm_lightning.runs import Run
from ddpm_lightning.schedules import CosineChain

T, LONG_T = 8, 300
DataName = Literal["digits", "mnist"]
SHAPES = {"digits": (1, 8, 8), "mnist": (1, 28, 28)}
GAMMA_MIN = {"digits": -9.0, "mnist": -13.3}
BATCH = {"digits": 128, "mnist": 32}
TERMS = ("reconstruction", "prior matching", "between levels", "bound")
HVAE = CONFIG.with_name("hvae_digits.yaml")
LAST = part("callbacks.LastCheckpoint")


def conv(channels: int, **arguments: Any) -> dict[str, Any]:
    """A convolutional level of the hierarchies."""
    return part("process.ConvLevel", channels=channels, width=24, blocks=1, **arguments)


def hierarchy(*levels: dict[str, Any]) -> dict[str, Any]:
    """A hierarchical VAE, trained by its bound."""
    bound = part("objectives.ConsistencyElbo")
    negative_elbo = part("objectives.NegativeElbo", bound=bound)
    return {
        "module": "ddpm_lightning.training.HierarchyModule",
        "model": {"hierarchy": list(levels), "objective": negative_elbo, "test_bounds": [bound]},
    }


def diffusion(schedule: dict[str, Any], **model: Any) -> dict[str, Any]:
    """A diffusion model, trained by one step of its bound for each image."""
    bound = part("objectives.DenoisingElbo", steps=1)
    network = part("networks.UNet", width=24, multipliers=[1, 2], blocks=1)
    parts = {
        "network": network,
        "schedule": schedule,
        "parameterization": part("process.VParameterization"),
        "objective": part("objectives.NegativeElbo", bound=bound),
        "clip_x0": False,
    }
    return {"model": {**parts, **model}}


def models(data: DataName) -> dict[str, dict[str, Any]]:
    """The configurations to compare, by name: what differs from the digits' own ones."""
    small, vector = conv(8, factor=2), part("process.VectorLevel", size=16)
    betas = CosineChain(T)
    keeps = (-0.5 * torch.diff(betas.neg_log_alpha_bar(betas.grid()))).exp().tolist()
    learned = part("process.LearnedRangeVariance")
    ends = {"gamma_min": GAMMA_MIN[data], "gamma_max": 5.0, "T": LONG_T}
    long = {"decoder": part("process.CategoricalDecoder")}
    linear = part("schedules.LinearGamma", **ends)
    encoder = part(
        "process.NetworkEncoder",
        network=part("networks.UNet", width=16, multipliers=[1, 2], blocks=1, time_scale=10),
    )
    straight = part("schedules.StraightPath", T=LONG_T)
    pixelwise = part("schedules.PixelwiseGamma", shape=list(SHAPES[data]), **ends)
    return {
        "VAE": hierarchy(small),
        "hierarchy, T = 2": hierarchy(small, vector),
        "hierarchy, T = 4": hierarchy(small, conv(8), conv(8), vector),
        "hierarchy, T = 8": hierarchy(small, *[conv(8)] * 6, vector),
        "+ equal shapes": hierarchy(*[conv(1)] * T),
        "+ fixed encoders": hierarchy(*[conv(1, fixed_encoder=True)] * T),
        "+ x_T standard normal": hierarchy(*(conv(1, carry=keep, fixed_encoder=True) for keep in keeps)),
        "+ one network: diffusion, T = 8": diffusion(part("schedules.CosineChain", T=T), variance=learned),
        "its variance fixed": diffusion(
            part("schedules.CosineChain", T=T), variance=part("process.FixedSmallVariance")
        ),
        "diffusion, T = 300": diffusion(linear, **long),
        "its gamma learned": diffusion(part("schedules.LearnedGamma", **ends), **long),
        "a gamma for each pixel": diffusion(pixelwise, **long),
        "its encoder learned": diffusion(linear, encoder=encoder, **long),
        "straight path": diffusion(straight, **long, parameterization=part("process.VelocityParameterization")),
    }


def overlay(name: str, data: DataName, root: str, seed: int, steps: int) -> dict[str, Any]:
    """The configuration of one training."""
    config = models(data)[name]
    cycle = {"max_lr": 2e-3, "total_steps": max(steps, 2), "pct_start": 0.1}
    config["model"] |= {
        "seed": seed,
        "ema_decay": 0.99,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 2e-3, "weight_decay": 0.0}},
        "lr_scheduler": {"class_path": "torch.optim.lr_scheduler.OneCycleLR", "init_args": cycle},
    }
    files = {"root": root, "download": False} if data == "mnist" else {}
    source = part("data.MNIST" if data == "mnist" else "data.Digits", batch_size=BATCH[data], seed=seed, **files)
    trainer = {"gradient_clip_val": 1.0, "enable_progress_bar": False, "logger": False, "callbacks": [LAST]}
    return {**config, "seed_everything": seed, "data": source, "trainer": trainer}


def gflops_of(run: Run) -> float:
    """GFLOP of one training step, by the model that a run holds."""
    module, data = run.load()
    images = data.split("train").batch(torch.arange(16)).image  # type: ignore[attr-defined]
    x0 = module.scale.to_model(images)
    step = flops_of(lambda: module.objective(module.model, x0).mean().backward())
    return step * data.batch_size / len(x0) / 1e9  # type: ignore[attr-defined]


def costs_of(run: Run, images: int, steps: int, root: str) -> dict[str, float]:
    """Each term of the bound as a cost in bits/dim, mean over test images."""
    trained = Trained(str(run.folder), batch_size=250, data_root=root)
    module, test = trained.module, trained.data.split("test")
    chain = module.ema_model.T
    # long chains by the denoising form, whose terms are far less noisy; their sum is the same number in expectation
    form = ConsistencyElbo() if chain <= T else DenoisingElbo(steps=min(steps, chain - 1))
    sums = dict.fromkeys(TERMS, 0.0)
    chosen = test.chosen(images, seed=0)
    with torch.inference_mode():
        for batch in trained.batches(chosen, run.folder.name):
            terms = module.bound(form, batch)
            between = terms["reconstruction"] - terms["prior_matching"] - terms["elbo"]
            parts = (-terms["reconstruction"], terms["prior_matching"], between, -terms["elbo"])
            for name, nats in zip(TERMS, parts, strict=True):
                sums[name] += float(nats.sum())
    return {name: bits_per_dim(total / len(chosen.image), module.dims) for name, total in sums.items()}


def main(
    data: DataName = "digits",
    gflops: float = 3000,
    seeds: int = 3,
    images: int = 1000,
    steps: int = 30,
    only: str = "",
    data_root: str = "data",
    out: Path = Path("runs/hierarchies"),
) -> None:
    """Train and compare.

    Args:
        data: digits or mnist
        gflops: training compute of each model
        seeds: trainings of each model, 0, 1, ...
        images: test images
        steps: steps evaluated of a long chain, stratified, for each image
        only: models whose name contains this, by default all
        data_root: folder that holds MNIST/raw
        out: folder
    """
    at_least(1, seeds=seeds, steps=steps)
    at_least(2, images=images)
    chosen = [name for name in models(data) if only in name]
    if not chosen:
        raise InputError(f"--only {only}: none of {'; '.join(models(data))}")
    root = str(Path(data_root).absolute())
    rows: list[dict[str, Any]] = []
    for name in chosen:
        folder = out / "".join(c if c.isalnum() else "_" for c in name.strip("+ "))
        base = HVAE if "module" in models(data)[name] else CONFIG
        probe = Run(folder / "probe")
        train(overlay(name, data, root, 0, 1), 1, probe, base)
        cost = gflops_of(probe)
        updates = int(gflops / cost)
        if updates < 1:
            raise InputError(f"--gflops {gflops:g} is less than one step of '{name}' costs: {cost:.0f}")
        for seed in range(seeds):
            print(f"{name}: {updates} steps of {cost:.2f} GFLOP, seed {seed}", file=sys.stderr, flush=True)
            run = Run(folder / f"seed_{seed}")
            train(overlay(name, data, root, seed, updates), updates, run, base)
            rows.append({"model": name, "seed": seed, "steps": updates, **costs_of(run, images, steps, root)})
            Run(out).write("hierarchies.json", rows)
    print(table(rows, data, gflops))


def table(rows: list[dict[str, Any]], data: DataName, gflops: float) -> str:
    """Means over seeds and their standard errors."""
    lines = [f"{data}, {gflops:g} GFLOP of training each, averaged weights, test images, costs in bits/dim", ""]
    lines.append(f"{'model':<34}{'steps':>7}" + "".join(f"{name:>18}" for name in TERMS))
    for name in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == name]
        cells = []
        for term in TERMS:
            values = [row[term] for row in own]
            se = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
            cells.append(f"{statistics.mean(values):.3f} +- {se:.3f}")
        lines.append(f"{name:<34}{own[0]['steps']:>7}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


if __name__ == "__main__":
    run_script(main, __doc__)
