"""Callbacks that decide when a picture is made."""

from copy import deepcopy

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from ddpm_lightning.callbacks.publishing import publish_picture
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.errors import InputError, at_least
from ddpm_lightning.figures import forward_strip, schedule_curves, tile
from ddpm_lightning.ops import image_generators
from ddpm_lightning.samplers import AncestralSampler, Sampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.schedules import Schedule, strided_grid
from ddpm_lightning.training.module import DiffusionModule, GenerativeModule

__all__ = ["ForwardStrip", "SampleGrid", "ScheduleCurves"]


class SampleGrid(Callback):
    """A grid of samples of the averaged model, from the same seeds each time, to the loggers and RUN/samples/: after
    each validation within ``fit`` and when training ends.

    Args:
        sampler: how to sample; None for AncestralSampler, which also stands in for a sampler that the model's encoder
            rules out, and for a hierarchical VAE.
        steps: steps of the sampler, cut to the T of a chain that has fewer; None for all T.
        n: number of images.
        seed: seed of the images.
    """

    def __init__(self, sampler: Sampler | None = None, steps: int | None = None, n: int = 64, seed: int = 0) -> None:
        at_least(1, n=n, steps=1 if steps is None else steps)
        self.sampler, self.steps, self.n, self.seed = sampler, steps, n, seed
        self._last_step: int | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or self.sampler is None or not isinstance(pl_module, DiffusionModule):
            return
        try:
            self.sampler.check(pl_module.model)
        except InputError as error:
            rank_zero_warn(f"SampleGrid draws with AncestralSampler: {error}")
            self.sampler = AncestralSampler()

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, GenerativeModule)
        with pl_module.whole_average():
            if trainer.is_global_zero:
                self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, GenerativeModule)
        if self._last_step == trainer.global_step:
            return  # this step's validation has drawn it
        self._last_step = trainer.global_step
        data, names = getattr(trainer, "datamodule", None), [*module.conditions]
        told = data.split("val").cond if isinstance(data, ArrayDataModule) else {}
        # vectors and fields of validation rows; classes are taken in turn
        cond = {name: told[name][: self.n] for name in names if name in told}
        draw = SampleRequest(self.sampler, self.steps, seed=self.seed, cap_steps=True).on(module, cond)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            images = draw(range(self.n))
        publish_picture(trainer, "samples", tile(images, module.levels), f"samples/step_{trainer.global_step:07d}.png")


class ForwardStrip(Callback):
    """A strip of images losing their signal, once at the start of training, to the loggers and RUN/forward.png.

    Args:
        n: number of images.
        columns: number of noisy states shown for each.
        seed: seed of the noise.
    """

    def __init__(self, n: int = 6, columns: int = 11, seed: int = 0) -> None:
        at_least(1, n=n, columns=columns)
        self.n, self.columns, self.seed = n, columns, seed

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, ArrayDataModule):
            return
        assert isinstance(pl_module, DiffusionModule)
        model = pl_module.model
        x0 = pl_module.scale.to_model(data.split("val").images[: self.n].to(pl_module.device))
        times = strided_grid(model.grid, min(self.columns, model.T))[1:].to(pl_module.device)
        generators = image_generators(self.seed, range(len(x0)))
        with torch.no_grad():
            picture = forward_strip(model.forward_process, x0, times, generators, grey=pl_module.levels is not None)
        publish_picture(trainer, "forward process", picture, "forward.png")


class ScheduleCurves(Callback):
    """gamma(t) and its slope, to the loggers and RUN/schedule.png, when training starts; and for a learned schedule
    after each validation and at the end, as it is now, averaged, and as this training found it."""

    def __init__(self) -> None:
        self._at_start: Schedule | None = None

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        self._at_start = deepcopy(pl_module.model.schedule)
        name = "start" if self._at_start.is_learned else type(self._at_start).__name__
        self._publish(trainer, {name: self._at_start})

    @rank_zero_only
    def _draw_learned(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, DiffusionModule)
        start = self._at_start
        if start is not None and start.is_learned and trainer.state.fn == "fit":
            now, averaged = pl_module.model.schedule, pl_module.ema_model.schedule
            self._publish(trainer, {"start": start, "now": now, "averaged": averaged})

    on_validation_end = on_train_end = _draw_learned

    def _publish(self, trainer: Trainer, curves: dict[str, Schedule]) -> None:
        publish_picture(trainer, "schedule", schedule_curves(curves), "schedule.png")
