#!/usr/bin/env python3
"""Images a second of this package's samplers, of diffusers' own pipelines and of a plain loop, with the same network.

    python scripts/bench_sample.py --batch_size 16 64 --rounds 7 --steps 1 --warm_up 1 --json bench_sample.json

All contenders evaluate one and the same diffusers UNet2DModel (random weights, in evaluation mode, float32) as often:
the package's DDIMSampler and AncestralSampler, diffusers' DDIMPipeline and DDPMPipeline, and the ancestral loop of Ho
et al. 2020 as one writes it down, in float32 with tables. Rounds are interleaved, so that what else the machine does
falls on all of them; a ratio says how many times as fast the package is: the median over rounds of the two of a round,
with its quartiles. --tiny takes a network of next to no arithmetic, which leaves what the samplers themselves cost.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from bench_tools import Bench, machine, peak_memory_mib, ratio, report, row, timed
from torch import Tensor

from ddpm_lightning.command_line import run_script
from ddpm_lightning.errors import InputError
from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    PlainGaussian,
    TimeConditioning,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, Sampler
from ddpm_lightning.schedules import LinearChain, strided_grid

try:
    from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

    from ddpm_lightning.export.diffusers import UNet2DNetwork
except ImportError:
    sys.exit("bench_sample: error: diffusers is missing: pip install 'ddpm-lightning[export]'")

T, SIZE = 1000, 28
Draw = Callable[[int], Tensor]


def unet_of(tiny: bool) -> UNet2DModel:
    """A small U-Net for images of 28 x 28."""
    channels = (8, 8) if tiny else (32, 64)
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=channels,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        norm_num_groups=8,
    ).eval()


def package_run(sampler: Sampler, unet: UNet2DModel, steps: int, device: str) -> Draw:
    """batch -> images, by the package."""
    parts = (EpsParameterization(), TimeConditioning(), FixedLargeVariance(), PlainGaussian(256))
    model = DiffusionModel(UNet2DNetwork(unet, T), LinearChain(T), *parts).to(device)
    grid = strided_grid(model.grid, steps)

    def run(batch: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        x_T = torch.randn(batch, 1, SIZE, SIZE, generator=generator, device=device)
        return sampler(model, x_T, grid=grid, generators=generator)

    return run


def pipeline_run(pipeline: DDIMPipeline | DDPMPipeline, steps: int, device: str) -> Draw:
    """batch -> images, by diffusers."""
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)

    def run(batch: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        images: Tensor = pipeline(
            batch_size=batch, generator=generator, num_inference_steps=steps, output_type="pt"
        ).images
        return images

    return run


def loop_run(unet: UNet2DModel, steps: int, device: str) -> Draw:
    """batch -> images, by the loop that one writes: algorithm 2 on every (T / steps)-th state, x_0 clipped."""
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)[:: T // steps].to(device)
    before = torch.cat([torch.ones(1, device=device), bars[:-1]])
    betas = 1 - bars / before

    def run(batch: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(0)
        x = torch.randn(batch, 1, SIZE, SIZE, generator=generator, device=device)
        for i in range(steps - 1, -1, -1):
            eps = unet(x, torch.full((batch,), i * (T // steps), device=device)).sample
            x0 = ((x - (1 - bars[i]).sqrt() * eps) / bars[i].sqrt()).clamp(-1, 1)
            mean = (before[i].sqrt() * betas[i] * x0 + (1 - betas[i]).sqrt() * (1 - before[i]) * x) / (1 - bars[i])
            z = torch.randn(x.shape, generator=generator, device=device) if i > 0 else torch.zeros_like(x)
            x = mean + betas[i].sqrt() * z
        return x

    return run


def main(
    bench: Bench,
    ddim_steps: int = 50,
    ancestral_steps: int = 100,
    tiny: bool = False,
) -> None:
    """Measure at each batch size.

    Args:
        bench: what every benchmark is told
        ddim_steps: steps of DDIM
        ancestral_steps: steps of ancestral sampling
        tiny: a network of next to no arithmetic
    """
    for name, steps in {"ddim_steps": ddim_steps, "ancestral_steps": ancestral_steps}.items():
        if steps < 1 or T % steps:
            raise InputError(f"--{name} {steps} must divide {T}")
    at, device = bench.at, bench.device
    torch.manual_seed(0)
    unet, schedule = unet_of(tiny).to(at), {"num_train_timesteps": T, "clip_sample": True}
    ancestral = DDPMPipeline(unet, DDPMScheduler(**schedule, variance_type="fixed_large"))
    groups: dict[str, dict[str, Draw]] = {
        f"DDIM, {ddim_steps} steps": {
            "package": package_run(DDIMSampler(), unet, ddim_steps, device),
            "diffusers": pipeline_run(DDIMPipeline(unet, DDIMScheduler(**schedule)), ddim_steps, device),
        },
        f"ancestral, {ancestral_steps} steps": {
            "package": package_run(AncestralSampler(), unet, ancestral_steps, device),
            "diffusers": pipeline_run(ancestral, ancestral_steps, device),
            "plain loop": loop_run(unet, ancestral_steps, device),
        },
    }
    record: dict[str, Any] = {"machine": machine(at), "groups": []}
    for size in bench.batch_size or [16, 64]:
        for name, runs in groups.items():
            steps_of = {other: torch.inference_mode()(partial(run, size)) for other, run in runs.items()}
            variants = {other: timed(step, at, warm=False) for other, step in steps_of.items()}
            seconds = bench.measure(variants)
            rows = {contender: row(values, size, None, None) for contender, values in seconds.items()}
            ratios = {
                f"package / {other}": ratio(seconds[other], seconds["package"]) for other in runs if other != "package"
            }
            report(f"{name}, batches of {size}", rows, ratios)
            record["groups"].append({"group": name, "batch_size": size, "rows": rows, "ratios": ratios})
    record["peak_memory_mib"] = peak_memory_mib(at)
    print(f"peak memory {record['peak_memory_mib']:.0f} MiB")
    bench.write(record)


if __name__ == "__main__":
    run_script(main, __doc__)
