r"""Guidance: a denoiser that wraps a denoiser, so that every sampler has it.

A factor r on the data's distribution (Sohl-Dickstein et al. 2015, arXiv 1503.03585, section 2.5),

.. math:: \tilde p(x_0) \propto p(x_0) r(x_0), \quad \tilde q(x_t) \propto q(x_t) r_t(x_t), \quad r_t = E[r(x_0) | x_t],

adds :math:`\nabla \log r_t` to the score. Since :math:`\epsilon = -\sigma_t \, \text{score}` and
:math:`x_t = \alpha_t x_0 + \sigma_t \epsilon`,

.. math:: \tilde\epsilon = \epsilon - \sigma_t \nabla \log r_t, \qquad \tilde x_0 = x_0 + \sigma_t^2 \nabla \log r_t /
\alpha_t

Autograd gives the gradients in x_t, under ``torch.no_grad`` and ``torch.inference_mode`` too. No gradient reaches the
weights of the network or anything outside of the wrapper. The exception is an ``x_t`` that requires a gradient, as in a
wrapper inside another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import as_times, expand_to
from ddpm_lightning.process.conditioning import NoiseConditioning, TimeConditioning
from ddpm_lightning.process.denoiser import Denoiser
from ddpm_lightning.process.parameterization import Prediction

__all__ = [
    "AutoguidedDenoiser", "ClassifierDenoiser", "ClassifierFreeDenoiser", "LogFactor", "ProductDenoiser",
    "differentiable", "fresh",
]  # fmt: skip

LogFactor = Callable[[Tensor, Tensor, Tensor], Tensor]
"""log r_t as a differentiable function of (x_t, x0_hat, t), up to a constant: ``[B]`` nats."""


@contextmanager
def differentiable(x_t: Tensor) -> Iterator[tuple[Tensor, bool]]:
    """x_t with autograd on, whatever the mode outside; and whether the result is to be differentiated further."""
    nested = torch.is_grad_enabled() and x_t.requires_grad
    with torch.inference_mode(False), torch.enable_grad():
        yield (x_t, True) if nested else (x_t.detach().clone().requires_grad_(), False)


def fresh(value: Any) -> Any:
    """A copy of a tensor, which autograd may keep even if the tensor was made in inference mode; else ``value``."""
    return value.clone() if isinstance(value, Tensor) else value


class ProductDenoiser(Denoiser):
    r"""The denoiser of :math:`p(x_t) \, r_t(x_t)`, for any differentiable :math:`\log r_t`.

    With :math:`r_t(x_t) = E[r(x_0) | x_t]` small reverse steps sample :math:`p(x_0) \, r(x_0)`; with any other r_t they
    sample something else. For several factors, add their logarithms, or wrap again.

    Args:
        denoiser: of p(x_t).
        log_factor: log r_t(x_t, x0_hat, t), ``[B]`` nats, up to a constant; x0_hat is the denoiser's x0 at x_t.
    """

    def __init__(self, denoiser: Denoiser, log_factor: LogFactor) -> None:
        self.denoiser, self.schedule, self.log_factor = denoiser, denoiser.schedule, log_factor

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        with differentiable(x_t) as (x, nested):
            t, cond = fresh(t), {name: fresh(value) for name, value in cond.items()}
            prediction = self.denoiser(x, t, **cond)
            log_factor = self.log_factor(x, prediction.x0, t)
            if log_factor.shape != x.shape[:1]:
                raise ValueError(f"log_factor gave shape {tuple(log_factor.shape)}, not one number for each image")
            (gradient,) = torch.autograd.grad(log_factor.sum(), x, create_graph=nested)
        prediction = prediction if nested else prediction.detached()
        return prediction.with_score_added(gradient, *self.scales(x_t, t))


class ClassifierDenoiser(Denoiser):
    r"""Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.1):

    .. math:: p(x_t) \, p(\text{class} | x_t)^\text{scale}

    At scale 1 and with the exact class posterior it samples the class. Calls need the class, ``label`` ``[B]``. Only
    the classifier is given the label, not the wrapped denoiser.

    Args:
        denoiser: of p(x_t), unconditional.
        classifier: ``classifier(x, c) -> [B, K]`` logits of the class, with x and c as for the network:
            x_t / sqrt(alpha_t^2 + sigma_t^2) and the scalar c ``[B]`` of ``conditioning``.
        scale: weight of the classifier; 0 switches it off.
        conditioning: the scalar that the classifier is given for t.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        classifier: Callable[[Tensor, Tensor], Tensor] | nn.Module,
        scale: float = 1.0,
        conditioning: NoiseConditioning | None = None,
    ) -> None:
        self.denoiser, self.classifier, self.scale = denoiser, classifier, scale
        self.conditioning = TimeConditioning() if conditioning is None else conditioning
        self.schedule = denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, *, label: Tensor | None = None, **cond: Any) -> Prediction:
        if label is None:
            raise InputError("classifier guidance needs to know the class to draw: give label")
        prediction = self.denoiser(x_t, t, **cond)
        with differentiable(x_t) as (x, nested):
            t, label = fresh(as_times(t, x)), fresh(label)
            level = self.conditioning(self.schedule, t).to(torch.promote_types(x.dtype, torch.float32))
            unit = expand_to(torch.exp(-0.5 * self.schedule.log_unit_var(t)), x).to(x.dtype)
            log_probs = self.classifier(unit * x, level.expand(len(x))).log_softmax(1)
            _check_label(label, len(x), log_probs.shape[1] - 1)
            log_prob = log_probs.gather(1, label[:, None])
            (gradient,) = torch.autograd.grad(log_prob.sum(), x, create_graph=nested)
        return prediction.with_score_added(self.scale * gradient, *self.scales(x_t, t))


class ClassifierFreeDenoiser(Denoiser):
    r"""Classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598, equation 6):

    .. math:: \tilde\epsilon = \epsilon(x_t) + \text{scale} \, (\epsilon(x_t, \text{label}) - \epsilon(x_t))

    Scale 1 is the conditional model, 0 the unconditional one; the paper's w is scale - 1. The factor is the model's own
    implicit classifier, :math:`r_t = (q(x_t | \text{label}) / q(x_t))^\text{scale}`. Above 1 this is not
    :math:`E[r(x_0) | x_t]`: the samples are sharper than the class and do not follow
    :math:`p(x_0) \, p(\text{label} | x_0)^\text{scale}`.

    Each prediction costs two evaluations of the network, one at scales 1 and 0. The reverse variance is the variance of
    the class. Calls need ``label`` ``[B]`` in 0..num_classes, where num_classes is "no class", or another condition:
    ``vector`` or ``field``. All that are given are guided together.

    Args:
        denoiser: takes the conditions, or None for none; its network was trained with ``label_dropout``.
        scale: weight of the class.
        num_classes: number of classes of the network; None for one without classes, to which a label is refused.
    """

    def __init__(self, denoiser: Denoiser, scale: float, num_classes: int | None) -> None:
        self.denoiser, self.schedule, self.scale, self.num_classes = denoiser, denoiser.schedule, scale, num_classes

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        if all(value is None for value in cond.values()):
            raise InputError("classifier-free guidance needs to know the class to draw: give label, vector or field")
        if cond.get("label") is not None:
            if self.num_classes is None:
                raise InputError(
                    "classifier-free guidance needs a class-conditional model: train one with "
                    "class_conditional = true and label_dropout = 0.1"
                )
            _check_label(cond["label"], len(x_t), self.num_classes)
        nothing = dict.fromkeys(cond)
        if self.scale == 0:
            return self.denoiser(x_t, t, **nothing)
        conditional = self.denoiser(x_t, t, **cond)
        if self.scale == 1:
            return conditional
        unconditional = self.denoiser(x_t, t, **nothing)
        return _beyond(unconditional, conditional, self.scale)


class AutoguidedDenoiser(Denoiser):
    r"""Autoguidance (Karras et al. 2024, arXiv 2406.02507): away from a weaker version of the same model.

    .. math:: \tilde\epsilon = \epsilon_\text{guide} + \text{scale} \, (\epsilon - \epsilon_\text{guide})

    and the same for x0. Scale 1 is the model itself, 0 the guide. Above 1 the samples move away from where the guide is
    wrong and the model less so, and no longer follow the model's distribution. The reverse variance is the model's.

    Each prediction costs an evaluation of both networks, at scale 1 of the model's alone. Both are given the same
    conditions.

    Args:
        denoiser: the model's.
        guide: of a smaller network, or of one that was trained for less long, under the same schedule
            (``NetworkDenoiser.under``).
        scale: how far to go from the guide, in units of the difference.
    """

    def __init__(self, denoiser: Denoiser, guide: Denoiser, scale: float) -> None:
        self.denoiser, self.guide, self.scale, self.schedule = denoiser, guide, scale, denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
        prediction = self.denoiser(x_t, t, **cond)
        return prediction if self.scale == 1 else _beyond(self.guide(x_t, t, **cond), prediction, self.scale)


def _beyond(start: Prediction, end: Prediction, scale: float) -> Prediction:
    """``end``, with x0 and eps on the line through both predictions: ``start`` at scale 0, ``end`` at 1."""
    # not torch.lerp, whose rounding depends on where in a batch a pixel lies
    x0, eps = (a + scale * (b - a) for a, b in ((start.x0, end.x0), (start.eps, end.eps)))
    return replace(end, x0=x0, eps=eps)


def _check_label(label: Tensor, count: int, last: int) -> None:
    if label.shape != (count,):
        raise InputError(f"label has shape {list(label.shape)} for {count} images: give one class for each")
    # values are read only where that waits for no device
    if label.device.type == "cpu" and not bool(((label >= 0) & (label <= last)).all()):
        raise InputError(f"label must lie between 0 and {last}, these span {int(label.min())} to {int(label.max())}")
