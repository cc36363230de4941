"""Callbacks that log how training goes, beyond its loss, and what run it is. All draw no random numbers."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.optim import Optimizer

from ddpm_lightning.callbacks.publishing import publish_options, publish_picture, publish_text
from ddpm_lightning.errors import at_least
from ddpm_lightning.figures import CostCurve, cost_curves
from ddpm_lightning.metrics import bits_per_dim
from ddpm_lightning.objectives import ElboTerms
from ddpm_lightning.runs import Run
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.module import DiffusionModule, GenerativeModule

__all__ = ["CostByTime", "GradientNorm", "LossByTime", "RunOptions"]


def _is_logged(trainer: Trainer) -> bool:
    """Whether the optimiser step in progress is one whose loss the logger will write."""
    interval = trainer.log_every_n_steps  # type: ignore[attr-defined]  # Lightning's connectors set it
    return bool(interval) and (trainer.global_step + 1) % interval == 0


class GradientNorm(Callback):
    """``train/grad_norm``: the Euclidean norm of the whole gradient before it is clipped, at every logged step."""

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not _is_logged(trainer):
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if hasattr(norm, "full_tensor"):
            norm = norm.full_tensor()  # of sharded weights
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            norm = norm / scaler.get_scale()  # such an optimiser undoes the scale itself, in its step
        pl_module.log("train/grad_norm", norm.detach(), batch_size=1)


class LossByTime(Callback):
    """``train/loss_at_t_A-B``: the training loss of the images whose time lies from A to B, at every logged step.

    A and B are positions on the time axis, from the chain's first state at 0 to its last at 1. An objective that draws
    no times has no such losses. Of what an objective adds to the loss that depends on the time, nothing is counted.

    Args:
        bins: number of equal parts of the time axis.

    Raises:
        InputError: ``bins`` is less than 1.
    """

    def __init__(self, bins: int = 4) -> None:
        at_least(1, bins=bins)
        self.bins = bins
        self._due = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._due = _is_logged(trainer)  # the step counts before this batch's end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, GenerativeModule)
        if not self._due or pl_module.objective.by_time is None:
            return
        position, loss = pl_module.objective.by_time
        place = (position * self.bins).long().clamp(0, self.bins - 1)
        sums = loss.new_zeros(2, self.bins)
        sums[0].index_add_(0, place, loss)
        sums[1].index_add_(0, place, torch.ones_like(loss))
        sums = trainer.strategy.reduce(sums, reduce_op="sum")
        for k, (total, count) in enumerate(sums.T.tolist()):
            if count:
                name = f"train/loss_at_t_{k / self.bins:.2f}-{(k + 1) / self.bins:.2f}"
                pl_module.log(name, total / count, batch_size=1)


class CostByTime(Callback):
    """Which steps of the chain carry the bits: RUN/bound-STAGE.png, and to the loggers, after each validation and test.

    For each form of the bound, the mean cost of its reverse steps over the images, as a density over t and added up.
    The reconstruction and the prior term, which are no steps, are left out, and so is the trajectory form.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def _start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sums.clear()

    def _add(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not isinstance(pl_module, DiffusionModule):
            return  # the levels of a hierarchy have no times
        found: Mapping[str, ElboTerms] = outputs
        for form, terms in found.items():
            n, costs = terms.step_indices.flatten().cpu(), terms.step_costs.flatten().cpu()
            new = torch.stack([torch.bincount(n, costs), torch.bincount(n).to(costs)])
            old = self._sums.get(form, new[:, :0])
            size = max(old.shape[1], new.shape[1])
            padded = [torch.nn.functional.pad(each, (0, size - each.shape[1])) for each in (old, new)]
            self._sums[form] = padded[0] + padded[1]

    on_validation_epoch_start = on_test_epoch_start = _start
    on_validation_batch_end = on_test_batch_end = _add

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._draw(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._draw(trainer, pl_module, "test")

    def _draw(self, trainer: Trainer, module: LightningModule, stage: Literal["val", "test"]) -> None:
        parts = gather_to_all(self._sums)
        if not (trainer.is_global_zero and isinstance(module, DiffusionModule)):
            return
        curves = {}
        for estimator in module.bounds[stage]:
            sums = [part[estimator.name] for part in parts if estimator.name in part]
            steps = module.drawing(estimator).steps_at(module.ema_model)
            if not sums or steps is None or len(steps[0]) < 2:
                continue
            edges, share = steps
            total = torch.zeros(2, len(edges), dtype=torch.float64)
            for each in sums:
                total[:, : each.shape[1]] += each
            cost = (total[0] / total[1])[1:]  # NaN where no image was
            curves[estimator.name] = CostCurve(edges.cpu(), cost * bits_per_dim(share, module.dims))
        if curves:
            picture = cost_curves(curves)
            publish_picture(trainer, f"{stage}/cost by time", picture, f"bound-{stage}.png", module.steps_trained)


class RunOptions(Callback):
    """What run it is, to the loggers once in ``fit``: its options as hyper-parameters, which TensorBoard compares by
    the bounds of validation and test, and the text of its configuration."""

    def __init__(self) -> None:
        self._is_said = False

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._is_said:
            return
        self._is_said = True  # the command line writes the configuration before the first step
        assert isinstance(pl_module, GenerativeModule)
        run = Run.of(trainer)
        config = run.config if run.config_path.is_file() else {"model": dict(pl_module.hparams)}
        options = _flat({name: config[name] for name in ("model", "data", "seed_everything") if name in config})
        for name in ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val"):
            options[f"trainer.{name}"] = getattr(trainer, name)
        options["trainer.processes"] = trainer.world_size
        forms = [(stage, estimator.name) for stage, bounds in pl_module.bounds.items() for estimator in bounds]
        publish_options(trainer, options, [f"{stage}/{form}/bits_per_dim" for stage, form in forms])
        publish_text(trainer, "configuration", yaml.safe_dump(config, sort_keys=False))


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    """Options by dotted names; a part has its class's name for a value, and its arguments under its own name."""
    if isinstance(value, list) and any(isinstance(each, dict) for each in value):
        value = {str(number): each for number, each in enumerate(value)}
    if not isinstance(value, dict):
        return {} if value is None or name.startswith("model._") else {name: value}
    flat = {}
    for key, each in value.items():
        if key == "class_path":
            flat[name] = str(each).rpartition(".")[2]
        else:
            flat |= _flat(each, name if key == "init_args" else f"{name}.{key}".removeprefix("."))
    return flat
