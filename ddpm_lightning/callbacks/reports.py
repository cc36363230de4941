"""Callbacks that write the bound down: a table of its terms, and every image's terms."""

import csv
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from ddpm_lightning import __version__
from ddpm_lightning.metrics import BoundScores, bits_per_dim
from ddpm_lightning.objectives import ContinuousElbo, ElboEstimator
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.module import DiffusionModule

__all__ = ["BoundTable", "ImageTermsWriter", "bound_table", "model_facts"]

_COSTS = ("prior_matching", "consistency", "denoising_matching", "path_log_ratio", "diffusion")


def _steps_evaluated(estimator: ElboEstimator, own_T: int) -> dict[str, int | None]:
    """Number of states and of network evaluations; T is None for the limit of infinitely many states."""
    if isinstance(estimator, ContinuousElbo):
        return {"T": None, "steps_evaluated": estimator.steps}
    T = estimator.T or own_T
    return {"T": T, "steps_evaluated": T - 1 if estimator.steps is None else min(estimator.steps, T - 1)}


def _steps_in_words(estimator: ElboEstimator, own_T: int) -> str:
    facts = _steps_evaluated(estimator, own_T)
    T, steps = facts["T"], facts["steps_evaluated"]
    if T is None:
        return f"{steps} times, T infinite"
    return (f"all {steps}" if steps == T - 1 else str(steps)) + ("" if estimator.T is None else f" with T = {T}")


def model_facts(module: DiffusionModule) -> dict[str, Any]:
    """What a figure of the bound depends on besides images and steps, as plain data."""
    model = module.ema_model
    return {
        "dims": module.dims,
        "levels": module.levels,
        "T": model.T,
        "weights": "averaged",
        "ema_decay": module.ema_decay,
        "steps_trained": module.steps_trained,
        "clip_x0": model.clip_x0,
        "variance": type(model.reverse_process.variance).__name__,
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


def bound_table(figures: BoundScores, dims: int) -> str:
    """The terms of each form in nats an image and in bits a dimension, with standard errors over images."""
    lines = [f"{'form':<12} {'term':<24} {'nats/image':>22} {'bits/dim':>22}"]
    for form, terms in figures.items():
        lines.append("-" * len(lines[0]))
        for name, (mean, error) in terms.items():
            if name == "bits_per_dim":
                continue
            # a probability's code length is its negative logarithm; a cost already is a length
            sign = 1 if name in _COSTS or name.endswith("_kl") else -1
            nats = f"{mean:.3f} +- {error:.3f}"
            bits = f"{bits_per_dim(sign * mean, dims):.5f} +- {bits_per_dim(error, dims):.5f}"
            label = f"({name})" if name.endswith("_kl") else name
            lines.append(f"{form:<12} {label:<24} {nats:>22} {bits:>22}")
    return "\n".join(lines)


class BoundTable(Callback):
    """After validate and test: print the bound's table and write RUN/bound-STAGE.txt and .json."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For the ``validate`` command; ``fit`` has its own lines."""
        if trainer.state.fn == "validate":
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """For the ``test`` command."""
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, module: LightningModule, stage: Literal["val", "test"]) -> None:
        assert isinstance(module, DiffusionModule)
        if not trainer.is_global_zero:
            return
        figures = module.bound_figures[stage]
        model = module.ema_model
        estimators = module.bounds[stage]
        facts = model_facts(module)
        evaluated = ", ".join(f"{e.name}: {_steps_in_words(e, model.T)}" for e in estimators)
        versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
        head = [
            f"Bound on {module.images_evaluated[stage]} images ({stage}), T = {model.T}, averaged weights after "
            f"{module.steps_trained} steps, x0 {'clipped' if model.clip_x0 else 'not clipped'}",
            f"{facts['decoder']} over {module.levels} levels, {facts['variance']}; "
            f"reverse steps evaluated: {evaluated}",
            f"one draw for each image and step from eval_seed {module.eval_seed}; +- is the standard error over images",
            f"precision {trainer.precision}, {facts['device']}; {versions}",
        ]
        if model.decoder.is_density:
            constant = math.log2((module.levels - 1) / 2)
            head.append(f"A density on [-1, 1]: add {constant:.5f} bits/dim for units of one grey level.")
        text = "\n".join([*head, "", bound_table(figures, module.dims), ""])
        print(text, flush=True)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"bound-{stage}.txt").write_text(text)
        record = {
            "stage": stage,
            "images": module.images_evaluated[stage],
            **facts,
            "precision": str(trainer.precision),
            "bounds": {e.name: {**_steps_evaluated(e, model.T), "draws": 1} for e in estimators},
            "figures": {
                form: {name: {"mean": mean, "se": error} for name, (mean, error) in terms.items()}
                for form, terms in figures.items()
            },
        }
        (folder / f"bound-{stage}.json").write_text(json.dumps(record, indent=1) + "\n")


class ImageTermsWriter(BasePredictionWriter):
    """``predict``: the terms of every image's bound in RUN/image_terms.csv, nats an image, in order of index."""

    def __init__(self) -> None:
        super().__init__(write_interval="epoch")

    def write_on_epoch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        predictions: Sequence[Any],
        batch_indices: Sequence[Any] | None,
    ) -> None:
        """Gather all processes' rows and write them once."""
        if not predictions or "index" not in predictions[0]:
            return
        columns = {name: torch.cat([batch[name].cpu() for batch in predictions]) for name in predictions[0]}
        parts = gather_to_all(columns)
        if not trainer.is_global_zero:
            return
        merged = {name: torch.cat([part[name] for part in parts]) for name in columns}
        order = merged["index"].argsort()
        path = Path(trainer.default_root_dir) / "image_terms.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(merged)
            writer.writerows(zip(*(values[order].tolist() for values in merged.values()), strict=True))
        print(f"terms of {len(order)} images: {path}", flush=True)
