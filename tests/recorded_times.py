"""A sampler of times that writes down what it draws, for runs in other processes."""

import os
from pathlib import Path

import torch
from torch import Tensor

from ddpm_lightning.objectives import EquispacedTimes, TimeDraw
from ddpm_lightning.ops import BatchGenerator, Generators

__all__ = ["RecordedTimes"]


class RecordedTimes(EquispacedTimes):
    """EquispacedTimes that saves every draw as FOLDER/CALL-PART-RANK.pt."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder, self.calls = folder, 0

    def forward(self, like: Tensor, generators: Generators = None) -> TimeDraw:
        draw = super().forward(like, generators)
        assert isinstance(generators, BatchGenerator)
        record = {"position": draw.position, "part": generators.batch, "parts": generators.batches}
        torch.save(
            record, Path(self.folder) / f"{self.calls:03d}-{generators.batch}-{os.environ.get('LOCAL_RANK', 0)}.pt"
        )
        self.calls += 1
        return draw
