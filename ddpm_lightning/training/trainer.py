"""Lightning's Trainer with one more thing to do: sample."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor

from ddpm_lightning.data.batches import IndexBatches
from ddpm_lightning.errors import InputError
from ddpm_lightning.samplers import AncestralSampler, Sampler
from ddpm_lightning.training.checkpoint_io import AtomicCheckpointIO, read_checkpoint
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.figures import save_png, tile
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["DiffusionTrainer", "Sampling"]


class Sampling(LightningModule):
    """Sampling as a prediction over indices of images, so that the Trainer's devices and precision serve it.

    Args:
        module: the trained module.
        sampler: how to sample.
        n: number of images, shared among the processes.
        seed: seed of the images.
        steps: steps of the sampler; None for all T.
        batch_size: images drawn at a time on each process.
        label: class of every image, for a class-conditional model; None cycles through the classes.
        guidance_scale: of classifier-free guidance; 1 is none.
    """

    def __init__(
        self,
        module: DiffusionModule,
        sampler: Sampler,
        n: int,
        seed: int,
        steps: int | None,
        batch_size: int,
        label: int | None,
        guidance_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.module, self.sampler = module, sampler
        self.n, self.seed, self.steps, self.batch_size, self.label = n, seed, steps, batch_size, label
        self.guidance_scale = guidance_scale
        self._progress: Progress | None = None

    def predict_dataloader(self) -> IndexBatches:
        """This process's indices, in batches."""
        return IndexBatches(self.n, self.batch_size, self.trainer.global_rank, self.trainer.world_size)

    @contextmanager
    def _steps_shown(self, total: int) -> Iterator[Any]:
        columns = (
            TextColumn("sampling"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, disable=not self.trainer.is_global_zero) as progress:
            task = progress.add_task("", total=total)
            yield lambda x, s: progress.advance(task)

    def predict_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
        """Images of the given indices: ``sample`` int64 ``[B]``, ``image`` uint8 ``[B, C, H, W]``."""
        index = batch.cpu()
        label = self.module.cycled_labels(index) if self.label is None else torch.full_like(index, self.label)
        with self._steps_shown(self.steps or self.module.ema_model.T) as callback:
            images = self.module.sample(
                self.sampler,
                index,
                seed=self.seed,
                steps=self.steps,
                label=label,
                guidance_scale=self.guidance_scale,
                callback=callback,
            )
        return {"sample": index, "image": images.cpu()}


class DiffusionTrainer(Trainer):
    """The Trainer of the ``ddpm`` command line: it samples, and writes checkpoints whole or not at all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # one given as a plugin stays
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    def sample(
        self,
        model: DiffusionModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        n: int = 64,
        seed: int = 0,
        sampler: Sampler | None = None,
        steps: int | None = None,
        batch_size: int = 64,
        label: int | None = None,
        guidance_scale: float = 1.0,
        out: str | None = None,
    ) -> None:
        """Draw images from a trained model.

        Image k of a seed is the same whatever n, batch_size and the number of processes.

        Args:
            model: the module.
            datamodule: not used; the command line passes it.
            ckpt_path: checkpoint to load; "last" for the run's last one.
            weights_only: false lets the checkpoint run code while it is loaded; null and true do not.
            n: number of images.
            seed: seed of the images.
            sampler: AncestralSampler (the default) or another sampler class.
            steps: steps of the sampler for each image, 1..T; null for all T.
            batch_size: images drawn at a time on each process.
            label: class of every image, for a class-conditional model; null cycles through the classes.
            guidance_scale: of classifier-free guidance, for a class-conditional model trained with label_dropout: 1 is
                the model itself, above 1 draws sharper images of the class.
            out: folder for samples.png and samples.safetensors; null for the run's folder.

        Raises:
            InputError: a number out of its range, no checkpoint, guidance of a model that was not trained for it.
        """
        for name, value in (("n", n), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"--{name} {value} must be 1 or more")
        if steps is not None and not 1 <= steps <= model.ema_model.T:
            raise InputError(f"--steps {steps} must lie between 1 and the chain's T = {model.ema_model.T}")
        if label is not None and not model.class_conditional:
            raise InputError(f"--label {label}: this model is not class-conditional (--model.class_conditional)")
        if label is not None and not 0 <= label < (model.num_classes or 0):
            raise InputError(f"--label {label} must lie between 0 and {(model.num_classes or 0) - 1}")
        model.guided(guidance_scale)  # for what it refuses, before anything is loaded
        if ckpt_path is None:
            raise InputError("sample needs a trained model: give --ckpt_path FILE, or last for the run's last one")
        self._restore(model, ckpt_path, weights_only is not False)
        task = Sampling(model, sampler or AncestralSampler(), n, seed, steps, batch_size, label, guidance_scale)
        predictions = cast(list[dict[str, Tensor]], self.predict(task))
        parts = gather_to_all(predictions)
        if not self.is_global_zero:
            return
        batches = [batch for part in parts for batch in part]
        index = torch.cat([batch["sample"] for batch in batches])
        images = torch.cat([batch["image"] for batch in batches])[index.argsort()]
        folder = Path(out or self.default_root_dir)
        save_png(tile(images, model.levels), folder / "samples.png")
        save_file({"images": images.contiguous()}, folder / "samples.safetensors", metadata={"seed": str(seed)})
        print(f"{n} images: {folder / 'samples.png'} and {folder / 'samples.safetensors'}", flush=True)

    def _restore(self, model: DiffusionModule, ckpt_path: str, weights_only: bool) -> None:
        checkpoint = read_checkpoint(ckpt_path, weights_only=weights_only)
        model.on_load_checkpoint(checkpoint)
        model.load_state_dict(checkpoint["state_dict"])
