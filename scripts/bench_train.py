#!/usr/bin/env python3
"""How fast is a training step, beside the lecture's plain loop and beside diffusers?

    python scripts/bench_train.py --batch_size 128 --json runs/bench_train.json
    python scripts/bench_train.py --device cuda --batch_size 128 1024 --steps 50

Random images of MNIST's shape. The groups:

    lecture    the lecture's loop by hand (float32 images in memory, uniform t, noise, MSE, Adam) and the package with
               the same network: the bare step (objective and optimiser), with the average of the weights, and the real
               Trainer with hooks and log; then with this device's defaults (channels_last, fused Adam) and bf16-mixed
    unet       the package's U-Net under the Trainer: which of the switches gain
    diffusers  the training step of diffusers and the package's on the same UNet2DModel (if diffusers is installed)
    overhead   a network of two weights: what a Trainer's step costs more than the bare step
"""

import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from copy import deepcopy
from functools import partial
from typing import Any, Literal, get_args

import torch
from bench_tools import Bench, Group, Seconds, Variant, flops_of, parts, seconds_now, timed, unet2d
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from ddpm_lightning.callbacks import ImagesPerSecond
from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import ImageDataModule, levels_to_model
from ddpm_lightning.data.batches import Split, TrainBatches
from ddpm_lightning.data.datamodule import SplitName
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.objectives import NoiseMSE, UniformTimes
from ddpm_lightning.process import DiscretizedGaussian, TimeConditioning
from ddpm_lightning.schedules import LinearChain
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.ema import WeightAverage

T = 300
SHAPE = (1, 28, 28)
IMAGES = 4096
GroupName = Literal["lecture", "unet", "diffusers", "overhead"]


class RandomImages(ImageDataModule):
    """Random grey levels in MNIST's shape."""

    shape = SHAPE
    levels = 256
    num_classes = 10

    def __init__(self, batch_size: int) -> None:
        super().__init__({"train": max(IMAGES, batch_size), "val": 1, "test": 1}, batch_size=batch_size)

    def load(self, split: SplitName) -> Split:
        generator, n = torch.Generator().manual_seed(0), self.sizes[split]
        images = torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=generator)
        return Split(images, torch.randint(10, (n,), generator=generator))


class Clock(Callback):
    """Times all that the Trainer does in the steps after the first two: hooks, log, average, the next batch."""

    def __init__(self, device: torch.device, steps: int) -> None:
        self.device, self.steps = device, steps

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == 2:
            self.start = seconds_now(self.device)
        if trainer.global_step == 2 + self.steps:
            self.seconds = seconds_now(self.device).since(self.start, self.steps)


class TwoWeights(nn.Module):
    """An affine function of a pixel: next to nothing to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


def module_of(network: nn.Module, optimizer: Any, **options: Any) -> DiffusionModule:
    """The package's model with the lecture's chain and objective."""
    return DiffusionModule(
        network=deepcopy(network),
        schedule=LinearChain(T=T),
        **parts(TimeConditioning(), DiscretizedGaussian(256)),
        objective=NoiseMSE(UniformTimes()),
        validation_bounds=[],
        test_bounds=[],
        shape=SHAPE,
        levels=256,
        optimizer=optimizer,
        **options,
    )


def descent(loss: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
    """A step of the optimiser."""
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()


class Contest:
    """Ways to train a network with batches of a size on a device."""

    def __init__(self, network: nn.Module, size: int, device: torch.device) -> None:
        self.network, self.size, self.device = network, size, device

    def by_hand(self, optimizer_of: Any, noisy: Callable[..., Tensor], eps: Callable[..., Tensor]) -> Callable[[], Any]:
        """A plain loop, its images in memory: kinder to it than its DataLoader."""
        network = deepcopy(self.network).to(self.device)
        images = torch.rand(max(IMAGES, self.size), *SHAPE, device=self.device) * 2 - 1

        def loss() -> Tensor:
            x0 = images[torch.randint(len(images), (self.size,), device=self.device)]
            t, noise = torch.randint(T, (self.size,), device=self.device), torch.randn_like(x0)
            return mse_loss(eps(network, noisy(x0, noise, t), t), noise)

        return partial(descent, loss, optimizer_of(network.parameters()))

    def bare(self, optimizer_of: Any, average: bool = False) -> Callable[[], Any]:
        """The package's batches, objective and optimiser without a Trainer."""
        module = module_of(self.network, optimizer_of).to(self.device).train()
        split = RandomImages(self.size).split("train").to(self.device)
        batches = iter(TrainBatches(split, self.size, 0, lambda: 0))
        generator = torch.Generator(device=self.device).manual_seed(0)
        running, optimizer = WeightAverage(module.ema_model, module.model), optimizer_of(module.model.parameters())

        def loss() -> Tensor:
            objective: Any = module.objective  # nn.Module's attributes are typed too widely
            losses: Tensor = objective(module.model, levels_to_model(next(batches).image, 256), generator)
            return losses.mean()

        def step() -> None:
            descent(loss, optimizer)
            if average:
                running.update(0.999)

        return step

    def timed_bare(self, optimizer_of: Any, *against: str, average: bool = False) -> Variant:
        """That as a variant."""
        return Variant(timed(self.bare(optimizer_of, average), self.device), against)

    def trainer(self, optimizer_of: Any, *against: str, half: bool = False, **options: Any) -> Variant:
        """The real Trainer with the command line's log and callbacks. Each turn is a fit of its own."""
        module, folder = module_of(self.network, optimizer_of, **options), tempfile.TemporaryDirectory()
        cuda = self.device.type == "cuda"

        def go(steps: int) -> Seconds:
            clock = Clock(self.device, steps)
            trainer = DiffusionTrainer(
                accelerator="gpu" if cuda else self.device.type,
                devices=[self.device.index or 0] if cuda else 1,
                precision="bf16-mixed" if half else "32-true",
                max_epochs=-1,
                max_steps=steps + 3,
                logger=TensorBoardLogger(folder.name, name="", version="", default_hp_metric=False),
                log_every_n_steps=50,
                callbacks=[LearningRateMonitor(), ImagesPerSecond(), clock],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_val_batches=0,
                default_root_dir=folder.name,
            )
            trainer.fit(module, RandomImages(self.size))
            return clock.seconds

        return Variant(go, against, half)


def lecture(size: int, device: torch.device, compiled: bool) -> Group:
    """The lecture's loop against the package."""
    contest, adam = Contest(SimpleUNet(), size, device), partial(torch.optim.Adam, lr=2e-4)
    fused, base, bf16 = partial(adam, fused=True), "lecture", "package bf16 defaults"
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, device=device), 0)

    def noisy(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha_bar = alpha_bars[t].view(-1, 1, 1, 1)
        return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise

    by_hand = contest.by_hand(adam, noisy, lambda network, x, t: network(x, t.float() / T))
    variants = {
        base: Variant(timed(by_hand, device)),
        "package step": contest.timed_bare(adam, base),
        "package step + average": contest.timed_bare(adam, base, average=True),
        "package Trainer": contest.trainer(adam, base, channels_last=False),
        "package float32 defaults": contest.trainer(fused, base),
        "bf16 without channels_last": contest.trainer(fused, half=True, channels_last=False),
        bf16: contest.trainer(fused, base, "bf16 without channels_last", "package float32 defaults", half=True),
    }
    if compiled:
        variants["bf16 compiled"] = contest.trainer(fused, bf16, half=True, compile=True)
    return Group("lecture", size, variants, flops_of(by_hand))


def unet(size: int, device: torch.device, compiled: bool, width: int) -> Group:
    """The U-Net of configs/mnist_classes.yaml, without classes, with one switch after the other."""
    torch.manual_seed(0)
    contest = Contest(UNet(1, width=width, multipliers=(1, 2, 4), blocks=1), size, device)
    adamw = partial(torch.optim.AdamW, lr=1e-4)
    fit = partial(contest.trainer, partial(adamw, fused=True))
    one, fused, half = "U-Net float32", "U-Net float32 fused", "U-Net bf16"
    last = f"{half} channels_last"
    variants = {
        one: contest.trainer(adamw, channels_last=False),
        fused: fit(one, channels_last=False),
        f"{one} channels_last": fit(fused, channels_last=True),
        half: fit(fused, half=True, channels_last=False),
        last: fit(half, half=True, channels_last=True),
    }
    if compiled:
        variants[f"{half} compiled"] = fit(half, half=True, channels_last=False, compile=True)
        variants[f"{last} compiled"] = fit(last, half=True, channels_last=True, compile=True)
    return Group("unet", size, variants, flops_of(contest.bare(adamw)))


def diffusers(size: int, device: torch.device, width: int) -> Group:
    """diffusers' own training step against the package's, on the same network."""
    from diffusers import DDPMScheduler

    from ddpm_lightning.export.diffusers import UNet2DNetwork

    torch.manual_seed(0)
    theirs, base = unet2d(width, 2 * width, 2 * width), "diffusers"
    contest, adamw = Contest(UNet2DNetwork(theirs, T), size, device), partial(torch.optim.AdamW, lr=1e-4)
    scheduler: Any = DDPMScheduler(num_train_timesteps=T)
    fused, noisy = partial(adamw, fused=True), scheduler.add_noise
    by_hand = Contest(theirs, size, device).by_hand(adamw, noisy, lambda network, x, t: network(x, t).sample)
    variants = {
        base: Variant(timed(by_hand, device)),
        "package step on UNet2DModel": contest.timed_bare(adamw, base),
        "package Trainer on UNet2DModel": contest.trainer(adamw, base, channels_last=False),
        "float32 defaults": contest.trainer(fused, base),
        "bf16 defaults": contest.trainer(fused, base, half=True),
    }
    return Group("diffusers", size, variants, flops_of(by_hand))


def overhead(device: torch.device, steps: int) -> Group:
    """The Trainer's own work, which a network of two weights leaves to see."""
    contest, adam = Contest(TwoWeights(), 8, device), partial(torch.optim.Adam, lr=1e-4)
    variants = {
        "bare step": contest.timed_bare(adam),
        "bare step + average": contest.timed_bare(adam, "bare step", average=True),
        "Trainer": contest.trainer(adam, "bare step"),
    }
    return Group("overhead", 8, variants, steps=steps)


def main(
    bench: Bench,
    only: list[GroupName] | None = None,
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
    at, wanted = bench.at, only or get_args(GroupName)

    def groups() -> Iterator[Group]:
        for size in bench.batch_size or [128]:
            if "lecture" in wanted:
                yield lecture(size, at, compile)
            if "unet" in wanted:
                yield unet(size, at, compile, width)
            if "diffusers" in wanted:
                try:
                    yield diffusers(size, at, width)
                except ImportError as error:
                    print(f"diffusers is left out: {error}", file=sys.stderr)
        if "overhead" in wanted:
            yield overhead(at, overhead_steps)

    bench.run(groups())


if __name__ == "__main__":
    run_script(main, __doc__)
