#!/usr/bin/env python3
"""Is the bound as fast as the network allows, and is its memory flat in the number of steps?

    python scripts/bench_bound.py --batch_size 64 --json runs/bench_bound.json
    python scripts/bench_bound.py --network unet --precision bf16 --forms denoising consistency trajectory

First the bound is evaluated with T = 10, 100, 1000, and the largest memory so far is noted after each: on a CPU the
process's own, which never falls, so growth with T shows. Then a bound over all T steps of a chain is timed, which
evaluates the network T times for each image, beside that many evaluations of the network alone: as in training (with
what the backward pass needs) and without gradients, which is the most that the bound could reach.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Literal

import torch
from bench_tools import Bench, Group, Variant, flops_of, parts, peak_memory_mib, timed
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import at_least
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, TrajectoryElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import DiffusionModel, DiscretizedGaussian, GammaConditioning
from ddpm_lightning.schedules import LinearGamma
from ddpm_lightning.training.memory_format import set_memory_format, wants_channels_last

FORMS: dict[str, type[ElboEstimator]] = {form.name: form for form in (DenoisingElbo, ConsistencyElbo, TrajectoryElbo)}


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
    states = sorted(T or [10, 100, 1000])
    at_least(2, T=states[0], timed_T=timed_T)
    at_least(1, width=width)
    half, at = precision == "bf16", bench.at
    torch.manual_seed(0)
    chosen = SimpleUNet() if network == "simple" else UNet(1, width=width, multipliers=(1, 2, 4), blocks=1)
    # laid out as the module would
    set_memory_format(chosen, wants_channels_last("auto", chosen, "bf16-mixed" if half else "32-true", at))
    own = parts(GammaConditioning(), DiscretizedGaussian(256))
    model = DiffusionModel(chosen, LinearGamma(T=10), **own).to(at).eval()

    def evaluate(x0: Tensor, evaluated: Callable[[Tensor], Any], grad: bool = False) -> None:
        with torch.set_grad_enabled(grad), torch.autocast(at.type, torch.bfloat16) if half else nullcontext():
            evaluated(x0)

    def alone(x: Tensor) -> Tensor:
        return model.network(x, x.new_full((len(x),), 0.5))

    def bound(form: str, T: int, x0: Tensor) -> Tensor:
        return FORMS[form](T=T)(model, x0, image_generators(0, range(len(x0)))).total

    memory: dict[int, dict[str, dict[int, float]]] = {}

    def groups() -> Iterator[Group]:
        for size in bench.batch_size or [32]:
            levels = torch.randint(256, (size, 1, 28, 28), generator=torch.Generator().manual_seed(0))
            run = partial(evaluate, (levels / 127.5 - 1).to(at))
            memory[size] = {}
            for form in forms or ["denoising"]:
                found = memory[size].setdefault(form, {})
                for each in states:
                    if at.type == "cuda":
                        torch.cuda.reset_peak_memory_stats(at)
                    run(partial(bound, form, each))
                    found[each] = peak_memory_mib(at)
                print(f"{form} bound, peak memory: " + ", ".join(f"T = {t}: {m:.1f} MiB" for t, m in found.items()))
            steps = {"training forward": partial(run, alone, grad=True), "forward": partial(run, alone)}
            variants = {name: Variant(timed(step, at, repeats=timed_T), (), half) for name, step in steps.items()}
            for form in forms or ["denoising"]:
                variants[f"{form} bound"] = Variant(
                    timed(partial(run, partial(bound, form, timed_T)), at), tuple(steps), half
                )
            yield Group(type(chosen).__name__, size * timed_T, variants, flops_of(steps["forward"]) * timed_T)

    bench.run(groups(), network=network, precision=precision, memory_mib=memory)


if __name__ == "__main__":
    run_script(main, __doc__)
