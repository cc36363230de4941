"""Sampling as a prediction over indices of images, so that the Trainer's devices and precision serve it."""

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ddpm_lightning.data import model_to_levels
from ddpm_lightning.data.batches import IndexBatches
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import save_gif, save_png, tile
from ddpm_lightning.sampling.output import ImageFile, read_first, write_npz
from ddpm_lightning.sampling.progress import SamplingProgress
from ddpm_lightning.sampling.request import Starts, Walk
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["Sampling"]

# of an animation, beside the noise that it starts from
_FRAMES = 30


class Sampling(LightningModule):
    """The task: every process draws its indices and puts the images into one file.

    Args:
        module: the trained module.
        file: where the images go.
        starts: where they start.
        walk: how they are drawn.
        batch_size: images drawn at a time on each process.
        filmed: so many of the first images have their states recorded.
    """

    def __init__(
        self, module: DiffusionModule, file: ImageFile, starts: Starts, walk: Walk, batch_size: int, filmed: int = 0
    ) -> None:
        super().__init__()
        self.module, self.file, self.starts, self.walk = module, file, starts, walk
        self.batch_size, self.filmed = batch_size, filmed
        self._states: list[tuple[int, Tensor]] = []
        self._progress: SamplingProgress | None = None

    def setup(self, stage: str) -> None:
        """Lay out the weights, which the module does itself only where it is the Trainer's own."""
        self.module.lay_out(self.trainer)

    def configure_model(self) -> None:
        """Nothing: samples are drawn with whole weights, under strategies that ask for this, too."""

    def predict_dataloader(self) -> IndexBatches:
        """This process's indices, in batches."""
        return IndexBatches(self.file.n, self.batch_size, self.trainer.global_rank, self.trainer.world_size)

    def _times(self) -> Tensor:
        model = self.module.ema_model
        return self.walk.grid(model.schedule, model.grid, self.walk.steps)

    def on_predict_start(self) -> None:
        """Lay out the file before any process writes to it."""
        if self.trainer.is_global_zero:
            self.file.create()
        self.trainer.strategy.barrier()
        share = len(range(self.trainer.global_rank, self.file.n, self.trainer.world_size))
        steps = len(self._times()) - 1
        self._progress = SamplingProgress(self.file.n, max(share, 1), steps, self.trainer.is_global_zero)
        self._progress.start()

    def predict_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Draw the images of the given indices ``[B]`` and put them into the file."""
        index = batch.cpu()
        row = self.starts.row(index)
        label, sampler = self.walk.label(row), self.walk.sampler
        if self.walk.inpainting is not None:
            sampler = self.walk.inpainting.sampler(sampler, row, self.module.levels)
        x_T = self.starts.x_T(self.module, index)
        film = _Film(self.module, len(self._times()) - 1, index < self.filmed)
        film.record(x_T, torch.ones((), dtype=torch.float64, device=x_T.device))
        progress = self._progress
        assert progress is not None

        def stepped(x: Tensor, s: Tensor) -> None:
            film.record(x, s)
            progress.stepped(len(index))

        images = self.module.sample(
            sampler, row, seed=self.starts.seed, steps=self.walk.steps, grid=self.walk.grid, x_T=x_T, label=label,
            guidance_scale=self.walk.guidance_scale, callback=stepped,
        )  # fmt: skip
        self.file.write(index, images.cpu(), label)
        progress.drawn(len(index))
        self._states += zip(index[index < self.filmed].tolist(), film.states(), strict=True)
        return batch

    def on_predict_end(self) -> None:
        """Take the bar away."""
        self.teardown("predict")

    def teardown(self, stage: str) -> None:
        """The same after an error."""
        if self._progress is not None:
            self._progress.stop()

    def publish(self, npz: bool, grid_images: int) -> None:
        """Give the file its name, and show its first images in samples.png and, where they were filmed, samples.gif.

        Args:
            npz: make the file a .npz.
            grid_images: so many at most are shown, in whole rows where there are any.

        Raises:
            InputError: not all images were drawn.
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
        columns = self.starts.columns
        images = read_first(self.file.partial, max(grid_images // columns, 1) * columns)
        row = columns if columns > 1 else None
        folder, path = self.file.path.parent, self.file.path
        save_png(tile(images, self.module.levels, row), folder / "samples.png")
        pictures = [folder / "samples.png"]
        states = sorted(((index, state) for _, part in parts for index, state in part), key=lambda item: item[0])
        if states:
            frames = torch.stack([state for _, state in states], 1)
            save_gif([tile(frame, 256, row) for frame in frames], folder / "samples.gif")
            pictures.append(folder / "samples.gif")
        if npz:
            path = path.with_suffix(".npz")
            write_npz(self.file.partial, path)
            self.file.partial.unlink()
        else:
            self.file.finish()
        which = "all of them" if len(images) == self.file.n else f"the first {len(images)}"
        print(f"{self.file.n} images in {path}; {which} in {' and '.join(map(str, pictures))}", flush=True)


class _Film:
    """Some images of a batch on their way, in units in which the data and the noise have variance 1.

    Args:
        module: gives the schedule.
        moves: steps of the walk, the decoder's among them.
        filmed: bool ``[B]``.
    """

    def __init__(self, module: DiffusionModule, moves: int, filmed: Tensor) -> None:
        self._schedule, self._filmed = module.ema_model.schedule, filmed
        self._shown = set(torch.linspace(0, moves, _FRAMES + 1).round().long().tolist())
        self._moves, self._frames = 0, list[Tensor]()

    def record(self, x: Tensor, s: Tensor) -> None:
        """Keep x_s ``[B, C, H, W]`` clipped to [-1, 1], if it is one of those that are shown: x_T is the first."""
        if self._moves in self._shown and bool(self._filmed.any()):
            unit = torch.exp(-0.5 * self._schedule.log_unit_var(s))
            self._frames.append(model_to_levels(x[self._filmed.to(x.device)] * unit.to(x), 256).cpu())
        self._moves += 1

    def states(self) -> Tensor:
        """uint8 ``[filmed, frames, C, H, W]``, 0..255; nothing where none is filmed."""
        return torch.stack(self._frames, 1) if self._frames else torch.empty(0)
