"""Random numbers of a training step: functions of the seed and of the number of batches done, and of nothing else."""

import numpy as np
import torch
from lightning.pytorch import Trainer

from ddpm_lightning.data.datamodule import batches_done
from ddpm_lightning.ops import BatchGenerator

__all__ = ["seed_batch"]


def seed_batch(seed: int, trainer: Trainer, device: torch.device, batch_idx: int) -> BatchGenerator:
    """Seed a batch, of this number in its epoch: its noise and times come from the generator that is returned, on the
    device, dropout from torch's own."""

    def key(*numbers: int) -> int:
        return int(np.random.SeedSequence(seed, spawn_key=numbers).generate_state(1)[0])

    done, batches = batches_done(trainer), trainer.accumulate_grad_batches
    place = batch_idx % batches
    torch.default_generator.manual_seed(key(done, trainer.global_rank))
    if device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(key(done, trainer.global_rank))
    return BatchGenerator(
        torch.Generator(device=device).manual_seed(key(done, 0)),
        trainer.global_rank,
        trainer.world_size,
        # three numbers, so that it is not the key of any batch's noise
        torch.Generator(device=device).manual_seed(key(done - place, 0, 0)),
        place,
        batches,
    )
