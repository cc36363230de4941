"""Log-likelihood of images under the probability-flow ODE of a trained model, in bits/dim."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_lightning.data import Batch, levels_to_model
from ddpm_lightning.evaluation.bound import image_batches, mean_and_error, model_facts
from ddpm_lightning.metrics import bits_per_dim, decoded_log_prob, dequantized_log_prob
from ddpm_lightning.ops import image_generators
from ddpm_lightning.samplers import ExactDivergence, HutchinsonDivergence, ProbabilityFlow
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["Dequantization", "measure_flow"]

Dequantization = Literal["decoder", "uniform"]


def measure_flow(
    module: DiffusionModule,
    images: Batch,
    steps: int = 50,
    probes: int = 1,
    dequantization: Dequantization = "decoder",
    check: bool = False,
    seed: int = 0,
    batch_size: int = 50,
) -> tuple[str, dict[str, Any]]:
    """Mean bits/dim of images, with its standard error over images.

    Args:
        module: the trained module.
        images: two or more. Image k has noise of its own, whatever else is evaluated.
        steps: Runge-Kutta steps, of 4 evaluations of the network each.
        probes: random signs for each image, from which the divergence is estimated; 0 for the exact one.
        dequantization: how the density becomes bits of grey levels.
        check: take twice as many steps as well.
        seed: seed of the noise.
        batch_size: images evaluated at a time.

    Returns:
        The results as text and as plain data.
    """
    lines, rows, values = [], [], []
    for flow in map(ProbabilityFlow, (steps, 2 * steps) if check else (steps,)):
        bits = _image_bits(module, images, flow, probes, dequantization, seed, batch_size)
        mean, error = mean_and_error(bits)
        values.append(bits)
        rows.append({"steps": flow.steps, "evaluations": flow.evaluations, "bits_per_dim": mean, "se": error})
        lines.append(f"{flow.steps} steps, {flow.evaluations} evaluations: {mean:.4f} +- {error:.4f} bits/dim")
    record = {
        **model_facts(module),
        "images": len(images.image),
        "probes": probes,
        "dequantization": dequantization,
        "figures": rows,
    }
    if check:
        change = values[1] - values[0]
        record["change"] = {"mean": float(change.mean()), "largest": float(change.abs().max())}
        lines.append(f"twice the steps: {change.mean():+.5f} bits/dim, at most {change.abs().max():.5f} for an image")
    return "\n".join(lines), record


def _image_bits(
    module: DiffusionModule,
    images: Batch,
    flow: ProbabilityFlow,
    probes: int,
    dequantization: Dequantization,
    seed: int,
    batch_size: int,
) -> Tensor:
    """Bits/dim of each image, float64 ``[N]``."""
    divergence = HutchinsonDivergence(probes) if probes else ExactDivergence()
    model, levels, results = module.ema_model, module.levels, []
    for part in image_batches(images, batch_size, module.device, f"{flow.steps} steps"):
        x0, generators = levels_to_model(part.image, levels), image_generators(seed, part.index)
        cond = {"label": part.label} if module.class_conditional else {}
        likelihood = flow.image_log_likelihood if dequantization == "uniform" else flow.log_likelihood
        density = partial(likelihood, model, divergence=divergence, generators=generators, **cond)

        def log_density(x: Tensor, density: Callable[[Tensor], Any] = density) -> Tensor:
            nats: Tensor = density(x).log_prob
            return nats

        if dequantization == "uniform":
            nats = dequantized_log_prob(log_density, x0, levels, generators)
        else:
            with torch.no_grad():
                nats = decoded_log_prob(log_density, model, x0, generators, **cond)
        results.append(nats.cpu())
    return torch.tensor([-bits_per_dim(nats, module.dims) for nats in torch.cat(results).tolist()], dtype=torch.float64)
