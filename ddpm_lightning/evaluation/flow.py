"""Log-likelihood of images under the probability-flow ODE of a trained model, in bits/dim."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_lightning.data import Batch
from ddpm_lightning.errors import at_least
from ddpm_lightning.evaluation.bound import in_bits, mean_and_error, model_facts
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.metrics import decoded_log_prob, dequantized_log_prob
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.samplers import ExactDivergence, HutchinsonDivergence, ProbabilityFlow

__all__ = ["flow"]


def flow(
    trained: Trained,
    images: int = 100,
    steps: int = 50,
    probes: int = 1,
    dequantization: Literal["decoder", "uniform"] = "decoder",
    check: bool = False,
) -> dict[str, Any]:
    """Log-likelihood of test images under the model's probability-flow ODE, in bits/dim.

    A state x_1 of each image is taken to x_T by Runge-Kutta steps equal in log-SNR. The divergence along the way is
    Hutchinson's unbiased estimate from random signs, or exact with --probes 0, which takes C H W backward passes for
    each evaluation of the network. The density becomes bits of grey levels by variational dequantisation with the
    model's own q(x_1 | x_0) and decoder, or by uniform noise. The latter is another model, one that rounds, and asks
    for the density between the grey levels, where a denoiser has seen nothing. Both means are upper bounds on the bits
    of the flow, and no bound on those of the stochastic reverse process.

    The standard error is taken over images. Writes flow.txt and flow.json.

    Args:
        trained: the run
        images: test images, 2 or more
        steps: steps, of 4 evaluations of the network each
        probes: random signs for each image, 0 for the exact divergence
        dequantization: from density to bits
        check: take twice as many steps as well; what that changes is what the grid costs
    """
    at_least(2, images=images)
    at_least(0, probes=probes)
    facts, chosen = model_facts(trained.diffusion), trained.data.split("test").chosen(images, trained.seed)
    lines, rows, values = [], [], []
    for solver in map(ProbabilityFlow, (steps, 2 * steps) if check else (steps,)):
        bits = _image_bits(trained, chosen, solver, probes, dequantization == "uniform")
        mean, error = mean_and_error(bits)
        values.append(bits)
        rows.append({"steps": solver.steps, "evaluations": solver.evaluations, "bits_per_dim": mean, "se": error})
        lines.append(f"{solver.steps} steps, {solver.evaluations} evaluations: {mean:.4f} +- {error:.4f} bits/dim")
    record = {
        **facts,
        "images": len(chosen.image),
        "probes": probes,
        "dequantization": dequantization,
        "figures": rows,
    }
    if check:
        change = values[1] - values[0]
        record["change"] = {"mean": float(change.mean()), "largest": float(change.abs().max())}
        lines.append(f"twice the steps: {change.mean():+.5f} bits/dim, at most {change.abs().max():.5f} for an image")
    trained.report("flow", "\n".join(lines), record)
    return record


def _image_bits(trained: Trained, images: Batch, solver: ProbabilityFlow, probes: int, uniform: bool) -> Tensor:
    divergence = HutchinsonDivergence(probes) if probes else ExactDivergence()
    module, results = trained.diffusion, []
    model = module.ema_model
    for part in trained.batches(images, f"{solver.steps} steps"):
        x0, generators = module.scale.to_model(part.image), image_generators(trained.seed, part.index)
        cond = module.condition(part)
        likelihood = solver.image_log_likelihood if uniform else solver.log_likelihood
        density = partial(_log_prob, likelihood, model, divergence=divergence, generators=generators, **cond)
        if uniform:
            nats = dequantized_log_prob(density, x0, module.grey_levels, generators)
        else:
            with torch.no_grad():
                nats = decoded_log_prob(density, model, x0, generators, **cond)
        results.append(nats.cpu())
    return in_bits(torch.cat(results), module.dims)


def _log_prob(likelihood: Callable[..., Any], model: DiffusionModel, x: Tensor, **options: Any) -> Tensor:
    nats: Tensor = likelihood(model, x, **options).log_prob
    return nats
