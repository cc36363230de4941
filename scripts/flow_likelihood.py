#!/usr/bin/env python3
"""Log-likelihood of test images under the probability-flow ODE of a run's model, in bits/dim.

    python scripts/flow_likelihood.py --config RUN/config.yaml --ckpt_path RUN/checkpoints/last.ckpt

A state x_1 of each image is taken to x_T by Runge-Kutta steps equal in log-SNR; the divergence along the way is
Hutchinson's unbiased estimate from --probes random signs, or exact with --probes 0, which takes C H W backward passes
for each evaluation of the network. The density becomes bits of grey levels by variational dequantisation with the
model's own q(x_1 | x_0) and decoder (--dequantization decoder) or by uniform noise (uniform), which is another model,
one that rounds, and asks for the density between the grey levels where a denoiser has seen nothing. Both means are
upper bounds on the bits of the flow, and no bound on those of the stochastic reverse process. Image k has noise of its
own, whatever else is evaluated. --check takes twice as many steps as well: what that changes is what the grid costs.

The standard error is that over images. Writes flow.json to --out.
"""

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.callbacks.reports import model_facts
from ddpm_lightning.data import Batch, levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import MeanAndError, bits_per_dim, decoded_log_prob, dequantized_log_prob
from ddpm_lightning.ops import image_generators
from ddpm_lightning.runs import load_run
from ddpm_lightning.samplers import ExactDivergence, HutchinsonDivergence, ProbabilityFlow
from ddpm_lightning.training import DiffusionModule


def flow_bits(module: DiffusionModule, batch: Batch, flow: ProbabilityFlow, arguments: argparse.Namespace) -> Tensor:
    """Bits/dim of each image, float64 ``[N]``."""
    divergence = HutchinsonDivergence(arguments.probes) if arguments.probes else ExactDivergence()
    model, levels = module.ema_model, module.levels
    start, results = time.perf_counter(), []
    for first in range(0, len(batch.image), arguments.batch_size):
        part = Batch(*(column[first : first + arguments.batch_size].to(module.device) for column in batch))
        x0, generators = levels_to_model(part.image, levels), image_generators(arguments.seed, part.index)
        options: dict[str, Any] = {"divergence": divergence, "generators": generators}
        cond = {"label": part.label} if module.class_conditional else {}
        if arguments.dequantization == "uniform":
            density = partial(flow.image_log_likelihood, model, **options, **cond)
            nats = dequantized_log_prob(lambda x, f=density: f(x).log_prob, x0, levels, generators)
        else:
            density = partial(flow.log_likelihood, model, **options, **cond)
            with torch.no_grad():
                nats = decoded_log_prob(lambda x, f=density: f(x).log_prob, model, x0, generators, **cond)
        results.append(nats.cpu())
        done, seconds = first + len(x0), time.perf_counter() - start
        print(f"{flow.steps} steps: {done} of {len(batch.image)} images, {seconds:.0f} s", file=sys.stderr, flush=True)
    return torch.tensor([-bits_per_dim(nats, module.dims) for nats in torch.cat(results).tolist()], dtype=torch.float64)


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, required=True, help="config.yaml of the run: names the data")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of the run")
    parser.add_argument("--images", type=int, default=100, help="test images (default: 100)")
    parser.add_argument("--steps", type=int, default=50, help="steps, of 4 evaluations of the network (default: 50)")
    parser.add_argument("--probes", type=int, default=1, help="random signs for each image; 0: exact (default: 1)")
    parser.add_argument(
        "--dequantization",
        choices=("decoder", "uniform"),
        default="decoder",
        help="from density to bits (default: decoder)",
    )
    parser.add_argument("--check", action="store_true", help="take twice as many steps as well")
    parser.add_argument("--seed", type=int, default=0, help="seed of the choice of images and the noise (default: 0)")
    parser.add_argument("--batch_size", type=int, default=50, help="images evaluated at a time (default: 50)")
    parser.add_argument("--device", default="cpu", help="where to evaluate, cpu or cuda (default: cpu)")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the results (default: this one)")
    arguments = parser.parse_args()
    if arguments.images < 2 or arguments.batch_size < 1 or arguments.probes < 0:
        parser.error("--images must be 2 or more, --batch_size 1 or more, --probes 0 or more")
    try:
        module, data = load_run(arguments.config, arguments.ckpt_path)
        module.to(arguments.device)
        batch = data.split("test").chosen(arguments.images, arguments.seed)
        rows, values = [], []
        for steps in (arguments.steps, 2 * arguments.steps) if arguments.check else (arguments.steps,):
            flow = ProbabilityFlow(steps)
            bits = flow_bits(module, batch, flow, arguments)
            figure = MeanAndError()
            figure.update(bits)
            result = figure.compute()
            mean, error = float(result["mean"]), float(result["se"])
            values.append(bits)
            rows.append({"steps": steps, "evaluations": flow.evaluations, "bits_per_dim": mean, "se": error})
            print(f"{steps} steps, {flow.evaluations} evaluations: {mean:.4f} +- {error:.4f} bits/dim", flush=True)
    except InputError as error:
        print(f"flow_likelihood: error: {error}", file=sys.stderr)
        return 2
    record = {
        **model_facts(module),
        "images": len(batch.image),
        "probes": arguments.probes,
        "dequantization": arguments.dequantization,
        "figures": rows,
    }
    if arguments.check:
        change = values[1] - values[0]
        record["change"] = {"mean": float(change.mean()), "largest": float(change.abs().max())}
        print(f"twice the steps: {change.mean():+.5f} bits/dim, at most {change.abs().max():.5f} for an image")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "flow.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
