from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule, Trainer

from ddpm_lightning.data.batches import EvalBatches, Split, TrainBatches
from ddpm_lightning.data.transforms import check_grey_levels
from ddpm_lightning.errors import InputError

__all__ = ["ArrayDataModule", "ImageDataModule", "OnDevice", "SplitName", "batches_done"]

SplitName = Literal["train", "val", "test"]
OnDevice = bool | Literal["auto"]

_SPLITS_OF_STAGE: dict[str | None, tuple[SplitName, ...]] = {
    "fit": ("train", "val"),
    "validate": ("val",),
    "test": ("test",),
    "predict": ("test",),
    None: ("train", "val", "test"),
}


def batches_done(trainer: Trainer) -> int:
    """Training batches done since the run began, over all its resumptions: what order and noise are functions of."""
    # restored from every kind of checkpoint; total.ready and current_epoch are off in some
    total = trainer.fit_loop.epoch_loop.batch_progress.total
    return total.processed  # type: ignore[attr-defined]  # Lightning types it too widely


class ArrayDataModule(LightningDataModule):
    """Labelled arrays of one shape: splits that are served in an order that resumes exactly.

    A subclass states the facts below, tells the sizes of its splits, and loads and checks them
    (:class:`ImageDataModule`, ``data.fields.Fields``).

    Args:
        sizes: number of images in "train", "val" and "test".
        batch_size: training images per step over all processes together: with 4 GPUs each gets a quarter. A run on
            another number of processes sees the same batches.
        eval_batch_size: images per batch in validation, test and predict, per process.
        seed: order of the training images.
        limit_val: validate on the first that many images only; None for the whole split.
        limit_test: the same for test and predict.
        on_device: keep the data on the model's device and pick the batches there; "auto" does where they lie in memory
            and take less than half of a GPU's free memory. Otherwise a GPU gets each batch from page-locked memory,
            without waiting for it. The batches are the same.
    """

    shape: tuple[int, ...]
    """(channels, *space)."""
    levels: int | None
    """Number of grey levels; None for real numbers."""
    num_classes: int | None
    """Labels are 0..num_classes-1; None for data without classes."""
    scale: Mapping[str, Sequence[float]] | None = None
    """``mean`` and ``std`` of each channel, by which real numbers are standardised; None for grey levels."""
    vector_size: int | None = None
    """Numbers in the condition ``vector`` of each row; None for data without."""
    field_channels: int | None = None
    """Channels of the condition ``field`` of each row; None for data without."""
    planned_processes = 1
    """Of a dry run: training batches are the first process's share among so many."""

    def __init__(
        self,
        sizes: dict[str, int],
        *,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        seed: int = 0,
        limit_val: int | None = None,
        limit_test: int | None = None,
        on_device: OnDevice = "auto",
    ) -> None:
        super().__init__()
        _check_at_least(1, batch_size=batch_size, eval_batch_size=eval_batch_size)
        _check_at_least(0, seed=seed)
        limits = {"limit_val": limit_val, "limit_test": limit_test}
        _check_at_least(1, **{name: limit for name, limit in limits.items() if limit is not None})
        self.sizes, self.seed, self.on_device = sizes, seed, on_device
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.limit_val, self.limit_test = limit_val, limit_test
        self._splits: dict[SplitName, Split] = {}

    def load(self, split: SplitName) -> Split:
        """Read one split: images ``[N, *shape]``, labels int64 ``[N]``.

        Called at most once per split and process. The images and their order must be the same every time: the training
        order and the indices in a batch refer to rows.
        """
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Load the splits that ``stage`` (fit, validate, test, predict; None for all) needs and that are not there."""
        for name in _SPLITS_OF_STAGE[stage]:
            self.split(name)

    def split(self, name: SplitName) -> Split:
        """The whole split, on every process, whatever the limits; loaded on first use."""
        if name not in self._splits:
            loaded = self.load(name)
            self.check(name, loaded)
            self._splits[name] = loaded
        return self._splits[name]

    @property
    def vector_scale(self) -> dict[str, list[float]] | None:
        """``mean`` and ``std`` of each number of the condition ``vector`` in the training split, 1 for the standard
        deviation of a number that is always the same; None for data without vectors."""
        if self.vector_size is None:
            return None
        vectors = self.split("train").cond["vector"].double()
        std = vectors.std(0, correction=0)
        return {"mean": vectors.mean(0).tolist(), "std": torch.where(std > 0, std, 1.0).tolist()}

    def train_dataloader(self) -> TrainBatches:
        rank, world = self._rank_and_world() if self.planned_processes == 1 else (0, self.planned_processes)
        return TrainBatches(self._placed("train"), self.batch_size, self.seed, self._batches_done, rank, world)

    def val_dataloader(self) -> EvalBatches:
        return self._eval_batches("val", self.limit_val)

    def test_dataloader(self) -> EvalBatches:
        return self._eval_batches("test", self.limit_test)

    def predict_dataloader(self) -> EvalBatches:
        return self.test_dataloader()

    def _eval_batches(self, name: SplitName, limit: int | None) -> EvalBatches:
        rank, world = self._rank_and_world()
        return EvalBatches(self._placed(name), self.eval_batch_size, rank, world, limit)

    def _placed(self, name: SplitName) -> Split:
        """The split where its batches are to be picked."""
        split = self.split(name)
        device = torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device
        if device.type == "cpu":
            return split
        on_device = self.on_device
        if on_device == "auto":
            fits = device.type != "cuda" or split.nbytes < torch.cuda.mem_get_info(device)[0] / 2
            on_device = fits and split.in_memory
        return split.to(device) if on_device else replace(split, pinned=device.type == "cuda")

    def _rank_and_world(self) -> tuple[int, int]:
        return (0, 1) if self.trainer is None else (self.trainer.global_rank, self.trainer.world_size)

    def _batches_done(self) -> int:
        if self.trainer is None:
            return 0
        done = batches_done(self.trainer)
        # the first batches of the first epoch again and again
        return done % int(self.trainer.num_training_batches) if self.trainer.overfit_batches else done  # type: ignore[attr-defined]

    def check(self, name: SplitName, split: Split) -> None:
        """Refuse, with an InputError, a split that is not what the facts say."""
        raise NotImplementedError


class ImageDataModule(ArrayDataModule):
    """Labelled uint8 images that fit into memory.

    Your own data set states three facts about its images, tells the sizes of its splits and loads them::

        import torch

        from ddpm_lightning.data import ImageDataModule, Split, SplitName


        class Photos(ImageDataModule):  # in photos.py
            shape = (3, 32, 32)  # channels, height, width
            levels = 256  # grey levels per channel, values 0..255
            num_classes = 10

            def __init__(self, root: str = "data", batch_size: int = 128, seed: int = 0) -> None:
                super().__init__({"train": 45_000, "val": 5_000, "test": 10_000}, batch_size=batch_size, seed=seed)
                self.root = root

            def load(self, split: SplitName) -> Split:
                images, labels = torch.load(f"{self.root}/{split}.pt")
                return Split(images, labels)  # uint8 [N, 3, 32, 32] and int64 [N]

    Then ``--data photos.Photos --data.root ...`` trains on it. Override ``prepare_data`` to download or to check
    files; it runs once per machine and must not keep anything in ``self``. What ``load`` returns is compared with the
    three facts and the sizes, so a mistake shows before the first step.

    Args:
        sizes: number of images in "train", "val" and "test".
        options: as of :class:`ArrayDataModule`.
    """

    shape: tuple[int, int, int]
    """(channels, height, width)."""
    levels: int
    """Number of grey levels; pixels are 0..levels-1."""
    num_classes: int

    def __init__(self, sizes: dict[str, int], **options: Any) -> None:
        super().__init__(sizes, **options)

    def check(self, name: SplitName, split: Split) -> None:
        n = self.sizes[name]
        source = f"{type(self).__name__}.load({name!r})"
        if not isinstance(split, Split):
            raise InputError(f"{source} returned a {type(split).__name__}: return Split(images, labels)")
        if split.images.is_floating_point():
            check_grey_levels(split.images, self.levels, source)
        for what, tensor, dtype, shape, top in (
            ("images", split.images, torch.uint8, (n, *self.shape), self.levels - 1),
            ("labels", split.labels, torch.int64, (n,), self.num_classes - 1),
        ):
            if tensor.dtype != dtype or tuple(tensor.shape) != shape:
                raise InputError(
                    f"{source} returned {what} {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
                )
            if n == 0:
                raise InputError(f"{source} returned no {what}: a split needs at least one image")
            low, high = int(tensor.min()), int(tensor.max())
            if low < 0 or high > top:
                raise InputError(f"{source} returned {what} from {low} to {high}, expected values in 0..{top}")


def _check_at_least(least: int, **arguments: int) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise InputError(f"--data.{name}={value!r} must be a whole number >= {least}")
