"""Lightning's Trainer with one more thing to do: sample."""

import atexit
import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Literal

from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.callbacks import ModelCheckpoint

from ddpm_lightning.checkpoints.files import AtomicCheckpointIO, read_checkpoint
from ddpm_lightning.errors import InputError
from ddpm_lightning.numbers import PARTS
from ddpm_lightning.process import DiffusionModel
from ddpm_lightning.runs import Run
from ddpm_lightning.runs.lock import hold
from ddpm_lightning.samplers import InpaintingFactory
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.sampling.known import read_inpainting
from ddpm_lightning.sampling.output import ImageFile, check_folder
from ddpm_lightning.sampling.task import SamplingTask
from ddpm_lightning.training.hardware import Precision, resolve
from ddpm_lightning.training.module import GenerativeModule

__all__ = ["DiffusionTrainer"]


class DiffusionTrainer(Trainer):
    """The Trainer of the ``ddpm`` command line: it samples, and keeps its run in one folder, ``default_root_dir``.

    Checkpoints are written whole or not at all, and, unless a callback names another folder, into the run's own,
    whatever the logger. ``fast_dev_run`` writes into a folder that goes when the process ends.

    Args:
        accelerator: as in Lightning's Trainer, but ``auto`` takes the CPU rather than Apple's GPU.
        precision: as in Lightning's Trainer, or ``auto``: what is fast on this machine (``training/hardware.py``).
        devices: as in Lightning's Trainer.
        num_nodes: as in Lightning's Trainer.
        default_root_dir: the run's folder.
        fast_dev_run: as in Lightning's Trainer.
    """

    def __init__(
        self,
        *args: Any,
        accelerator: str | Accelerator = "auto",
        precision: Precision | None = None,
        devices: list[int] | str | int = "auto",
        num_nodes: int = 1,
        default_root_dir: str | Path | None = None,
        fast_dev_run: int | bool = False,
        **kwargs: Any,
    ) -> None:
        run = Run(Path.cwd() if default_root_dir is None else default_root_dir)
        if fast_dev_run:
            run = Run(mkdtemp(prefix="fast_dev_run."))
            atexit.register(shutil.rmtree, run.folder, ignore_errors=True)
        # where another library has written float | int first, the command line reads 2 as 2.0
        kwargs.update({name: int(kwargs[name]) for name in PARTS if (kwargs.get(name) or 0) > 1})
        accelerator, resolved, _ = resolve(accelerator, precision, devices, num_nodes)
        super().__init__(
            *args,
            accelerator=accelerator,
            precision=resolved,
            devices=devices,
            num_nodes=num_nodes,
            default_root_dir=run.folder,
            fast_dev_run=fast_dev_run,
            **kwargs,
        )
        for callback in self.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                callback.dirpath = str(run.checkpoints)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:  # one given as a plugin stays
            self.strategy.checkpoint_io = AtomicCheckpointIO()

    def sample(
        self,
        model: GenerativeModule,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        n: int = 64,
        known: str | None = None,
        mask: str | None = None,
        inpainting: InpaintingFactory | None = None,
        batch_size: int = 64,
        out: str | None = None,
        format: Literal["safetensors", "npz"] = "safetensors",
        grid_images: int = 64,
        gif: bool = False,
        **request: Any,
    ) -> None:
        """Draw images from a trained model into samples.safetensors, and the first of them into samples.png.

        Image k of a seed is the same whatever n, batch_size and the number of processes. Memory does not grow with n.

        Args:
            model: the module.
            datamodule: not used; the command line passes it.
            ckpt_path: checkpoint to load; "last" for the run's last one.
            weights_only: false lets the checkpoint run code while it is loaded; null and true do not.
            n: number of images; of rows with interpolate_to.
            known: inpainting: the image whose known pixels are kept (.png), or images as this command writes them
                (.safetensors, .npz), one or n.
            mask: inpainting: which pixels of it are known: white in a black and white .png of the image's size, or
                true in a bool mask (.safetensors, .npz).
            inpainting: how: ReplacementSampler (the default; its resamplings above 1 are RePaint's), or
                MomentMatchingSampler, which guides by the gradient of the known pixels' likelihood.
            batch_size: images drawn at a time on each process.
            out: folder for what is written; null for the run's folder.
            format: of the file of images: uint8 grey levels [n, C, H, W], with their labels; of fields float32
                [n, C, *space], in the units of the data.
            grid_images: so many at most of the images are shown in samples.png and samples.gif.
            gif: draw samples.gif too: these images on their way from noise.
            request: the other fields of SampleRequest.

        Raises:
            InputError: a number out of its range, no checkpoint, guidance of a model that was not trained for it, files
                that do not fit the model, a folder that is full, cannot be written to, or is being sampled into.
        """
        for name, value in (("n", n), ("batch_size", batch_size), ("grid_images", grid_images)):
            if value < 1:
                raise InputError(f"--{name} {value} must be 1 or more")
        if model.levels is None and (known or mask or inpainting):
            raise InputError("--known and --mask are pictures of grey levels, and this model draws fields")
        pixels = read_inpainting(known, mask, inpainting, n, model.shape, model.levels or 0)
        asked = SampleRequest(inpainting=pixels, cap_steps=False, **request)
        drawing = asked.on(model)
        if gif and not isinstance(model.model, DiffusionModel):
            raise InputError("--gif true shows images on their way from noise: a hierarchical VAE has no such way")
        if gif and len(model.shape) != 3:
            raise InputError(f"--gif true shows data of two dimensions, and these have the shape {list(model.shape)}")
        if ckpt_path is None:
            raise InputError("sample needs a trained model: give --ckpt_path FILE, or last for the run's last one")
        folder = (Run(out) if out else Run.of(self)).folder
        settings = {"n": n, "ckpt_path": ckpt_path, "known": known, "mask": mask, **drawing.description()}
        metadata = {"seed": str(asked.seed), "settings": json.dumps(settings)}
        labelled = drawing.labels is not None
        real, count = model.levels is None, n * drawing.columns
        file = ImageFile(folder / "samples.safetensors", count, model.shape, labelled, metadata, real)
        check_folder(folder, file.size * (2 if format == "npz" else 1), n)
        with hold(folder / ".samples.lock", "is being sampled into") if self.is_global_zero else nullcontext():
            checkpoint = read_checkpoint(ckpt_path, weights_only=weights_only is not False)
            model.on_load_checkpoint(checkpoint)
            model.load_state_dict(checkpoint["state_dict"])
            if isinstance(model.ema_model, DiffusionModel) and model.ema_model.schedule.is_learned:
                drawing = asked.on(model)  # the weights decide where its steps are
            task = SamplingTask(drawing, file, batch_size, filmed=grid_images if gif else 0)
            self.predict(task, return_predictions=False)
            task.publish(format == "npz", grid_images)
