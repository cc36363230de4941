#!/usr/bin/env python3
"""A gated PixelCNN on MNIST at a budget of FLOPs: an exact likelihood beside the bound of a diffusion model.

    python scripts/reference_pixelcnn.py --pflop 1.3 --data_root data

van den Oord et al. 2016 (arXiv 1606.05328): each pixel's 256 grey levels are predicted from the pixels above it and to
its left. The same data module gives the images, in the same order as to ``ddpm fit``; AdamW, OneCycleLR. FLOPs are
those of the convolutions, forward and backward, as for the other scripts. The bits/dim are of the official test images.
"""

import time
from pathlib import Path

import torch
from bench_tools import flops_of
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import MNIST, levels_to_model
from ddpm_lightning.data.batches import TrainBatches
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.evaluation.bound import in_bits, mean_and_error
from ddpm_lightning.progress import tracked
from ddpm_lightning.runs import Run


class GatedLayer(nn.Module):
    """A vertical stack, which sees the rows above, and a horizontal one, which sees the row so far and the vertical.

    ``forward(v, h)``: both ``[B, width, H, W]``. The first layer's ``h`` must not see the pixel itself.
    """

    def __init__(self, inputs: int, width: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.vertical = nn.Conv2d(inputs, 2 * width, (2, 3))
        self.to_horizontal = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(inputs, 2 * width, (1, 2))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        rows = self.vertical(pad(v, (1, 1, 1, 0)))
        above = pad(rows, (0, 0, 1, 0))[:, :, :-1]
        left = pad(h, (2, -1, 0, 0)) if self.first else pad(h, (1, 0, 0, 0))
        new = self.out(_gate(self.horizontal(left) + self.to_horizontal(above)))
        return _gate(rows), new if self.first else h + new


def _gate(x: Tensor) -> Tensor:
    a, b = x.chunk(2, 1)
    return torch.tanh(a) * torch.sigmoid(b)


class PixelCNN(nn.Module):
    """Logits ``[B, levels, H, W]`` of each pixel's grey level, from images ``[B, 1, H, W]`` in [-1, 1]."""

    def __init__(self, width: int, layers: int, levels: int = 256) -> None:
        super().__init__()
        self.layers = nn.ModuleList(GatedLayer(width if i else 1, width, i == 0) for i in range(layers))
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, levels, 1))

    def forward(self, x: Tensor) -> Tensor:
        v = h = x
        for layer in self.layers:
            v, h = layer(v, h)
        logits: Tensor = self.head(h)
        return logits


def nats(model: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    """-log p of each image, ``[B]``, from uint8 ``[B, 1, H, W]``."""
    images = images.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(levels_to_model(images, 256))
    return cross_entropy(logits.float(), images[:, 0].long(), reduction="none").sum((1, 2))


def main(
    pflop: float = 1.3,
    width: int = 48,
    layers: int = 8,
    batch_size: int = 64,
    lr: float = 2e-3,
    seed: int = 0,
    images: int | None = None,
    device: str = "cpu",
    data_root: str = "data",
    out: Path = Path("runs/pixelcnn"),
) -> None:
    """Train, and evaluate on the test images.

    Args:
        pflop: training budget in 10^15 floating point operations
        width: channels of each stack
        layers: gated layers
        batch_size: images in a step
        lr: largest learning rate
        seed: seed of the weights and of the order of the images
        images: test images, by default all 10,000
        device: cpu or cuda
        data_root: folder that holds MNIST/raw
        out: folder for pixelcnn.json
    """
    at_least(1, width=width, layers=layers, batch_size=batch_size)
    if not pflop > 0:
        raise InputError(f"pflop = {pflop:g} must be positive")
    at = torch.device(device)
    torch.manual_seed(seed)
    data = MNIST(root=data_root)
    model = PixelCNN(width, layers).to(at)
    batches = iter(TrainBatches(data.split("train").to(at), batch_size, seed, lambda: 0))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=True)
    start = time.perf_counter()

    def step() -> None:
        optimizer.zero_grad()
        loss = nats(model, next(batches).image, at).mean()
        loss.backward()
        optimizer.step()

    per_step = flops_of(step)
    steps = max(1, round(pflop * 1e15 / per_step))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    for _ in tracked(range(steps - 1), steps, "training", "steps", lambda _: 1):
        step()
        schedule.step()
    seconds = time.perf_counter() - start
    test = data.split("test").images[:images]
    with torch.no_grad():
        bits = in_bits(-torch.cat([nats(model, part, at).cpu() for part in test.split(250)]), 784)
    mean, error = mean_and_error(bits)
    row = {"pflop": pflop, "steps": steps, "images_seen": steps * batch_size, "seconds": seconds, "seed": seed}
    print(
        f"{pflop:g} PFLOP, {steps} steps of {batch_size}: {mean:.4f} +- {error:.4f} bits/dim on {len(test)} test images"
    )
    Run(out).write("pixelcnn.json", {**row, "width": width, "layers": layers, "bits_per_dim": mean, "se": error})


if __name__ == "__main__":
    run_script(main, __doc__)
