"""A request: what to draw from a trained module. It is resolved once, and then draws."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from dataclasses import fields as fields_of
from functools import partial
from inspect import signature
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.checkpoints.descriptions import describe
from ddpm_lightning.data.stored import ArrayFile, StoredRows
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import expand_to, image_generators
from ddpm_lightning.process import ClassifierFreeDenoiser, DiffusionModel, HierarchicalVAE
from ddpm_lightning.samplers import AncestralSampler, Sampler
from ddpm_lightning.sampling.guide import autoguidance, load_guide
from ddpm_lightning.sampling.known import Inpainting
from ddpm_lightning.schedules import StridedGrid, TimeGrid
from ddpm_lightning.training import DiffusionModule, GenerativeModule

__all__ = ["Drawing", "HierarchyDrawing", "SampleRequest", "slerp"]


@dataclass(frozen=True)
class SampleRequest:
    """What to draw from a trained module, and how::

        draw = SampleRequest(sampler=DDIMSampler(), steps=50, seed=1).on(module)
        images = draw(range(16))

    Image k of a request is the same whatever else is drawn with it. All fields but the last two are options of
    ``ddpm sample``, and this is their help.

    Args:
        sampler: AncestralSampler (the default) or another sampler class.
        steps: steps of the sampler for each image (see ``Sampler.evaluations``); null for all T.
        grid: where the steps are: StridedGrid (the default), states of the chain; LogSNRGrid or KarrasGrid.
        seed: seed of the images: x_T and the noise of image k are functions of the seed and k.
        labels: classes of a class-conditional model, for example [3] or [0,1,2], which the images take in turn; null
            for all classes in turn.
        vectors: conditions of a vector-conditional model, for example [[0.27]] or [[0.26],[0.28]], which the images
            take in turn.
        fields: .npy file of the conditions of a field-conditional model, ``[C, *space]`` or ``[m, C, *space]``,
            which the images take in turn.
        guidance_scale: of classifier-free guidance, for a class-conditional model trained with label_dropout: 1 is the
            model itself, at half the cost; above 1 draws sharper images of the class. With a guide, of autoguidance.
        guide: folder of a run, or checkpoint, of a weaker model of the same data, which the samples are pushed away
            from: a smaller network, or an earlier checkpoint. Needs a guidance_scale other than 1, for example 2.
        interpolate_to: another seed: each row goes from image k of seed to image k of this one. Needs a sampler that
            draws no noise.
        interpolation_columns: images in such a row, both ends among them.
        inpainting: pixels that are known.
        cap_steps: cut steps to the T of a chain that has fewer, for a default that must serve short chains. Of a
            hierarchical VAE, sampler and steps are then left aside.
    """

    sampler: Sampler | None = None
    steps: int | None = None
    grid: TimeGrid | None = None
    seed: int = 0
    labels: list[int] | None = None
    vectors: list[list[float]] | None = None
    fields: str | None = None
    guidance_scale: float = 1.0
    guide: str | None = None
    interpolate_to: int | None = None
    interpolation_columns: int = 8
    inpainting: Inpainting | None = None
    cap_steps: bool = False

    def on(self, module: GenerativeModule, cond: Mapping[str, Tensor] | None = None) -> "Drawing | HierarchyDrawing":
        """Check the request against a module, and resolve it. ``cond`` are vectors and fields that the images take in
        turn, in the place of those that the request names.

        A module whose schedule is learned must have its weights already: they decide where the steps are.

        Raises:
            InputError: steps that the grid cannot make, classes that there are not, guidance of a model that was
                trained without classes or never without, a guide that does not fit (``load_guide``), a row between two
                seeds with a sampler that draws noise, without two ends, or from a seed to itself, a sampler that the
                model's encoder rules out; of a hierarchy, anything but a seed.
        """
        if isinstance(module, DiffusionModule):
            return Drawing(self, module, cond)
        return HierarchyDrawing(self, module)


class Drawing:
    """A request resolved on a module (:meth:`SampleRequest.on`): it draws images of the averaged model.

    Attributes:
        request: the request.
        module: the module.
        guide: the module of the weaker model; None for none.
        sampler: takes the steps.
        grid: where they are.
        times: float64 ``[steps + 1]``, the grid of the steps.
        steps: steps of the sampler for each image.
        labels: classes that the images have in turn; None for a model without classes.
        columns: images in a row between two seeds; 1 where there is one seed.
    """

    def __init__(
        self, request: SampleRequest, module: DiffusionModule, cond: Mapping[str, Tensor] | None = None
    ) -> None:
        self.request, self.module = request, module
        self.sampler, self.grid = request.sampler or AncestralSampler(), request.grid or StridedGrid()
        self.labels = _labels(module, request.labels)
        self._cond = _given(module, request) if cond is None else cond
        model, steps = module.ema_model, request.steps
        if request.cap_steps and steps is not None:
            steps = min(steps, model.T)
        try:
            self.times = self.grid(model.schedule, model.grid, steps)
        except InputError as error:
            raise InputError(f"--steps {steps}: {error}") from None
        named = request.guide
        self.guide = None if named is None else load_guide(named, module, self.times[1:], self.labels)
        self._model = _guided(module, self.guide, request.guidance_scale)
        self.steps = len(self.times) - 1
        self.columns = 1 if request.interpolate_to is None else request.interpolation_columns
        sampler = self._sampler(torch.tensor([0]))
        sampler.check(model)
        if request.interpolate_to is None:
            return
        if self.columns < 2:
            raise InputError(f"--interpolation_columns {self.columns} must be 2 or more: both ends are among them")
        if request.interpolate_to == request.seed:
            raise InputError(f"--interpolate_to {request.seed} is --seed itself: give another seed")
        if not sampler.is_deterministic:
            raise InputError(
                f"--interpolate_to needs a sampler that draws no noise, which {type(sampler).__name__} does here: give "
                "--sampler DDIMSampler, DPMSolverSampler or HeunSampler"
                + ("" if request.inpainting is None else ", and --inpainting MomentMatchingSampler")
            )

    def label(self, index: Tensor) -> Tensor | None:
        """Classes ``[n]`` of images by index; None for a model without classes."""
        return None if self.labels is None else torch.tensor(self.labels)[index // self.columns % len(self.labels)]

    def __call__(
        self, indices: Iterable[int] | Tensor, callback: Callable[[Tensor, Tensor], None] | None = None
    ) -> Tensor:
        """Images by index, uint8 ``[n, C, H, W]`` grey levels, or float32 ``[n, C, *space]`` fields in the units of the
        data; (x_t, t) is shown to ``callback`` at every state."""
        index = indices.cpu() if isinstance(indices, Tensor) else torch.tensor([*indices])
        rows, label = index // self.columns, self.label(index)
        generators = image_generators(self.request.seed, rows)
        x_T = self._noise(generators)
        if self.request.interpolate_to is not None:
            other = self._noise(image_generators(self.request.interpolate_to, rows))
            x_T = slerp(x_T, other, index % self.columns / (self.columns - 1))
        if callback is not None:
            callback(x_T, self.times[-1].to(x_T.device))
        cond = {name: values[rows % len(values)].to(x_T.device) for name, values in self._cond.items()}
        if label is not None:
            cond["label"] = label.to(x_T.device)
        sampler = self._sampler(rows)
        x0 = sampler(self._model, x_T, grid=self.times, generators=generators, callback=callback, **cond)
        return self.module.scale.to_data(x0)

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        prior = self._model.prior(torch.zeros(len(generators), *self.module.shape, device=self.module.device))
        return prior.sample(generators)

    def _sampler(self, rows: Tensor) -> Sampler:
        inpainting = self.request.inpainting
        return self.sampler if inpainting is None else inpainting.sampler(self.sampler, rows, self.module.levels or 0)

    def description(self) -> dict[str, Any]:
        """The request as plain data, as it was resolved."""
        request = self.request
        return {
            "seed": request.seed,
            "interpolate_to": request.interpolate_to,
            "columns": self.columns,
            "steps": self.steps,
            "guidance_scale": request.guidance_scale,
            "guide": request.guide,
            "labels": self.labels,
            "vectors": request.vectors,
            "fields": request.fields,
            "sampler": _described(self.sampler),
            "grid": _described(self.grid),
            "inpainting": None if request.inpainting is None else _described(self._sampler(torch.tensor([0]))),
        }


class HierarchyDrawing:
    """A request resolved on a hierarchical VAE: it draws x_T from the prior, and the states below from their levels.

    Attributes:
        request: the request. Its sampler and steps must be left out, or be defaults (``cap_steps``).
        module: the module.
        steps: 1, since an image is drawn at once.
        labels: None.
        guide: None.
        columns: 1.
    """

    steps, labels, guide, columns = 1, None, None, 1

    def __init__(self, request: SampleRequest, module: GenerativeModule) -> None:
        self.request, self.module = request, module
        free = {"seed", "cap_steps", *(("sampler", "steps") if request.cap_steps else ())}
        for field in fields_of(SampleRequest):
            if field.name not in free and getattr(request, field.name) != field.default:
                raise InputError(f"--{field.name} is for diffusion models: a hierarchical VAE is drawn level by level")

    def label(self, index: Tensor) -> None:
        return None

    def __call__(
        self, indices: Iterable[int] | Tensor, callback: Callable[[Tensor, Tensor], None] | None = None
    ) -> Tensor:
        """Images by index, uint8 ``[n, C, H, W]`` grey levels, shown to ``callback`` before and after, as the steps of
        a sampler are."""
        index = indices.tolist() if isinstance(indices, Tensor) else [*indices]
        model = cast(HierarchicalVAE, self.module.ema_model)
        x0 = model.sample(
            torch.empty(len(index), device=self.module.device), image_generators(self.request.seed, index)
        )
        if callback is not None:
            for _ in range(self.steps + 1):
                callback(x0, torch.zeros((), device=x0.device))
        return self.module.scale.to_data(x0)

    def description(self) -> dict[str, Any]:
        """The request as plain data."""
        return {"seed": self.request.seed, "columns": self.columns, "steps": self.steps, "labels": self.labels}


def slerp(a: Tensor, b: Tensor, fraction: Tensor) -> Tensor:
    r"""From a to b along the great circle between their directions: at fraction 0 a itself, at 1 b, bit for bit.

    $$\frac{\sin((1 - f) \omega)}{\sin \omega} a + \frac{\sin(f \omega)}{\sin \omega} b$$

    with $\omega$ the angle between a and b (Shoemake 1985). Half-way between two draws of $N(0, I)$ it has the norm of
    a draw, where a straight line's is smaller by $\sqrt 2$.
    a and b are ``[B, ...]``, the fraction f is ``[B]``.
    """
    x, y = a.double().flatten(1), b.double().flatten(1)
    cosine = (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1))
    angle = torch.arccos(cosine.clamp(-1, 1)) / torch.pi
    f = fraction.to(angle)
    weights = (share * torch.sinc(share * angle) / torch.sinc(angle) for share in (1 - f, f))
    of_a, of_b = (expand_to(weight, a) for weight in weights)
    return (of_a * a.double() + of_b * b.double()).to(a.dtype)


def _labels(module: DiffusionModule, labels: list[int] | None) -> list[int] | None:
    if not module.class_conditional:
        if labels is not None:
            raise InputError(f"--labels {list(labels)}: this model is not class-conditional")
        return None
    classes = module.num_classes or 0
    if labels is None:
        return list(range(classes))
    none = f", or be {classes} for no class" if module.label_dropout else ""
    if not labels or not all(0 <= label < classes + bool(none) for label in labels):
        raise InputError(f"--labels {list(labels)}: classes must lie between 0 and {classes - 1}{none}")
    return labels


def _given(module: DiffusionModule, request: SampleRequest) -> dict[str, Tensor]:
    """The vectors and fields that the images take in turn, by the name that the network knows them by."""
    found: dict[str, Tensor] = {}
    for name, value in (("vector", request.vectors), ("field", request.fields)):
        if (value is not None) != (name in module.conditions):
            known = f"give one for each image with --{name}s" if value is None else f"leave --{name}s out"
            what = "is told" if value is None else "is not told"
            raise InputError(f"this model {what} a {name} of each image: {known}")
    if request.vectors is not None:
        size = module.hparams["vector_size"]
        if not request.vectors or any(len(vector) != size for vector in request.vectors):
            raise InputError(f"--vectors {request.vectors}: give a list of vectors, each of {size} numbers")
        found["vector"] = torch.tensor(request.vectors, dtype=torch.float64).float()
        if not bool(found["vector"].isfinite().all()):  # a NaN would be drawn without a vector, in silence
            raise InputError(f"--vectors {request.vectors}: give finite numbers, which float32 can hold")
    if request.fields is not None:
        array = ArrayFile(request.fields, "--fields").array(None, None)
        shape = (module.hparams["field_channels"], *module.shape[1:])
        one = tuple(array.shape) == shape
        if not one and (tuple(array.shape[1:]) != shape or not array.shape[0]):
            found_shape = f"has shape {list(array.shape)}"
            raise InputError(f"--fields {request.fields}: {found_shape}; give one field or more, [m, *{list(shape)}]")
        rows = StoredRows(array, np.arange(array.shape[0]), array.shape[1:], f"--fields {request.fields}").in_memory()
        found["field"] = rows[None] if one else rows
    return found


def _guided(module: DiffusionModule, guide: DiffusionModule | None, scale: float) -> DiffusionModel:
    if guide is not None:
        if scale == 1:
            raise InputError(
                "--guidance_scale 1 is the model itself, whatever --guide: give another scale, for example 2"
            )
        return module.ema_model.with_denoiser(autoguidance(guide, scale))
    if scale == 1:
        return module.ema_model
    if not module.conditions:
        raise InputError(
            f"--guidance_scale {scale:g} needs a class-conditional model: train one with "
            "--model.class_conditional true and --model.label_dropout 0.1; or give a weaker model as --guide"
        )
    if module.label_dropout == 0:
        raise InputError(
            f"--guidance_scale {scale:g}: this model never saw an image without its class; train it with "
            "--model.label_dropout 0.1, or give a weaker model as --guide"
        )
    wrap = partial(ClassifierFreeDenoiser, scale=scale, num_classes=module.num_classes)
    return module.ema_model.with_denoiser(wrap)


def _described(part: object) -> dict[str, Any]:
    """Class and arguments of a part, but for those that are no plain data."""
    cls, arguments = type(part), {}
    for name in signature(cls).parameters:
        with suppress(TypeError, AttributeError):
            arguments[name] = describe(getattr(part, name))
    return {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
