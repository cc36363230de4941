#!/usr/bin/env python3
"""Train the classifier in whose features samples are compared with data, on one CPU thread.

    python scripts/train_classifier.py --data mnist --out ddpm_lightning/metrics/weights/mnist.safetensors
    python scripts/train_classifier.py --data digits --out ddpm_lightning/metrics/weights/digits.safetensors

It learns from the training split of the project's data module, each image turned, scaled and shifted a little at
random. The number of epochs is fixed beforehand and the last weights are kept: nothing is selected, neither on the
validation images, whose accuracy is printed as it goes, nor on the test images, whose accuracy is printed at the end.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import affine_grid, cross_entropy, grid_sample

from ddpm_lightning.data import MNIST, Digits, ImageDataModule, levels_to_model
from ddpm_lightning.data.batches import Split
from ddpm_lightning.errors import InputError
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


def main() -> int:
    """Run the command line."""
    description, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", choices=sorted(EPOCHS), required=True, help="what to learn")
    parser.add_argument("--data_root", default="data", help="folder that holds MNIST/raw (default: data)")
    parser.add_argument("--epochs", type=int, help="passes over the training images (default: 8, digits 150)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything (default: 0)")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    arguments = parser.parse_args()
    epochs = EPOCHS[arguments.data] if arguments.epochs is None else arguments.epochs
    if epochs < 1:
        parser.error("--epochs must be 1 or more")
    # sums then do not depend on how many cores there are
    torch.set_num_threads(1)
    try:
        data = MNIST(arguments.data_root) if arguments.data == "mnist" else Digits()
        data.prepare_data()
        classifier = trained(data, epochs, arguments.seed)
        test = data.split("test")
    except InputError as error:
        print(f"train_classifier: error: {error}", file=sys.stderr)
        return 2
    names = ("channels", "size", "num_classes", "width", "num_features")
    init_args = json.dumps({name: getattr(classifier, name) for name in names})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(classifier.state_dict(), arguments.out, metadata={"init_args": init_args})
    share = accuracy(classifier, test, data.levels)
    print(f"test accuracy {share:.4f} of {len(test)} images; wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
