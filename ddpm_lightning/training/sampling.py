"""Sampling as a prediction over indices of images, so that the Trainer's devices and precision serve it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from ddpm_lightning.data import levels_to_model, model_to_levels
from ddpm_lightning.data.batches import IndexBatches
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import expand_to, image_generators
from ddpm_lightning.samplers import InpaintingFactory, ReplacementSampler, Sampler
from ddpm_lightning.schedules import TimeGrid
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.figures import save_gif, save_png, tile
from ddpm_lightning.training.hyperparameters import describe
from ddpm_lightning.training.image_files import ImageFile, read_first, read_images, read_mask, write_npz
from ddpm_lightning.training.module import DiffusionModule
from ddpm_lightning.training.sampling_progress import SamplingProgress

__all__ = ["Inpainting", "Sampling", "Starts", "Walk", "check_labels", "known_pixels", "slerp"]

# of an animation, beside the noise that it starts from
_FRAMES = 30


def slerp(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    """From a to b along the great circle between their directions: at fraction 0 a itself, at 1 b, bit for bit.

    sin((1 - f) w) / sin(w) a + sin(f w) / sin(w) b with w the angle between a and b (Shoemake 1985). Half-way between
    two draws of N(0, I) it has the norm of a draw, where a straight line's is smaller by sqrt(2).

    Args:
        a: ``[B, ...]``.
        b: the same.
        fraction: ``[B]``.
    """
    x, y = a.double().flatten(1), b.double().flatten(1)
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
    f = fraction.to(angle)
    weights = (share * torch.sinc(share * angle) / torch.sinc(angle) for share in (1 - f, f))
    of_a, of_b = (expand_to(weight, a) for weight in weights)
    return (of_a * a.double() + of_b * b.double()).to(a.dtype)


@dataclass(frozen=True)
class Starts:
    """Where the images start: from x_T of a seed, or in rows from x_T of one seed to that of another.

    Attributes:
        seed: x_T of image k is a function of it and k.
        interpolate_to: another seed; None for none.
        columns: images in a row from one to the other, both ends among them; 1 where there is no other.
    """

    seed: int
    interpolate_to: int | None = None
    columns: int = 1

    @classmethod
    def of(cls, seed: int, interpolate_to: int | None, columns: int) -> "Starts":
        """What the options say; ``columns`` counts only where there is another seed.

        Raises:
            InputError: a row without two ends, or from a seed to itself.
        """
        if interpolate_to is None:
            return cls(seed)
        if columns < 2:
            raise InputError(f"--interpolation_columns {columns} must be 2 or more: both ends are among them")
        if interpolate_to == seed:
            raise InputError(f"--interpolate_to {seed} is --seed itself: give another seed")
        return cls(seed, interpolate_to, columns)

    def row(self, index: Tensor) -> Tensor:
        """k for images by index: their number without interpolation, and else their row's."""
        return index // self.columns

    def x_T(self, module: DiffusionModule, index: Tensor) -> Tensor:
        """x_T of images by index, ``[B, C, H, W]``."""
        seeds = (self.seed,) if self.interpolate_to is None else (self.seed, self.interpolate_to)
        first, *other = (module.prior_draws(image_generators(seed, self.row(index))) for seed in seeds)
        return slerp(first, other[0], (index % self.columns) / (self.columns - 1)) if other else first


@dataclass(frozen=True)
class Inpainting:
    """What is known of the images.

    Attributes:
        known: uint8 ``[n or 1, C, H, W]``, grey levels.
        mask: bool ``[n or 1, C or 1, H, W]``, True where a pixel is known.
        factory: makes the sampler of the rest.
    """

    known: Tensor
    mask: Tensor
    factory: InpaintingFactory

    def sampler(self, sampler: Sampler, row: Tensor, levels: int) -> Sampler:
        """The sampler of images k."""
        known, mask = (values if len(values) == 1 else values[row] for values in (self.known, self.mask))
        return self.factory(sampler, levels_to_model(known, levels), mask)


@dataclass(frozen=True)
class Walk:
    """How the images are drawn.

    Attributes:
        sampler: takes the steps.
        steps: their number; None for all T.
        grid: where they are.
        guidance_scale: of classifier-free guidance; 1 is none.
        labels: classes, image k has the one at k modulo their number; None for a model without.
        inpainting: what is known of the images; None for nothing.
    """

    sampler: Sampler
    steps: int | None
    grid: TimeGrid
    guidance_scale: float = 1.0
    labels: Sequence[int] | None = None
    inpainting: Inpainting | None = None

    def label(self, row: Tensor) -> Tensor | None:
        """Classes ``[B]`` of images k."""
        return None if self.labels is None else torch.tensor(self.labels)[row % len(self.labels)]

    def check(self, module: DiffusionModule, starts: Starts) -> None:
        """Refuse what the model cannot do.

        Raises:
            InputError: steps that the grid cannot make, a sampler that draws noise between two seeds.
        """
        model = module.ema_model
        try:
            self.grid(model.schedule, model.grid, self.steps)
        except InputError as error:
            raise InputError(f"--steps {self.steps}: {error}") from None
        sampler = self.sampler
        if self.inpainting is not None:
            sampler = self.inpainting.sampler(sampler, torch.tensor([0]), module.levels)
        if starts.interpolate_to is not None and not sampler.is_deterministic:
            raise InputError(
                f"--interpolate_to needs a sampler that draws no noise, which {type(sampler).__name__} does here: give "
                "--sampler DDIMSampler, DPMSolverSampler or HeunSampler"
                + ("" if sampler is self.sampler else ", and --inpainting MomentMatchingSampler")
            )

    def settings(self) -> dict[str, Any]:
        """All of it as plain data."""
        settings = {"steps": self.steps, "guidance_scale": self.guidance_scale, "labels": self.labels}
        described = {name: _described(getattr(self, name)) for name in ("sampler", "grid")}
        if self.inpainting is not None:
            rest = self.inpainting.sampler(self.sampler, torch.tensor([0]), 256)
            plain = {name: value for name, value in vars(rest).items() if isinstance(value, int | float)}
            described["inpainting"] = {"class_path": _name(rest), "init_args": plain}
        return {**settings, **described}


def check_labels(module: DiffusionModule, labels: list[int] | None) -> list[int] | None:
    """The classes that ``--labels`` asks for, all in turn for None; None for a model that is not class-conditional.

    Raises:
        InputError: classes that there are not.
    """
    if labels is None:
        return list(range(module.num_classes or 0)) if module.class_conditional else None
    if not module.class_conditional:
        raise InputError(f"--labels {labels}: this model is not class-conditional (--model.class_conditional)")
    classes = module.num_classes or 0
    none = f", or be {classes} for no class" if module.label_dropout else ""
    if not labels or not all(0 <= label < classes + bool(none) for label in labels):
        raise InputError(f"--labels {labels}: classes must lie between 0 and {classes - 1}{none}")
    return labels


def known_pixels(
    module: DiffusionModule,
    n: int,
    known: str | None,
    mask: str | None,
    factory: InpaintingFactory | None,
    sampler: Sampler,
) -> Inpainting | None:
    """What ``--known``, ``--mask`` and ``--inpainting`` say; None where none is given.

    Raises:
        InputError: one without the other, files that cannot be read or do not fit, neither one nor ``n`` images,
            arguments that the factory refuses.
    """
    if known is None and mask is None and factory is None:
        return None
    if known is None or mask is None:
        lacking = " and ".join(f"{option} FILE" for option, path in (("--known", known), ("--mask", mask)) if not path)
        raise InputError(f"inpainting needs {lacking} too: the images, and which of their pixels are known")
    images, pixels = read_images(Path(known), module.shape, module.levels), read_mask(Path(mask), module.shape)
    for option, path, values in (("--known", known, images), ("--mask", mask, pixels)):
        if len(values) not in (1, n):
            raise InputError(f"{option} {path} is for {len(values)} images: give one, or as many as --n, which is {n}")
    inpainting = Inpainting(images, pixels, factory or ReplacementSampler)
    inpainting.sampler(sampler, torch.tensor([0]), module.levels)  # for what it refuses
    return inpainting


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


def _name(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _described(part: object) -> Any:
    try:
        return describe(part)
    except TypeError:
        return {"class_path": _name(part)}
