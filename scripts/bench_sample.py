#!/usr/bin/env python3
"""Images a second of this package's samplers, of diffusers' own pipelines and of a plain loop, with the same network.

    python scripts/bench_sample.py --batch_sizes 16 64 --rounds 7 --json bench_sample.json

All contenders evaluate one and the same diffusers UNet2DModel (random weights, in evaluation mode, float32) as often: the
package's DDIMSampler and AncestralSampler, diffusers' DDIMPipeline and DDPMPipeline, and the ancestral loop of Ho et al.
2020 as one writes it down, in float32 with tables. Rounds are interleaved, so that what else the machine does falls on
all of them; the ratio is the median over rounds of (package / other) within a round, with the smallest and the largest.
--tiny takes a network of next to no arithmetic, which leaves what the samplers themselves cost.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

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
except ImportError:
    sys.exit("bench_sample: error: diffusers is missing: pip install 'ddpm-lightning[interchange]'")

T, SIZE = 1000, 28


class Wrapped(nn.Module):
    """diffusers' network with the call of this package's: its timestep k = 0..T-1 is our time (k + 1)/T."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """eps."""
        output: Tensor = self.unet(x, t * T - 1).sample
        return output


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


def package_run(sampler: Sampler, unet: UNet2DModel, steps: int, device: str) -> Callable[[int, int], Tensor]:
    """(batch, seed) -> images, by the package."""
    model = DiffusionModel(
        Wrapped(unet),
        LinearChain(T),
        EpsParameterization(),
        TimeConditioning(),
        FixedLargeVariance(),
        PlainGaussian(256),
    ).to(device)
    grid = strided_grid(model.grid, steps)

    def run(batch: int, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        x_T = torch.randn(batch, 1, SIZE, SIZE, generator=generator, device=device)
        return sampler(model, x_T, grid=grid, generators=generator)

    return run


def pipeline_run(pipeline: DDIMPipeline | DDPMPipeline, steps: int, device: str) -> Callable[[int, int], Tensor]:
    """(batch, seed) -> images, by diffusers."""
    pipeline = pipeline.to(device)
    pipeline.set_progress_bar_config(disable=True)

    def run(batch: int, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        images: Tensor = pipeline(
            batch_size=batch, generator=generator, num_inference_steps=steps, output_type="pt"
        ).images
        return images

    return run


def loop_run(unet: UNet2DModel, steps: int, device: str) -> Callable[[int, int], Tensor]:
    """(batch, seed) -> images, by the loop that one writes: algorithm 2 on every (T / steps)-th state, x_0 clipped."""
    bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T), 0)[:: T // steps].to(device)
    before = torch.cat([torch.ones(1, device=device), bars[:-1]])
    betas = 1 - bars / before

    def run(batch: int, seed: int) -> Tensor:
        generator = torch.Generator(device).manual_seed(seed)
        x = torch.randn(batch, 1, SIZE, SIZE, generator=generator, device=device)
        for i in range(steps - 1, -1, -1):
            eps = unet(x, torch.full((batch,), i * (T // steps), device=device)).sample
            x0 = ((x - (1 - bars[i]).sqrt() * eps) / bars[i].sqrt()).clamp(-1, 1)
            mean = (before[i].sqrt() * betas[i] * x0 + (1 - betas[i]).sqrt() * (1 - before[i]) * x) / (1 - bars[i])
            z = torch.randn(x.shape, generator=generator, device=device) if i > 0 else torch.zeros_like(x)
            x = mean + betas[i].sqrt() * z
        return x

    return run


def seconds_of(run: Callable[[int, int], Tensor], batch: int, seed: int, device: str) -> float:
    """Seconds of one batch."""
    start = time.perf_counter()
    with torch.inference_mode():
        run(batch, seed)
        if device == "cuda":
            torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[16, 64], help="default: 16 64")
    parser.add_argument("--ddim_steps", type=int, default=50, help="default: 50")
    parser.add_argument("--ancestral_steps", type=int, default=100, help="default: 100")
    parser.add_argument("--rounds", type=int, default=7, help="default: 7")
    parser.add_argument("--tiny", action="store_true", help="a network of next to no arithmetic")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--json", type=Path, help="file for the figures")
    arguments = parser.parse_args()
    numbers = (*arguments.batch_sizes, arguments.ddim_steps, arguments.ancestral_steps, arguments.rounds)
    if min(numbers) < 1 or T % arguments.ancestral_steps or T % arguments.ddim_steps:
        parser.error(f"numbers must be 1 or more, and steps divide {T}")
    device, ddim, ancestral = arguments.device, arguments.ddim_steps, arguments.ancestral_steps
    torch.manual_seed(0)
    unet = unet_of(arguments.tiny).to(device)
    schedule = {"num_train_timesteps": T, "clip_sample": True}
    groups = {
        f"DDIM, {ddim} steps": {
            "package": package_run(DDIMSampler(), unet, ddim, device),
            "diffusers": pipeline_run(DDIMPipeline(unet, DDIMScheduler(**schedule)), ddim, device),
        },
        f"ancestral, {ancestral} steps": {
            "package": package_run(AncestralSampler(), unet, ancestral, device),
            "diffusers": pipeline_run(
                DDPMPipeline(unet, DDPMScheduler(**schedule, variance_type="fixed_large")), ancestral, device
            ),
            "plain loop": loop_run(unet, ancestral, device),
        },
    }
    rows = []
    for batch in arguments.batch_sizes:
        for name, runs in groups.items():
            times: dict[str, list[float]] = {contender: [] for contender in runs}
            for seed in range(arguments.rounds + 1):
                # another one begins each round; round 0 is the warm-up
                order = list(runs)[seed % len(runs) :] + list(runs)[: seed % len(runs)]
                for contender in order:
                    times[contender].append(seconds_of(runs[contender], batch, seed, device))
            for contender, found in times.items():
                ratios = [other / own for own, other in zip(times["package"][1:], found[1:], strict=True)]
                row = {
                    "sampler": name,
                    "batch_size": batch,
                    "contender": contender,
                    "images_per_second": batch / statistics.median(found[1:]),
                    "package_over_it": statistics.median(ratios),
                    "lowest": min(ratios),
                    "highest": max(ratios),
                }
                rows.append(row)
                print(
                    f"{name:<22} batch {batch:<4} {contender:<10} {row['images_per_second']:9.2f} images/s   "
                    f"package / it {row['package_over_it']:.3f} ({row['lowest']:.3f} to {row['highest']:.3f})",
                    flush=True,
                )
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    print(f"peak memory {peak / 2**20:.0f} MiB, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if arguments.json:
        record = {"rows": rows, "peak_bytes": peak, "threads": torch.get_num_threads(), "torch": torch.__version__}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
