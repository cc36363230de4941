"""Sampling as a prediction over indices of images, so that the Trainer's devices and precision serve it."""

from itertools import count
from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ddpm_lightning.data import model_to_levels
from ddpm_lightning.data.batches import IndexBatches
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import save_gif, save_png, tile
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.progress import progress
from ddpm_lightning.sampling.output import ImageFile, whole
from ddpm_lightning.sampling.request import Drawing, HierarchyDrawing
from ddpm_lightning.training.distributed import gather_to_all

__all__ = ["SamplingTask"]

# of an animation, beside the noise that it starts from
_FRAMES = 30


class SamplingTask(LightningModule):
    """Every process draws the images of its indices and puts them into one file.

    Args:
        drawing: draws the images.
        file: where they go.
        batch_size: images drawn at a time on each process.
        filmed: so many of the first images have their states recorded.
    """

    def __init__(self, drawing: Drawing | HierarchyDrawing, file: ImageFile, batch_size: int, filmed: int = 0) -> None:
        super().__init__()
        self.module, self.guide = drawing.module, drawing.guide  # here for the Trainer, which moves them to its device
        self.drawing, self.file, self.batch_size, self.filmed = drawing, file, batch_size, filmed
        self._shown = set(torch.linspace(0, drawing.steps, _FRAMES + 1).round().long().tolist())
        self._states: list[tuple[int, Tensor]] = []
        self._drawn = 0
        self._bar = progress("sampling", 0, shown=False)

    def setup(self, stage: str) -> None:
        """Lay out the weights, which the module does itself only where it is the Trainer's own."""
        self.module.lay_out(self.trainer)
        if self.guide is not None:
            self.guide.lay_out(self.trainer)

    def configure_model(self) -> None:
        """Nothing: samples are drawn with whole weights, under strategies that ask for this, too."""

    def predict_dataloader(self) -> IndexBatches:
        return IndexBatches(self.file.n, self.batch_size, self.trainer.global_rank, self.trainer.world_size)

    def on_predict_start(self) -> None:
        """Lay out the file before any process writes to it."""
        if self.trainer.is_global_zero:
            self.file.create()
        self.trainer.strategy.barrier()
        self._bar = progress("sampling", self.file.n * self.drawing.steps, "steps", self.trainer.is_global_zero)

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Draw the images of the given indices ``[B]`` and put them into the file."""
        index, bar = batch.cpu(), self._bar
        filmed, frames, states = index < self.filmed, list[Tensor](), count()
        share = len(index) * self.trainer.world_size  # the processes are taken to be equally fast

        def seen(x: Tensor, t: Tensor) -> None:
            done = next(states)
            if done in self._shown and bool(filmed.any()):
                # in units in which the data and the noise have variance 1
                # of diffusion models only (DiffusionTrainer.sample)
                schedule = cast(DiffusionModel, self.module.ema_model).schedule
                unit = torch.exp(-0.5 * schedule.log_unit_var(t))
                # of fields three standard deviations, of grey levels all
                extent = 3 if self.module.levels is None else 1
                frames.append(model_to_levels(x[filmed.to(x.device)] * unit.to(x) / extent, 256).cpu())
            if done:
                bar.update(min(share, bar.total - bar.n))

        images = self.drawing(index, seen)
        self.file.write(index, images, self.drawing.label(index))
        self._drawn = min(self._drawn + share, self.file.n)
        bar.set_postfix_str(f"{self._drawn:,} of {self.file.n:,} images", refresh=False)
        if frames:
            self._states += zip(index[filmed].tolist(), torch.stack(frames, 1), strict=True)
        return batch

    def teardown(self, stage: str) -> None:
        self._bar.close()

    def publish(self, npz: bool, grid_images: int) -> None:
        """Give the file its name, and show its first images in samples.png and, where they were filmed, samples.gif:
        ``grid_images`` at most, in whole rows where there are any.

        Raises:
            InputError: not all images were drawn, or the files cannot be written.
        """
        parts = gather_to_all((self.file.written, self._states))
        written = sum(count for count, _ in parts)
        if written != self.file.n:
            raise InputError(
                f"{written} of {self.file.n} images were drawn: leave --trainer.limit_predict_batches and "
                "--trainer.fast_dev_run out"
            )
        if not self.trainer.is_global_zero:
            return
        folder, columns = self.file.path.parent, self.drawing.columns
        row = columns if columns > 1 else None
        images = torch.from_numpy(self.file.arrays()["images"][: max(grid_images // columns, 1) * columns].copy())
        pictures = [folder / "samples.png"]
        with whole(pictures[0]) as path:
            save_png(tile(images, self.module.levels, row), path)
        states = sorted(((index, state) for _, part in parts for index, state in part), key=lambda item: item[0])
        if states:
            frames = torch.stack([state for _, state in states], 1)
            pictures.append(folder / "samples.gif")
            with whole(pictures[1]) as path:
                save_gif([tile(frame, 256, row) for frame in frames], path)
        path = self.file.finish(npz)
        which = "all of them" if len(images) == self.file.n else f"the first {len(images)}"
        print(f"{self.file.n} images in {path}; {which} in {' and '.join(map(str, pictures))}", flush=True)
