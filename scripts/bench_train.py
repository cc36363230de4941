#!/usr/bin/env python3
"""How fast is a training step, beside the lecture's plain loop and beside diffusers?

    python scripts/bench_train.py --batch_size 128 --json runs/bench_train.json
    python scripts/bench_train.py --device cuda --batch_size 128 1024 --steps 50

Everything runs in one process, in interleaved rounds, on random images of MNIST's shape:

    lecture    the lecture's loop by hand (float32 images in memory, uniform t, noise, MSE, Adam) and the package with
               the same network at the same precision: the objective and the optimiser alone, with the average of the
               weights, and the real Trainer with its hooks, log and average; then the Trainer with this device's
               defaults (channels_last, fused Adam) in float32 and bf16-mixed and, with --compile, the compiled network
    unet       the package's U-Net under the Trainer: which of the switches gain
    diffusers  the training step of diffusers and the package's on the same UNet2DModel (if diffusers is installed)
    overhead   a network of two weights: what a Trainer's step costs more than the bare step

Rates are medians over rounds with their quartiles; a ratio is the median of the ratios within a round, by the clock and
by this process's CPU time. FLOPs are those of matrix products and convolutions (torch.utils.flop_counter); the peak is
the faster of a large product and a convolution in the same data type, timed in the same rounds.
"""

import logging
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, Literal, get_args

import torch
from bench_tools import (
    Bench,
    Seconds,
    Timer,
    flops_of,
    interleave,
    machine,
    peak_memory_mib,
    peak_rates,
    ratio,
    report,
    row,
    timed,
)
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ddpm_lightning.callbacks import ImagesPerSecond
from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import Batch, ImageDataModule, levels_to_model
from ddpm_lightning.data.batches import Split, TrainBatches
from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.objectives import NoiseMSE, UniformTimes
from ddpm_lightning.process import DiscretizedGaussian, EpsParameterization, FixedLargeVariance, TimeConditioning
from ddpm_lightning.schedules import LinearChain
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.ema import WeightAverage

T = 300
SHAPE = (1, 28, 28)
IMAGES = 4096
Go = Callable[[int], Seconds]


class RandomImages(ImageDataModule):
    """Random grey levels in MNIST's shape, and a clock that the Trainer's own loop drives."""

    shape = SHAPE
    levels = 256
    num_classes = 10

    def __init__(self, batch_size: int) -> None:
        n = max(IMAGES, batch_size)
        super().__init__({"train": n, "val": 1, "test": 1}, batch_size=batch_size)

    def load(self, split: SplitName) -> Split:
        """Random images."""
        generator, n = torch.Generator().manual_seed(0), self.sizes[split]
        images = torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(10, (n,), generator=generator))

    def timed(self, skip: int, steps: int, timer: Timer) -> "TimedBatches":
        """Training batches that time what happens between two of them."""
        self.batches = TimedBatches(super().train_dataloader(), skip, steps, timer)
        return self.batches


class TimedBatches:
    """From the request for batch ``skip`` to that for batch ``skip + steps`` the Trainer has done ``steps`` rounds of
    all that it does in one: hooks, log, step, average, and the fetching of the next batch."""

    def __init__(self, batches: TrainBatches, skip: int, steps: int, timer: Timer) -> None:
        self.batches, self.skip, self.steps, self.timer = batches, skip, steps, timer
        self.seconds = Seconds(float("nan"), float("nan"))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for number, batch in enumerate(self.batches):
            if number == self.skip:
                self.timer.start()
            if number == self.skip + self.steps:
                self.seconds = self.timer.stop()
            yield batch


def module_of(network: nn.Module, optimizer: Any, **options: Any) -> DiffusionModule:
    """The package's model with the lecture's chain and objective."""
    return DiffusionModule(
        network=deepcopy(network),
        schedule=LinearChain(T=T),
        parameterization=EpsParameterization(),
        conditioning=TimeConditioning(),
        variance=FixedLargeVariance(),
        decoder=DiscretizedGaussian(256),
        objective=NoiseMSE(UniformTimes()),
        validation_bounds=[],
        test_bounds=[],
        shape=SHAPE,
        levels=256,
        optimizer=optimizer,
        **options,
    )


def plain_step(network: nn.Module, batch_size: int, device: torch.device) -> Callable[[], Any]:
    """The lecture's loop, its images in memory: kinder to it than its DataLoader."""
    network = deepcopy(network).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-4)
    images = torch.rand(max(IMAGES, batch_size), *SHAPE, device=device) * 2 - 1
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, device=device), 0)

    def step() -> None:
        x0 = images[torch.randint(len(images), (batch_size,), device=device)]
        t = torch.randint(T, (batch_size,), device=device)
        noise = torch.randn_like(x0)
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        loss = mse_loss(network(x_t, t.float() / T), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bare_step(
    network: nn.Module, optimizer_of: Any, batch_size: int, device: torch.device, average: bool = False
) -> Callable[[], Any]:
    """The package's batches, objective and optimiser without a Trainer."""
    module = module_of(network, optimizer_of).to(device).train()
    optimizer = optimizer_of(module.model.parameters())
    split = RandomImages(batch_size).split("train").to(device)
    batches = iter(TrainBatches(split, batch_size, 0, lambda: 0))
    generator = torch.Generator(device=device).manual_seed(0)
    running = WeightAverage(module.ema_model, module.model)

    def step() -> None:
        x0 = levels_to_model(next(batches).image, 256)
        loss = module.objective(module.model, x0, generator).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if average:
            running.update(0.999)

    return step


def trainer_go(
    network: nn.Module, optimizer_of: Any, batch_size: int, device: torch.device, precision: Any, **options: Any
) -> Go:
    """The real Trainer with the command line's log and callbacks. Each turn is a fit of its own; it is timed inside."""
    module, folder = module_of(network, optimizer_of, **options), tempfile.TemporaryDirectory()

    def go(steps: int) -> Seconds:
        skip = 2
        trainer = DiffusionTrainer(
            accelerator="gpu" if device.type == "cuda" else device.type,
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision=precision,
            max_epochs=-1,
            max_steps=skip + steps + 1,
            logger=TensorBoardLogger(folder.name, name="", version="", default_hp_metric=False),
            log_every_n_steps=50,
            callbacks=[LearningRateMonitor(), ImagesPerSecond()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            default_root_dir=folder.name,
        )
        data = RandomImages(batch_size)
        data.trainer = trainer
        batches = data.timed(skip, steps, Timer(device))
        trainer.fit(module, train_dataloaders=batches)
        return batches.seconds

    return go


class TwoWeights(nn.Module):
    """Next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """A pixel's affine function."""
        return self.conv(x)


def lecture(batch_size: int, device: torch.device, compiled: bool) -> tuple[dict[str, Go], int]:
    """The lecture's loop against the package."""
    network, adam = SimpleUNet(), partial(torch.optim.Adam, lr=2e-4)
    fused = partial(torch.optim.Adam, lr=2e-4, fused=True)
    plain = plain_step(network, batch_size, device)
    variants = {
        "lecture": timed(plain, device),
        "package step": timed(bare_step(network, adam, batch_size, device), device),
        "package step + average": timed(bare_step(network, adam, batch_size, device, average=True), device),
        "package Trainer": trainer_go(network, adam, batch_size, device, "32-true", channels_last=False),
        "package float32 defaults": trainer_go(network, fused, batch_size, device, "32-true"),
        "package bf16 defaults": trainer_go(network, fused, batch_size, device, "bf16-mixed"),
        "  bf16 without channels_last": trainer_go(
            network, fused, batch_size, device, "bf16-mixed", channels_last=False
        ),
    }
    if compiled:
        variants["  bf16 compiled"] = trainer_go(network, fused, batch_size, device, "bf16-mixed", compile=True)
    return variants, flops_of(plain)


def unet(batch_size: int, device: torch.device, compiled: bool, width: int) -> tuple[dict[str, Go], int]:
    """The U-Net of configs/mnist.yaml with one switch after the other."""
    torch.manual_seed(0)
    network = UNet(1, width=width, multipliers=(1, 2, 4), blocks=1)
    plain, fused = (partial(torch.optim.AdamW, lr=1e-4, fused=is_fused) for is_fused in (False, True))
    go = partial(trainer_go, network, batch_size=batch_size, device=device)
    variants = {
        "U-Net float32": go(plain, precision="32-true", channels_last=False),
        "U-Net float32 fused": go(fused, precision="32-true", channels_last=False),
        "U-Net float32 channels_last": go(fused, precision="32-true", channels_last=True),
        "U-Net bf16": go(fused, precision="bf16-mixed", channels_last=False),
        "U-Net bf16 channels_last": go(fused, precision="bf16-mixed", channels_last=True),
    }
    if compiled:
        variants["U-Net bf16 compiled"] = go(fused, precision="bf16-mixed", channels_last=False, compile=True)
        variants["U-Net bf16 channels_last compiled"] = go(
            fused, precision="bf16-mixed", channels_last=True, compile=True
        )
    return variants, flops_of(bare_step(network, plain, batch_size, device))


def diffusers(batch_size: int, device: torch.device, width: int) -> tuple[dict[str, Go], int] | None:
    """diffusers' own training step against the package's, on the same network."""
    try:
        from diffusers import DDPMScheduler, UNet2DModel

        from ddpm_lightning.export.diffusers import UNet2DNetwork
    except ImportError as error:
        print(f"diffusers is left out: {error}", file=sys.stderr)
        return None
    torch.manual_seed(0)
    widths = (width, 2 * width, 2 * width)
    theirs = UNet2DModel(
        sample_size=SHAPE[1],
        in_channels=SHAPE[0],
        out_channels=SHAPE[0],
        layers_per_block=1,
        block_out_channels=widths,
        norm_num_groups=min(8, width),
        down_block_types=("DownBlock2D",) * len(widths),
        up_block_types=("UpBlock2D",) * len(widths),
    )

    ours = UNet2DNetwork(theirs, T)
    adamw, fused = (partial(torch.optim.AdamW, lr=1e-4, fused=is_fused) for is_fused in (False, True))
    network = deepcopy(theirs).to(device)
    optimizer, scheduler = adamw(network.parameters()), DDPMScheduler(num_train_timesteps=T)
    images = torch.rand(max(IMAGES, batch_size), *SHAPE, device=device) * 2 - 1

    def step() -> None:
        x0 = images[torch.randint(len(images), (batch_size,), device=device)]
        noise = torch.randn_like(x0)
        t = torch.randint(0, T, (batch_size,), device=device)
        loss = mse_loss(network(scheduler.add_noise(x0, noise, t), t).sample, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    variants = {
        "diffusers": timed(step, device),
        "package step on UNet2DModel": timed(bare_step(ours, adamw, batch_size, device), device),
        "package Trainer on UNet2DModel": trainer_go(ours, adamw, batch_size, device, "32-true", channels_last=False),
        "  float32 defaults": trainer_go(ours, fused, batch_size, device, "32-true"),
        "  bf16 defaults": trainer_go(ours, fused, batch_size, device, "bf16-mixed"),
    }
    return variants, flops_of(step)


def overhead(device: torch.device) -> dict[str, Go]:
    """A network of two weights, with the bare step and under the Trainer."""
    adam = partial(torch.optim.Adam, lr=1e-4)
    return {
        "bare step": timed(bare_step(TwoWeights(), adam, 8, device), device),
        "bare step + average": timed(bare_step(TwoWeights(), adam, 8, device, average=True), device),
        "Trainer": trainer_go(TwoWeights(), adam, 8, device, "32-true"),
    }


COMPARISONS = [
    ("lecture", "package step"),
    ("lecture", "package step + average"),
    ("lecture", "package Trainer"),
    ("lecture", "package float32 defaults"),
    ("lecture", "package bf16 defaults"),
    ("  bf16 without channels_last", "package bf16 defaults"),
    ("package float32 defaults", "package bf16 defaults"),
    ("package bf16 defaults", "  bf16 compiled"),
    ("U-Net float32", "U-Net float32 fused"),
    ("U-Net float32 fused", "U-Net float32 channels_last"),
    ("U-Net float32 fused", "U-Net bf16"),
    ("U-Net bf16", "U-Net bf16 channels_last"),
    ("U-Net bf16", "U-Net bf16 compiled"),
    ("U-Net bf16 channels_last", "U-Net bf16 channels_last compiled"),
    ("diffusers", "package step on UNet2DModel"),
    ("diffusers", "package Trainer on UNet2DModel"),
    ("diffusers", "  float32 defaults"),
    ("diffusers", "  bf16 defaults"),
]


def measure(group: str, variants: dict[str, Go], flops: int, batch_size: int, bench: Bench) -> dict[str, Any]:
    """Rows and ratios of a group."""
    device = bench.at
    peaks = {name: peak_rates(device, dtype) for name, dtype in (("32", torch.float32), ("bf16", torch.bfloat16))}
    probes = {f"{kind} {name}": go for name, kinds in peaks.items() for kind, (go, _) in kinds.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = bench.measure({**variants, **probes})
    peak = {
        name: max(
            work / statistics.median(wall for wall, _ in seconds[f"{kind} {name}"]) for kind, (_, work) in kinds.items()
        )
        for name, kinds in peaks.items()
    }
    rows = {name: row(seconds[name], batch_size, flops, peak["bf16" if "bf16" in name else "32"]) for name in variants}
    ratios = {
        f"{other.strip()} / {base.strip()}": ratio(seconds[base], seconds[other])
        for base, other in COMPARISONS
        if base in variants and other in variants
    }
    peaks_in_words = ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in peak.items())
    report(f"{group}, batches of {batch_size}: {flops / 1e9:.2f} GFLOP a step; peak {peaks_in_words}", rows, ratios)
    return {
        "group": group,
        "batch_size": batch_size,
        "flops_per_step": flops,
        "peak_flops_per_second": peak,
        "rows": {name.strip(): figures for name, figures in rows.items()},
        "ratios": ratios,
        "peak_memory_mib": peak_memory_mib(device),
    }


Group = Literal["lecture", "unet", "diffusers", "overhead"]


def main(
    bench: Bench,
    only: list[Group] | None = None,
    compile: bool = False,
    width: int = 32,
    overhead_steps: int = 200,
) -> None:
    """Measure the groups.

    Args:
        bench: what every benchmark is told
        only: groups to measure, by default all: lecture unet diffusers overhead
        compile: also the compiled networks (minutes to warm up)
        width: channels of the U-Nets at full resolution
        overhead_steps: steps in a turn of the smallest network
    """
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    at, groups = bench.at, only or list(get_args(Group))
    record: dict[str, Any] = {"machine": machine(at), "groups": [], "overhead": None}
    print(f"{record['machine']['device']}, {record['machine']['threads']} thread(s), torch {torch.__version__}")
    for size in bench.batch_size or [128]:
        makers: dict[Group, Callable[[], tuple[dict[str, Go], int] | None]] = {
            "lecture": partial(lecture, size, at, compile),
            "unet": partial(unet, size, at, compile, width),
            "diffusers": partial(diffusers, size, at, width),
        }
        for group, make in makers.items():
            if group in groups and (found := make()):
                record["groups"].append(measure(group, *found, size, bench))
    if "overhead" in groups:
        seconds = interleave(overhead(at), bench.rounds, overhead_steps, bench.warm_up)
        rows = {name: row(values, 8, None, None) for name, values in seconds.items()}
        extra = {
            clock: 1e3
            * statistics.median(
                getattr(a, clock) - getattr(b, clock)
                for a, b in zip(seconds["Trainer"], seconds["bare step"], strict=True)
            )
            for clock in ("wall", "cpu")
        }
        report("overhead, batches of 8", rows, {})
        print(f"Trainer's overhead: {extra['wall']:.3f} ms a step, CPU time {extra['cpu']:.3f} ms")
        record["overhead"] = {"rows": rows, "ms_per_step": extra["wall"], "cpu_ms_per_step": extra["cpu"]}
    record["peak_memory_mib"] = peak_memory_mib(at)
    print(f"peak memory {record['peak_memory_mib']:.0f} MiB")
    bench.write(record)


if __name__ == "__main__":
    run_script(main, __doc__)
