r"""Guidance: a denoiser that wraps a denoiser, so that every sampler has it.

A factor r on the data's distribution (Sohl-Dickstein et al. 2015, arXiv 1503.03585, section 2.5),

.. math:: \tilde p(x_0) \propto p(x_0) r(x_0), \quad \tilde q(x_t) \propto q(x_t) r_t(x_t), \quad r_t = E[r(x_0) | x_t],

adds grad log r_t to the score. Since eps = -sigma_t score and x_t = alpha_t x0 + sigma_t eps,

.. math:: \tilde\epsilon = \epsilon - \sigma_t \nabla \log r_t, \tilde x_0 = x_0 + \sigma_t^2 \nabla \log r_t / \alpha_t

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

__all__ = ["ClassifierDenoiser", "ClassifierFreeDenoiser", "LogFactor", "ProductDenoiser", "differentiable", "fresh"]

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
    """The denoiser of p(x_t) r_t(x_t), for any differentiable log r_t.

    With r_t(x_t) = E[r(x_0) | x_t] small reverse steps sample p(x_0) r(x_0); with any other r_t they sample something
    else. For several factors, add their logarithms, or wrap again.

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
    """Classifier guidance (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.1): p(x_t) p(class | x_t)^scale.

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
    implicit classifier, r_t = (q(x_t | label) / q(x_t))^scale. Above 1 this is not E[r(x_0) | x_t]: the samples are
    sharper than the class and do not follow p(x_0) p(label | x_0)^scale.

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
        # not torch.lerp, whose rounding depends on where in a batch a pixel lies
        x0, eps = (
            none + self.scale * (known - none)
            for none, known in ((unconditional.x0, conditional.x0), (unconditional.eps, conditional.eps))
        )
        return replace(conditional, x0=x0, eps=eps)


def _check_label(label: Tensor, count: int, last: int) -> None:
    if label.shape != (count,):
        raise InputError(f"label has shape {list(label.shape)} for {count} images: give one class for each")
    # values are read only where that waits for no device
    if label.device.type == "cpu" and not bool(((label >= 0) & (label <= last)).all()):
        raise InputError(f"label must lie between 0 and {last}, these span {int(label.min())} to {int(label.max())}")
