"""What is asked of the samples: where they start, how they are drawn, what is known of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.data import levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import expand_to, image_generators
from ddpm_lightning.samplers import InpaintingFactory, ReplacementSampler, Sampler
from ddpm_lightning.sampling.output import read_images, read_mask
from ddpm_lightning.schedules import TimeGrid
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["Inpainting", "Starts", "Walk", "check_labels", "known_pixels", "slerp"]


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


def _name(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _described(part: object) -> Any:
    try:
        return describe(part)
    except TypeError:
        return {"class_path": _name(part)}
