#!/usr/bin/env python3
"""Images a second of this package's samplers, of diffusers' own pipelines and of a plain loop, with the same network.

    python scripts/bench_sample.py --batch_size 16 64 --rounds 7 --steps 1 --warm_up 1 --json bench_sample.json

All contenders evaluate one and the same diffusers UNet2DModel (random weights, in evaluation mode, float32) as often:
the package's DDIMSampler and AncestralSampler, diffusers' DDIMPipeline and DDPMPipeline, and the ancestral loop of Ho
et al. 2020 as one writes it down, in float32 with tables. --tiny takes a network of next to no arithmetic, which
leaves what the samplers themselves cost.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_tools import Bench, Group, Variant, parts, timed, unet2d
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import DiffusionModel, PlainGaussian, TimeConditioning
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, Sampler
from ddpm_lightning.schedules import LinearChain, strided_grid

try:
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler

    from ddpm_lightning.export.diffusers import UNet2DNetwork
except ImportError:
    sys.exit("bench_sample: error: diffusers is missing: pip install 'ddpm-lightning[export]'")

T = 1000
Draw = Callable[[int, torch.Generator], Tensor]
"""Images of a batch size."""


def package(sampler: Sampler, unet: Any, steps: int, at: torch.device) -> Draw:
    """The package's sampler."""
    own = parts(TimeConditioning(), PlainGaussian(256))
    model = DiffusionModel(UNet2DNetwork(unet, T), LinearChain(T), **own).to(at)
    grid = strided_grid(model.grid, steps)

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        x_T = torch.randn(batch, 1, 28, 28, generator=generator, device=at)
        return sampler(model, x_T, grid=grid, generators=generator)

    return draw


def pipeline(kind: Any, scheduler: Any, unet: Any, steps: int, at: torch.device) -> Draw:
    """diffusers' own pipeline."""
    made = kind(unet, scheduler).to(at)
    made.set_progress_bar_config(disable=True)
    return lambda batch, generator: (
        made(batch_size=batch, generator=generator, num_inference_steps=steps, output_type="pt").images
    )


def loop(unet: Any, steps: int, at: torch.device) -> Draw:
    """The loop that one writes: algorithm 2 on every (T / steps)-th state, x_0 clipped."""
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)[:: T // steps].to(at)
    before = torch.cat([torch.ones(1, device=at), bars[:-1]])
    betas = 1 - bars / before

    def draw(batch: int, generator: torch.Generator) -> Tensor:
        x = torch.randn(batch, 1, 28, 28, generator=generator, device=at)
        for i in range(steps - 1, -1, -1):
            eps = unet(x, torch.full((batch,), i * (T // steps), device=at)).sample
            x0 = ((x - (1 - bars[i]).sqrt() * eps) / bars[i].sqrt()).clamp(-1, 1)
            mean = (before[i].sqrt() * betas[i] * x0 + (1 - betas[i]).sqrt() * (1 - before[i]) * x) / (1 - bars[i])
            z = torch.randn(x.shape, generator=generator, device=at) if i > 0 else torch.zeros_like(x)
            x = mean + betas[i].sqrt() * z
        return x

    return draw


def main(bench: Bench, ddim_steps: int = 50, ancestral_steps: int = 100, tiny: bool = False) -> None:
    """Measure at each batch size.

    Args:
        bench: what every benchmark is told
        ddim_steps: steps of DDIM
        ancestral_steps: steps of ancestral sampling
        tiny: a network of next to no arithmetic
    """
    for name, steps in {"ddim_steps": ddim_steps, "ancestral_steps": ancestral_steps}.items():
        if steps < 1 or T % steps:
            raise InputError(f"{name} = {steps} must divide {T}")
    at = bench.at
    torch.manual_seed(0)
    unet = unet2d(*((8, 8) if tiny else (32, 64))).eval().to(at)
    schedule = {"num_train_timesteps": T, "clip_sample": True}
    fixed_large = DDPMScheduler(**schedule, variance_type="fixed_large")
    contests: dict[str, dict[str, Draw]] = {
        f"DDIM, {ddim_steps} steps": {
            "diffusers": pipeline(DDIMPipeline, DDIMScheduler(**schedule), unet, ddim_steps, at),
            "package": package(DDIMSampler(), unet, ddim_steps, at),
        },
        f"ancestral, {ancestral_steps} steps": {
            "diffusers": pipeline(DDPMPipeline, fixed_large, unet, ancestral_steps, at),
            "plain loop": loop(unet, ancestral_steps, at),
            "package": package(AncestralSampler(), unet, ancestral_steps, at),
        },
    }

    @torch.inference_mode()
    def step(draw: Draw, size: int) -> None:
        draw(size, torch.Generator(at).manual_seed(0))

    def group(name: str, draws: dict[str, Draw], size: int) -> Group:
        others = tuple(other for other in draws if other != "package")
        goes = {contender: timed(partial(step, draw, size), at, warm=False) for contender, draw in draws.items()}
        return Group(name, size, {c: Variant(go, others if c == "package" else ()) for c, go in goes.items()})

    sizes = bench.batch_size or [16, 64]
    bench.run(group(name, draws, size) for size in sizes for name, draws in contests.items())


if __name__ == "__main__":
    run_script(main, __doc__)
