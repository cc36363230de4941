"""Callbacks that write the bound down: a table of its terms, and every image's terms."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter

from ddpm_lightning.callbacks.publishing import publish_text
from ddpm_lightning.errors import RunError
from ddpm_lightning.evaluation.bound import bound_report, csv_text
from ddpm_lightning.evaluation.trained import publish
from ddpm_lightning.runs import Run
from ddpm_lightning.training.distributed import gather_to_all
from ddpm_lightning.training.module import GenerativeModule

__all__ = ["BoundTable", "ImageTermsWriter"]


class BoundTable(Callback):
    """After validate and test: print the bound's table, write RUN/bound-STAGE.txt and .json, and give it to the
    loggers."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":  # fit has its own lines
            self._write(trainer, pl_module, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer, pl_module, "test")

    def _write(self, trainer: Trainer, module: LightningModule, stage: Literal["val", "test"]) -> None:
        assert isinstance(module, GenerativeModule)
        if trainer.is_global_zero:
            text, record = bound_report(module, stage, str(trainer.precision))
            publish(Run.of(trainer), f"bound-{stage}", text, record)
            publish_text(trainer, f"{stage}/bound", text)
        for form, terms in module.bound_scores[stage].items():
            if not math.isfinite(terms["elbo"].mean):
                raise RunError(
                    f"the bound in the {form} form is {terms['elbo'].mean}: the weights or the schedule give no finite "
                    "numbers; take another checkpoint, or --trainer.precision 32-true"
                )


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
        if not predictions or "index" not in predictions[0]:
            return
        columns = {name: torch.cat([batch[name].cpu() for batch in predictions]) for name in predictions[0]}
        parts = gather_to_all(columns)
        if not trainer.is_global_zero:
            return
        merged = {name: torch.cat([part[name] for part in parts]) for name in columns}
        order = merged["index"].argsort()
        text = csv_text({name: values[order].tolist() for name, values in merged.items()})
        print(f"terms of {len(order)} images: {Run.of(trainer).write('image_terms.csv', text)}", flush=True)
