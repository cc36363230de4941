#!/usr/bin/env python3
"""Train the classifier in whose features samples are compared with data, on one CPU thread.

    python scripts/train_classifier.py --data mnist --out ddpm_lightning/metrics/weights/mnist.safetensors
    python scripts/train_classifier.py --data digits --out ddpm_lightning/metrics/weights/digits.safetensors

It learns from the training split of the project's data module, each image turned, scaled and shifted a little at
random. The number of epochs is fixed beforehand and the last weights are kept: nothing is selected, neither on the
validation images, whose accuracy is printed as it goes, nor on the test images, whose accuracy is printed at the end.
"""

import json
import math
import time
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from ddpm_lightning.command_line import run_script
from ddpm_lightning.data import MNIST, Digits, ImageDataModule, levels_to_model
from ddpm_lightning.data.batches import Split
from ddpm_lightning.errors import at_least
from ddpm_lightning.networks import FeatureClassifier

BATCH = 128
EPOCHS = {"mnist": 8, "digits": 150}
ANGLE, SCALE, SHIFT = 0.2, 0.1, 1.5  # radians, relative, pixels: the most that an image is changed


def jittered(x: Tensor, generator: torch.Generator) -> Tensor:
    """Images ``[B, C, H, H]`` in model range turned, scaled and shifted, each at random; outside is black."""
    draws = 2 * torch.rand(4, len(x), generator=generator) - 1
    angle, scale = ANGLE * draws[0], 1 + SCALE * draws[1]
    shift = 2 * SHIFT / x.shape[-1] * draws[2:]
    rows = [scale * angle.cos(), -scale * angle.sin(), shift[0], scale * angle.sin(), scale * angle.cos(), shift[1]]
    grid = affine_grid(torch.stack(rows, 1).view(-1, 2, 3), list(x.shape), align_corners=False)
    return grid_sample(x + 1, grid, align_corners=False) - 1


@torch.no_grad()
def accuracy(classifier: FeatureClassifier, split: Split, levels: int) -> float:
    """Share of a split's images that are given their class."""
    parts = zip(split.images.split(500), split.labels.split(500), strict=True)
    hits = sum(int((classifier(levels_to_model(x, levels)).argmax(1) == label).sum()) for x, label in parts)
    return hits / len(split)


def trained(data: ImageDataModule, epochs: int, seed: int) -> FeatureClassifier:
    """A classifier of the data's training images."""
    torch.manual_seed(seed)
    channels, size, _ = data.shape
    classifier = FeatureClassifier(channels, size, data.num_classes)
    train, generator = data.split("train"), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=0.05)
    steps = math.ceil(len(train) / BATCH) * epochs
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        for rows in torch.randperm(len(train), generator=generator).split(BATCH):
            x = jittered(levels_to_model(train.images[rows], data.levels), generator)
            loss = cross_entropy(classifier(x), train.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
        if epoch % max(1, epochs // 8) == 0:
            val = accuracy(classifier, data.split("val"), data.levels)
            print(f"epoch {epoch} | validation accuracy {val:.4f} | {time.perf_counter() - start:.0f} s", flush=True)
    return classifier


def main(
    data: Literal["mnist", "digits"], out: Path, data_root: str = "data", epochs: int | None = None, seed: int = 0
) -> None:
    """Train, test and write a classifier.

    Args:
        data: what to learn
        out: safetensors file to write
        data_root: folder that holds MNIST/raw
        epochs: passes over the training images, by default 8 for mnist and 150 for digits
        seed: seed of everything
    """
    epochs = EPOCHS[data] if epochs is None else epochs
    at_least(1, epochs=epochs)
    # sums then do not depend on how many cores there are
    torch.set_num_threads(1)
    images = MNIST(data_root) if data == "mnist" else Digits()
    images.prepare_data()
    classifier = trained(images, epochs, seed)
    names = ("channels", "size", "num_classes", "width", "num_features")
    init_args = json.dumps({name: getattr(classifier, name) for name in names})
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), out, metadata={"init_args": init_args})
    test = images.split("test")
    print(f"test accuracy {accuracy(classifier, test, images.levels):.4f} of {len(test)} images; wrote {out}")


if __name__ == "__main__":
    run_script(main, __doc__)
