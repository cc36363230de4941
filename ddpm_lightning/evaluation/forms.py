"""The three forms of the bound on one model: same images, same number of network evaluations."""

import time
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from ddpm_lightning.errors import at_least
from ddpm_lightning.evaluation.bound import mean_and_error, units_of_density
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.figures import drawn
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.progress import tracked

__all__ = ["forms"]

FORMS: list[ElboEstimator] = [DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo()]


def forms(trained: Trained, T: list[int] | None = None, images: int = 32, draws: int = 4) -> list[dict[str, Any]]:
    """The three forms of the bound on one model: same images, same number of network evaluations.

    Each form is drawn several times for each image over all reverse steps, one network evaluation a step. Its noise is
    the standard deviation over draws at a fixed image, so the spread of the images themselves is not in it. It is given
    twice: as drawn, all steps along one path of the forward process, and as it would be if every step had a draw of its
    own (the root of the summed variances of the steps), which is what a training loss or a subset of steps sees. The
    literal KL is shown apart: it is no term of the bound.

    Writes forms.txt, forms.json and forms.png: for the last T, the steps' cost summed from t = 1 down and each step's
    noise, against t and log SNR.

    Args:
        trained: the run
        T: numbers of states to evaluate, by default the model's own
        images: test images, 2 or more
        draws: draws for each image, 2 or more
    """
    at_least(2, images=images, draws=draws)
    module, test = trained.diffusion, trained.data.split("test")
    batch = test.batch(torch.arange(min(images, len(test)))).map(lambda column: column.to(trained.device))
    model, x0, cond = module.ema_model, module.scale.to_model(batch.image), module.condition(batch)
    rows: list[dict[str, Any]] = []
    for states in T or [model.T]:
        chain = model.with_steps(states)
        found = {form.name: _draw(chain, form, x0, cond, draws, trained.seed) for form in FORMS}
        rows += [_summary(form, states, found[form.name]) for form in FORMS]
    head = [f"{len(x0)} test images, {draws} draws each, averaged weights", *units_of_density(module)]
    text = "\n".join([*head, "", _table(rows)])
    trained.report("forms", text, rows, {"forms.png": _picture(chain, found)})
    return rows


def _draw(
    model: DiffusionModel, form: ElboEstimator, x0: Tensor, cond: dict[str, Tensor], draws: int, seed: int
) -> dict[str, Any]:
    """Every draw's totals ``[draws, B]``, step costs ``[draws, B, T - 1]`` and diagnostics, and the seconds taken."""
    found: list[list[Tensor]] = []
    start = time.perf_counter()
    for number in tracked(range(draws), draws, f"T = {model.T}, {form.name}", "draws", lambda _: 1):
        generators = image_generators(seed + number, range(len(x0)))
        with torch.inference_mode():
            terms = form(model, x0, generators, **cond)
        literal = terms.diagnostics.get("consistency_literal_kl", torch.zeros(0))
        found.append([terms.total.cpu(), terms.step_costs.cpu(), literal.cpu()])
    total, steps, literal = map(torch.stack, zip(*found, strict=True))
    return {"total": total, "steps": steps, "literal": literal, "s": time.perf_counter() - start}


def _summary(form: ElboEstimator, T: int, found: dict[str, Any]) -> dict[str, Any]:
    total, steps = found["total"], found["steps"]
    mean, error = mean_and_error(total.mean(0))
    row = {
        "T": T,
        "form": form.name,
        "elbo_nats": mean,
        "elbo_se": error,
        "noise_one_path": float(total.var(0).mean().sqrt()),
        "noise_separate_steps": float(steps.var(0).sum(1).mean().sqrt()),
        "evaluations_per_image": T,
        "ms_per_image": 1e3 * found["s"] / total.numel(),
    }
    if found["literal"].numel():
        row["literal_kl_nats"] = float(found["literal"].mean())
    return row


def _table(rows: list[dict[str, Any]]) -> str:
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


def _picture(model: DiffusionModel, found: dict[str, dict[str, Any]]) -> Tensor:
    times = model.grid[2:]
    axes_x = {"t": times.cpu(), "log SNR": -model.schedule.mean_gamma(times).detach().cpu()}
    picture = Figure(figsize=(10, 6), dpi=110, layout="constrained")
    axes = picture.subplots(2, 2, sharey="row")
    for column, (label, x) in enumerate(axes_x.items()):
        for name, values in found.items():
            summed = values["steps"].mean((0, 1)).flip(0).cumsum(0).flip(0)
            axes[0, column].plot(x, summed, label=name, linewidth=1)
            axes[1, column].plot(x, values["steps"].var(0).mean(0).sqrt(), label=name, linewidth=1)
        axes[1, column].set_yscale("log")
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("summed cost, nats/image")
    axes[1, 0].set_ylabel("noise of a step, nats/image")
    axes[0, 0].legend()
    picture.suptitle(f"Cost of the steps summed from t = 1 down, and its noise at a fixed image; T = {model.T}")
    return drawn(picture)
