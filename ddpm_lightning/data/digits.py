from typing import Any

import torch

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ImageDataModule, SplitName

__all__ = ["Digits"]

_SIZES = {"train": 1_300, "val": 200, "test": 297}

# Not an option: results of different runs are comparable only on the same split.
_SPLIT_SEED = 1_797


class Digits(ImageDataModule):
    """1,797 handwritten digits of 8x8 pixels with 17 grey levels, 10 classes (``sklearn.datasets.load_digits``).

    There is no official split; 1,300 train, 200 validation and 297 test images are drawn once and for all. They come
    from the same 43 writers, so a test result says less about new writers than MNIST's does. No download is needed.
    """

    shape = (1, 8, 8)
    levels = 17
    num_classes = 10

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(dict(_SIZES), **kwargs)

    def load(self, split: SplitName) -> Split:
        from sklearn.datasets import load_digits  # a slow import that MNIST users need not wait for

        digits = load_digits()
        images = torch.from_numpy(digits.images).to(torch.uint8).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
        rows = dict(zip(_SIZES, order.split(list(_SIZES.values())), strict=True))[split]
        return Split(images[rows], labels[rows])
