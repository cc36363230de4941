#!/usr/bin/env python3
"""Few steps of a long chain: the noise of the bound at a fixed image, with steps from equal runs and by typical cost.

    python scripts/compare_steps.py runs/digits --form denoising --steps 5 10 20 --json_file runs/steps.json

The costs are measured as ``ddpm fit`` does, on the run's training images. Every estimate takes K evaluations of the
network for its K steps and one for the decoder. A ratio is that of the variances over draws, each averaged over test
images; its standard error is the jackknife's over images. The last column is by how much the means of all draws differ.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import Batch
from ddpm_lightning.errors import at_least
from ddpm_lightning.evaluation.bound import mean_and_error
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.lattice import jackknife
from ddpm_lightning.metrics import bits_per_dim
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    CostProfile,
    DenoisingElbo,
    ElboEstimator,
    TrajectoryElbo,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.progress import tracked

FORMS: dict[str, type[ElboEstimator]] = {
    form.name: form for form in (DenoisingElbo, ConsistencyElbo, TrajectoryElbo, ContinuousElbo)
}


def draws_of(trained: Trained, estimator: ElboEstimator, images: Batch, draws: int, what: str) -> Tensor:
    """Bits/dim of each draw of each image, float64 ``[draws, B]``."""
    module, x0, cond = trained.diffusion, trained.module.scale.to_model(images.image), trained.module.condition(images)
    found = []
    for number in tracked(range(draws), draws, what, "draws", lambda _: 1):
        generators = image_generators(trained.seed + number, range(len(x0)))
        found.append(estimator(module.ema_model, x0, generators, **cond).total.cpu())
    return -torch.stack(found) * bits_per_dim(1.0, module.dims)


@torch.inference_mode()
def main(
    trained: Trained,
    form: Literal["denoising", "consistency", "trajectory", "continuous"] = "denoising",
    steps: list[int] | None = None,
    images: int = 30,
    draws: int = 50,
    costs_from: int = 16,
    json_file: Path | None = None,
) -> None:
    """Measure.

    Args:
        trained: the run
        form: of the bound
        steps: numbers of steps, by default 5 10 20
        images: test images, 2 or more
        draws: draws for each image, 2 or more
        costs_from: training images on which the costs are measured
        json_file: also write the figures here
    """
    at_least(2, images=images, draws=draws)
    at_least(1, costs_from=costs_from)
    module = trained.diffusion

    def chosen(split: Literal["train", "test"], count: int) -> Batch:
        return trained.data.split(split).chosen(count, seed=0).map(lambda column: column.to(trained.device))

    profile, known, test = CostProfile().to(trained.device), chosen("train", costs_from), chosen("test", images)
    generators = image_generators(trained.seed, -1 - known.index)
    x0, cond = module.scale.to_model(known.image), module.condition(known)
    rows: list[dict[str, Any]] = []
    print(f"{len(test.image)} test images, {draws} draws of each, standard deviation over draws in bits/dim")
    print(f"{form:>12} {'equal runs':>12} {'by cost':>12} {'ratio of variances':>20} {'difference of means':>22}")
    for number in steps or [5, 10, 20]:
        estimator = FORMS[form](steps=number)
        if not profile.is_measured:
            estimator.measure(profile, module.ema_model, x0, generators, **cond)
        pair = (estimator, estimator.choosing(profile))
        old, new = (draws_of(trained, each, test, draws, f"{number} {each.choice.words}") for each in pair)
        variances = torch.stack([old.var(0), new.var(0)], 1)
        ratio = jackknife(lambda means: means[..., 0] / means[..., 1], variances)
        difference, error = mean_and_error((new - old).mean(0))
        noise = variances.mean(0).sqrt().tolist()
        rows.append({"form": form, "steps": number, "noise": noise, "ratio": [ratio.mean, ratio.se]})
        rows[-1] |= {"difference": [difference, error], "bits_per_dim": [float(old.mean()), float(new.mean())]}
        print(
            f"{number:>6} steps {noise[0]:>12.4f} {noise[1]:>12.4f} {ratio.mean:>11.1f} +- {ratio.se:<5.1f} "
            f"{difference:>11.4f} +- {error:.4f}",
            flush=True,
        )
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    run_script(main, __doc__)
