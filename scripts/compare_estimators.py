#!/usr/bin/env python3
"""Compare the three forms of the bound on one model: same images, same number of network evaluations.

    python scripts/compare_estimators.py --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt

Each form is drawn several times for each image over all reverse steps, one network evaluation a step. Its noise is the
standard deviation over draws at a fixed image, so the spread of the images themselves is not in it. It is given twice:
as drawn, all steps along one path of the forward process, and as it would be if every step had a draw of its own (the
root of the summed variances of the steps), which is what a training loss or a subset of steps sees. The literal KL is
shown apart: it is no term of the bound.

Writes estimators.json and estimators.png to --out: for the last T, the steps' cost summed from t = 1 down and each
step's noise, against t and log SNR.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

from ddpm_lightning.data import levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.runs import load_run

matplotlib.use("Agg")
from matplotlib import pyplot as plt

FORMS: list[ElboEstimator] = [DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo()]


def draw(model: DiffusionModel, form: ElboEstimator, x0: Tensor, draws: int, seed: int, say: str) -> dict[str, Any]:
    """Every draw's totals ``[draws, B]``, step costs ``[draws, B, T - 1]`` and diagnostics, and the seconds taken."""
    totals, steps, literal = [], [], []
    start = time.perf_counter()
    for number in range(draws):
        generators = image_generators(seed + number, range(len(x0)))
        with torch.inference_mode():
            terms = form(model, x0, generators)
        totals.append(terms.total)
        steps.append(terms.step_costs)
        literal.append(terms.diagnostics.get("consistency_literal_kl", torch.zeros(0)))
        print(f"{say}: draw {number + 1} of {draws}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    return {"total": torch.stack(totals), "steps": torch.stack(steps), "literal": torch.stack(literal), "s": seconds}


def summary(form: ElboEstimator, T: int, drawn: dict[str, Any]) -> dict[str, Any]:
    """One row of the table."""
    total, steps = drawn["total"], drawn["steps"]
    per_image = total.mean(0)
    row = {
        "T": T,
        "form": form.name,
        "elbo_nats": float(per_image.mean()),
        "elbo_se": float(per_image.std() / len(per_image) ** 0.5),
        "noise_one_path": float(total.var(0).mean().sqrt()),
        "noise_separate_steps": float(steps.var(0).sum(1).mean().sqrt()),
        "evaluations_per_image": T,
        "ms_per_image": 1e3 * drawn["s"] / total.numel(),
    }
    if drawn["literal"].numel():
        row["literal_kl_nats"] = float(drawn["literal"].mean())
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text, with variance ratios to the denoising form of the same T."""
    head = f"{'T':>5} {'form':<12} {'ELBO, nats/image':>22} {'noise, one path':>16} {'noise, separate':>16}"
    lines = [head + f" {'variance ratio':>15} {'literal KL':>12} {'ms/image':>9}"]
    for row in rows:
        base = next(r for r in rows if r["T"] == row["T"] and r["form"] == "denoising")
        ratio = (row["noise_separate_steps"] / base["noise_separate_steps"]) ** 2
        literal = f"{row['literal_kl_nats']:.0f}" if "literal_kl_nats" in row else ""
        elbo = f"{row['elbo_nats']:.2f} +- {row['elbo_se']:.2f}"
        lines.append(
            f"{row['T']:>5} {row['form']:<12} {elbo:>22} {row['noise_one_path']:>16.2f} "
            f"{row['noise_separate_steps']:>16.2f} {ratio:>15.1f} {literal:>12} {row['ms_per_image']:>9.1f}"
        )
    return "\n".join(lines)


def figure(model: DiffusionModel, drawn: dict[str, dict[str, Any]], path: Path) -> None:
    """The cost summed from t = 1 down to each step, and each step's noise, against t and log SNR, for one T."""
    times = model.grid[2:]
    axes_x = {"t": times, "log SNR": -model.schedule.gamma(times)}
    picture, axes = plt.subplots(2, 2, figsize=(10, 6), sharey="row", layout="constrained")
    for column, (label, x) in enumerate(axes_x.items()):
        for name, values in drawn.items():
            summed = values["steps"].mean((0, 1)).flip(0).cumsum(0).flip(0)
            axes[0, column].plot(x, summed, label=name, linewidth=1)
            axes[1, column].plot(x, values["steps"].var(0).mean(0).sqrt(), label=name, linewidth=1)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("summed cost, nats/image")
    axes[1, 0].set_ylabel("noise of a step, nats/image")
    axes[0, 0].legend()
    picture.suptitle(f"Cost of the steps summed from t = 1 down, and its noise at a fixed image; T = {model.T}")
    picture.savefig(path, dpi=110)
    plt.close(picture)


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run: names the data")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the run")
    parser.add_argument("--T", type=int, nargs="+", help="numbers of states to evaluate (default: the model's own)")
    parser.add_argument("--images", type=int, default=32, help="test images (default: 32)")
    parser.add_argument("--draws", type=int, default=4, help="draws for each image, 2 or more (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws (default: 0)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results (default: this one)")
    arguments = parser.parse_args()
    if arguments.draws < 2 or arguments.images < 2:
        parser.error("--draws and --images must be 2 or more: a noise needs two draws")
    try:
        module, data = load_run(arguments.config, arguments.ckpt_path)
        x0 = levels_to_model(data.split("test").images[: arguments.images], module.levels)
        rows: list[dict[str, Any]] = []
        for T in arguments.T or [module.ema_model.T]:
            model = module.ema_model.with_steps(T)
            drawn = {
                form.name: draw(model, form, x0, arguments.draws, arguments.seed, f"T = {T}, {form.name}")
                for form in FORMS
            }
            rows += [summary(form, T, drawn[form.name]) for form in FORMS]
        arguments.out.mkdir(parents=True, exist_ok=True)
        figure(model, drawn, arguments.out / "estimators.png")
    except InputError as error:
        print(f"compare_estimators: error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.images} test images, {arguments.draws} draws each, averaged weights\n")
    print(table(rows))
    (arguments.out / "estimators.json").write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
