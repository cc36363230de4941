"""The bound as a report: what it was measured of, and a table of its terms."""

import csv
import io
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from typing import Any, Literal

import lightning
import torch
from torch import Tensor

from ddpm_lightning import __version__
from ddpm_lightning.data import Batch
from ddpm_lightning.evaluation.trained import Trained
from ddpm_lightning.metrics import BoundScores, MeanAndError, bits_per_dim
from ddpm_lightning.objectives import ElboEstimator
from ddpm_lightning.training.module import GenerativeModule

__all__ = [
    "bound_report", "bound_table", "csv_text", "image_bits", "in_bits", "mean_and_error", "model_facts",
    "units_of_density",
]  # fmt: skip


def model_facts(module: GenerativeModule) -> dict[str, Any]:
    """What a measurement of a model depends on besides images and steps, as plain data."""
    model = module.ema_model
    return {
        "dims": module.dims,
        "levels": module.levels,
        "density_nats_in_data_units": module.scale.density_nats(module.shape) if model.decoder.is_density else None,
        "T": model.T,
        "weights": "averaged",
        **({"ema_decay": module.ema_decay} if module.sigma_rel is None else {"sigma_rel": module.sigma_rel}),
        "steps_trained": module.steps_trained,
        **model.facts(),
        "decoder": type(model.decoder).__name__,
        "density": model.decoder.is_density,
        "class_conditional": module.class_conditional,
        "eval_seed": module.eval_seed,
        "device": module.device.type,
        "versions": {
            "ddpm_lightning": __version__,
            "torch": str(torch.__version__),
            "lightning": lightning.__version__,
        },
    }


def bound_table(scores: BoundScores, dims: int) -> str:
    """The terms of each form in nats an image and in bits a dimension, with standard errors over images."""
    lines = [f"{'form':<12} {'term':<24} {'nats/image':>22} {'bits/dim':>22}"]
    for form, terms in scores.items():
        lines.append("-" * len(lines[0]))
        for name, score in terms.items():
            length = score.in_bits(dims)
            nats, bits = f"{score.mean:.3f} +- {score.se:.3f}", f"{length.mean:.5f} +- {length.se:.5f}"
            label = f"({name})" if score.kind == "diagnostic" else name
            lines.append(f"{form:<12} {label:<24} {nats:>22} {bits:>22}")
    return "\n".join(lines)


def bound_report(module: GenerativeModule, stage: Literal["val", "test"], precision: str) -> tuple[str, dict[str, Any]]:
    """The module's last scores of a stage as text and as plain data; ``precision`` in the Trainer's words."""
    scores, images, model = module.bound_scores[stage], module.images_evaluated[stage], module.ema_model
    estimators = [module.drawing(estimator) for estimator in module.bounds[stage]]
    facts = model_facts(module)
    evaluated = ", ".join(f"{e.name}: {steps_in_words(e, model.T)}" for e in estimators)
    clipped, parts = facts.get("clip_x0"), facts.get("variance") or f"shapes {facts['shapes']}"
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    over = "" if module.levels is None else f" over {module.levels} levels"
    head = [
        f"Bound on {images} images ({stage}), T = {model.T}, averaged weights after "
        f"{module.steps_trained} steps"
        + ("" if clipped is None else f", x0 {'clipped' if clipped else 'not clipped'}"),
        f"{facts['decoder']}{over}, {parts}; reverse steps evaluated: {evaluated}",
        f"{_draws_in_words(estimators)} for each image and step from eval_seed {module.eval_seed}; +- is the standard "
        "error over images",
        f"precision {precision}, {facts['device']}; {versions}",
    ]
    head += units_of_density(module)
    chains = {estimator: estimator.evaluated(model.T) for estimator in estimators}
    with_bits = {form: {**terms, "bits_per_dim": terms["elbo"].in_bits(module.dims)} for form, terms in scores.items()}
    record = {
        "stage": stage,
        "images": images,
        **facts,
        "precision": precision,
        "bounds": {
            e.name: {
                "T": T,
                "steps_evaluated": steps,
                "steps_chosen": "all" if T is not None and steps == T - 1 else e.choice.words,
                "draws": e.draws,
            }
            for e, (T, steps) in chains.items()
        },
        "figures": {
            form: {name: {"mean": score.mean, "se": score.se} for name, score in terms.items()}
            for form, terms in with_bits.items()
        },
    }
    return "\n".join([*head, "", bound_table(scores, module.dims)]), record


def units_of_density(module: GenerativeModule) -> list[str]:
    """A line about a bound that is a density; none where it is a probability."""
    if not module.ema_model.decoder.is_density:
        return []
    units = "the units of the data" if module.levels is None else "units of one grey level"
    constant = bits_per_dim(-module.scale.density_nats(module.shape), module.dims)
    return [f"A density of the model's values: add {constant:.5f} bits/dim for {units}."]


def _draws_in_words(estimators: Iterable[ElboEstimator]) -> str:
    more = "".join(f" ({e.name}: {e.draws})" for e in estimators if e.draws > 1)
    return f"one draw{more}"


def steps_in_words(estimator: ElboEstimator, own_T: int) -> str:
    """How many of how many steps an estimator evaluates of a model with ``own_T`` states."""
    T, steps = estimator.evaluated(own_T)
    drawn = f" {estimator.choice.words}"
    if T is None:
        return f"{steps} times{drawn}, T infinite"
    return (f"all {steps}" if steps == T - 1 else f"{steps}{drawn}") + ("" if estimator.T is None else f" with T = {T}")


def image_bits(trained: Trained, estimator: ElboEstimator, images: Batch, what: str) -> Tensor:
    """The bound of each image, bits/dim, float64 ``[N]``."""
    with torch.inference_mode():
        nats = [trained.module.bound(estimator, part)["elbo"].cpu() for part in trained.batches(images, what)]
    return in_bits(torch.cat(nats), trained.module.dims)


def in_bits(nats: Tensor, dims: int) -> Tensor:
    """The code length of log probabilities ``[N]``, bits/dim, float64."""
    return torch.tensor([bits_per_dim(-value, dims) for value in nats.tolist()], dtype=torch.float64)


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean over images and its standard error."""
    metric = MeanAndError()
    metric.update(values)
    result = metric.compute()
    return float(result["mean"]), float(result["se"])


def csv_text(columns: Mapping[str, list[Any]]) -> str:
    """A table as text with commas: a line of names, then the rows; a column that ends early is left empty."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip_longest(*columns.values(), fillvalue=""))
    return text.getvalue()
