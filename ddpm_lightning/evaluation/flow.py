"""Log-likelihood of images under the probability-flow ODE of a trained model, in bits/dim."""

from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from ddpm_lightning.data import Batch
from ddpm_lightning.errors import at_least
from ddpm_lightning.evaluation.bound import in_bits, mean_and_error, model_facts, units_of_density
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.metrics import decoded_log_prob, dequantized_log_prob
from ddpm_lightning.ops import image_generators
from ddpm_lightning.samplers import ExactDivergence, FlowLikelihood, HutchinsonDivergence, ProbabilityFlow

__all__ = ["flow"]


def flow(
    trained: Trained,
    images: int = 100,
    steps: int = 50,
    tolerance: float = 0.1,
    max_steps: int = 4000,
    probes: int = 1,
    dequantization: Literal["decoder", "uniform"] = "decoder",
) -> dict[str, Any]:
    """Log-likelihood of test images under the model's probability-flow ODE, in bits/dim.

    A state x_1 of each image is taken to x_T by Runge-Kutta steps equal in log-SNR. The steps of each image are doubled
    until its log density stands still. The divergence along the way is
    Hutchinson's unbiased estimate from random signs, or exact with --probes 0, which takes C H W backward passes for
    each evaluation of the network. The density becomes bits of grey levels by variational dequantisation with the
    model's own q(x_1 | x_0) and decoder, or by uniform noise. The latter is another model, one that rounds, and asks
    for the density between the grey levels, where a denoiser has seen nothing. Both means are upper bounds on the bits
    of the flow, and no bound on those of the stochastic reverse process.

    The standard error is taken over images. The numerical error is the mean of the images' own, as if they all had one
    sign. Writes flow.txt and flow.json.

    Args:
        trained: the run
        images: test images, 2 or more
        steps: steps to begin with, of 4 evaluations of the network each
        tolerance: numerical error of an image's log density, in nats, that is small enough
        max_steps: steps at most
        probes: random signs for each image, 0 for the exact divergence
        dequantization: from density to bits
    """
    at_least(2, images=images)
    at_least(0, probes=probes)
    solver = ProbabilityFlow(steps, tolerance, max_steps)
    facts, chosen = model_facts(trained.diffusion), trained.data.split("test").chosen(images, trained.seed)
    nats, found = _image_nats(trained, chosen, solver, probes, dequantization == "uniform")
    dims = trained.diffusion.dims
    mean, standard_error = mean_and_error(in_bits(nats, dims))
    errors, evaluations = found["error"], found["evaluations"].double()
    numerical_error = -float(in_bits(errors, dims).mean())
    late = int((~(errors <= tolerance)).sum())
    record = {
        **facts,
        "images": len(nats),
        "probes": probes,
        "dequantization": dequantization,
        "tolerance_nats": tolerance,
        "bits_per_dim": mean,
        "se": standard_error,
        "numerical_error": numerical_error,
        "largest_error_nats": float(errors.max()),
        "not_converged": late,
        "steps": {int(n): int((found["steps"] == n).sum()) for n in found["steps"].unique()},
        "evaluations": float(evaluations.mean()),
    }
    lines = [
        f"{mean:.4f} bits/dim, standard error {standard_error:.4f} over {len(nats)} images, numerical error "
        f"{numerical_error:.1g} bits/dim",
        f"numerical error of an image: {float(errors.mean()):.2g} nats in the mean, at most {float(errors.max()):.2g} "
        f"(tolerance {tolerance:g} nats)",
        f"steps: {', '.join(f'{n} for {count} images' for n, count in record['steps'].items())}; "
        f"{record['evaluations']:.0f} evaluations an image",
    ]
    lines += units_of_density(trained.diffusion)
    if late:
        lines.append(
            f"WARNING: {late} of {len(nats)} images have a larger error than that with all steps that --max_steps "
            f"{max_steps} allows: raise it, or read the figure with its numerical error"
        )
    trained.report("flow", "\n".join(lines), record)
    return record


def _image_nats(
    trained: Trained, images: Batch, solver: ProbabilityFlow, probes: int, uniform: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Log probabilities ``[N]``, and error (nats), steps and evaluations of each image."""
    divergence = HutchinsonDivergence(probes) if probes else ExactDivergence()
    module = trained.diffusion
    model = module.ema_model
    nats: list[Tensor] = []
    found: list[FlowLikelihood] = []

    def log_density(x: Tensor, **options: Any) -> Tensor:
        found.append((solver.image_log_likelihood if uniform else solver.log_likelihood)(model, x, **options))
        return found[-1].log_prob

    for part in trained.batches(images, "flow"):
        x0, generators = module.scale.to_model(part.image), image_generators(trained.seed, part.index)
        cond = module.condition(part)
        density = partial(log_density, divergence=divergence, generators=generators, **cond)
        if uniform:
            values = dequantized_log_prob(density, x0, module.grey_levels, generators)
        else:
            with torch.no_grad():
                values = decoded_log_prob(density, model, x0, generators, **cond)
        nats.append(values.cpu())
    names = ("error", "steps", "evaluations")
    return torch.cat(nats), {name: torch.cat([getattr(f, name).cpu() for f in found]) for name in names}
