#!/usr/bin/env python3
"""Is the bound as fast as the network allows, and is its memory flat in the number of steps?

    python scripts/bench_bound.py --batch_size 64 --json runs/bench_bound.json
    python scripts/bench_bound.py --network unet --precision bf16 --forms denoising consistency trajectory

A bound over all T steps of a chain evaluates the network T times for each image. Its images x steps a second are set
beside those of the network alone: a forward pass as in training (with what the backward pass needs) and one without
gradients, which is the most that the bound could reach. Then the bound is evaluated with T = 10, 100, 1000, and the
largest memory so far is noted after each: on a CPU the process's own, which never falls, so growth with T shows.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from bench_tools import (
    Seconds,
    Timer,
    add_options,
    at_least_one,
    flops_of,
    interleave,
    machine,
    peak_memory_mib,
    ratio,
    row,
    table,
    timed,
    write_json,
)
from torch import Tensor

from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    GammaConditioning,
)
from ddpm_lightning.schedules import LinearGamma
from ddpm_lightning.training.memory_format import set_memory_format, wants_channels_last

FORMS: dict[str, type[ElboEstimator]] = {form.name: form for form in (DenoisingElbo, ConsistencyElbo, TrajectoryElbo)}


def model_of(network: str, width: int, half: bool, device: torch.device) -> DiffusionModel:
    """A model with random weights, laid out as the module would."""
    torch.manual_seed(0)
    chosen = SimpleUNet() if network == "simple" else UNet(1, width=width, multipliers=(1, 2, 4), blocks=1)
    precision = "bf16-mixed" if half else "32-true"
    set_memory_format(chosen, wants_channels_last("auto", chosen, precision, device))
    parts = (EpsParameterization(), GammaConditioning(), FixedLargeVariance(), DiscretizedGaussian(256))
    return DiffusionModel(chosen, LinearGamma(T=10), *parts).to(device).eval()


def measure(batch_size: int, options: argparse.Namespace) -> dict[str, Any]:
    """Rates and memory at a batch size."""
    device, half = options.device, options.precision == "bf16"
    model = model_of(options.network, options.width, half, device)
    generator = torch.Generator().manual_seed(0)
    x0 = (torch.randint(256, (batch_size, 1, 28, 28), generator=generator) / 127.5 - 1).to(device)
    level = torch.full((batch_size,), 0.5, device=device)

    def precision() -> AbstractContextManager[Any]:
        return torch.autocast(device.type, torch.bfloat16) if half else nullcontext()

    def training_forward() -> Tensor:
        with precision():
            return model.network(x0, level)

    @torch.no_grad()
    def forward() -> Tensor:
        with precision():
            return model.network(x0, level)

    def bound(form: str, T: int) -> Callable[[], Tensor]:
        estimator = FORMS[form](T=T)

        @torch.no_grad()
        def step() -> Tensor:
            with precision():
                return estimator(model, x0, image_generators(0, range(batch_size))).total

        return step

    def repeated(step: Callable[[], Any]) -> Callable[[int], Seconds]:
        """One of its "steps" is as many evaluations of the network as a bound's."""

        def go(steps: int) -> Seconds:
            timer = Timer(device)
            step()
            timer.start()
            for _ in range(steps * options.timed_T):
                step()
            return timer.stop()

        return go

    variants = {
        "training forward": repeated(training_forward),
        "forward": repeated(forward),
        **{f"{form} bound": timed(bound(form, options.timed_T), device) for form in options.forms},
    }
    seconds = interleave(variants, options.rounds, options.steps, options.warm_up)
    flops = flops_of(forward) * options.timed_T
    rows = {name: row(values, batch_size * options.timed_T, flops, None) for name, values in seconds.items()}
    ratios = {
        f"{form} bound / {base}": ratio(seconds[base], seconds[f"{form} bound"])
        for form in options.forms
        for base in ("training forward", "forward")
    }
    print(f"\n{options.network}, {options.precision}, batches of {batch_size}, T = {options.timed_T}: images x steps")
    print(table(rows))
    for name, figures in ratios.items():
        print(
            f"{name}: {figures['ratio']:.2f} ({figures['low']:.2f}..{figures['high']:.2f}),"
            f" by CPU time {figures['ratio_cpu']:.2f}"
        )
    memory: dict[str, dict[str, float]] = {}
    for form in options.forms:
        memory[form] = {}
        for T in sorted(options.T):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            bound(form, T)()
            memory[form][str(T)] = peak_memory_mib(device)
        print(f"{form} bound, peak memory: " + ", ".join(f"T = {T}: {m:.1f} MiB" for T, m in memory[form].items()))
    return {"batch_size": batch_size, "T": options.timed_T, "rows": rows, "ratios": ratios, "memory_mib": memory}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, batch_size=32)
    parser.add_argument("--network", choices=("simple", "unet"), default="unet")
    parser.add_argument("--width", type=at_least_one, default=32, help="channels of the U-Net at full resolution")
    parser.add_argument("--precision", choices=("32", "bf16"), default="32")
    parser.add_argument("--forms", choices=tuple(FORMS), nargs="+", default=["denoising"])
    parser.add_argument("--timed_T", type=at_least_one, default=10, help="steps of the chain whose bound is timed")
    parser.add_argument("--T", type=at_least_one, nargs="+", default=[10, 100, 1000], help="chains for the memory")
    options = parser.parse_args()
    if min(options.timed_T, *options.T) < 2:
        parser.error("--T and --timed_T must be 2 or more")
    record = {"machine": machine(options.device), "network": options.network, "precision": options.precision}
    print(f"{record['machine']['device']}, {record['machine']['threads']} thread(s), torch {torch.__version__}")
    record["batches"] = [measure(batch_size, options) for batch_size in options.batch_size]
    write_json(options.json, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
