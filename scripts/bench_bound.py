#!/usr/bin/env python3
"""Is the bound as fast as the network allows, and is its memory flat in the number of steps?

    python scripts/bench_bound.py --batch_size 64 --json runs/bench_bound.json
    python scripts/bench_bound.py --network unet --precision bf16 --forms denoising consistency trajectory

A bound over all T steps of a chain evaluates the network T times for each image. Its images x steps a second are set
beside those of the network alone: a forward pass as in training (with what the backward pass needs) and one without
gradients, which is the most that the bound could reach. Then the bound is evaluated with T = 10, 100, 1000, and the
largest memory so far is noted after each: on a CPU the process's own, which never falls, so growth with T shows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch
from bench_tools import (
    Bench,
    Seconds,
    Timer,
    flops_of,
    machine,
    peak_memory_mib,
    ratio,
    report,
    row,
    timed,
)
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import at_least
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


def measure(
    model: DiffusionModel, batch_size: int, half: bool, forms: list[str], timed_T: int, T: list[int], bench: Bench
) -> dict[str, Any]:
    """Rates and memory at a batch size."""
    device = bench.at
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
            for _ in range(steps * timed_T):
                step()
            return timer.stop()

        return go

    variants = {
        "training forward": repeated(training_forward),
        "forward": repeated(forward),
        **{f"{form} bound": timed(bound(form, timed_T), device) for form in forms},
    }
    seconds = bench.measure(variants)
    flops = flops_of(forward) * timed_T
    rows = {name: row(values, batch_size * timed_T, flops, None) for name, values in seconds.items()}
    ratios = {
        f"{form} bound / {base}": ratio(seconds[base], seconds[f"{form} bound"])
        for form in forms
        for base in ("training forward", "forward")
    }
    name = type(model.network).__name__
    report(f"{name}, batches of {batch_size}, T = {timed_T}: images x steps", rows, ratios)
    memory: dict[str, dict[str, float]] = {}
    for form in forms:
        memory[form] = {}
        for states in sorted(T):
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            bound(form, states)()
            memory[form][str(states)] = peak_memory_mib(device)
        print(f"{form} bound, peak memory: " + ", ".join(f"T = {t}: {m:.1f} MiB" for t, m in memory[form].items()))
    return {"batch_size": batch_size, "T": timed_T, "rows": rows, "ratios": ratios, "memory_mib": memory}


def main(
    bench: Bench,
    network: Literal["simple", "unet"] = "unet",
    width: int = 32,
    precision: Literal["32", "bf16"] = "32",
    forms: list[Literal["denoising", "consistency", "trajectory"]] | None = None,
    timed_T: int = 10,
    T: list[int] | None = None,
) -> None:
    """Measure at each batch size.

    Args:
        bench: what every benchmark is told
        network: whose bound
        width: channels of the U-Net at full resolution
        precision: of the network
        forms: forms of the bound, by default denoising
        timed_T: states of the chain whose bound is timed
        T: states of the chains for the memory, by default 10 100 1000
    """
    T = T or [10, 100, 1000]
    at_least(2, T=min(T), timed_T=timed_T)
    at_least(1, width=width)
    half = precision == "bf16"
    record: dict[str, Any] = {"machine": machine(bench.at), "network": network, "precision": precision}
    print(f"{record['machine']['device']}, {record['machine']['threads']} thread(s), torch {torch.__version__}")
    model = model_of(network, width, half, bench.at)
    record["batches"] = [
        measure(model, size, half, list(forms or ["denoising"]), timed_T, T, bench) for size in bench.batch_size or [32]
    ]
    bench.write(record)


if __name__ == "__main__":
    run_script(main, __doc__)
