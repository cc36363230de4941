"""What the model needs of data that are not an ``ImageDataModule``: facts, and batches of any DataLoader."""

from collections.abc import Mapping
from typing import Any

import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, Trainer
from torch import Tensor
from torch.utils.data import DistributedSampler

from ddpm_lightning.data.batches import Batch
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.data.transforms import check_grey_levels
from ddpm_lightning.errors import InputError

__all__ = ["OwnBatches", "instantiate_data"]

_FORMS = "(image, label), a dict with image and label, or the images alone"


def instantiate_data(described: Any) -> LightningDataModule:
    """The data that the ``data`` of a configuration describe.

    Raises:
        InputError: they do not say what their images are.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data: LightningDataModule = parser.instantiate(parser.parse_object({"data": described})).data
    _check_facts(data)
    return data


def _check_facts(data: LightningDataModule) -> None:
    name = type(data).__name__
    shape, levels, classes = (getattr(data, fact, None) for fact in ("shape", "levels", "num_classes"))
    if isinstance(data, ArrayDataModule) and levels is None:
        return
    if not (isinstance(shape, list | tuple) and len(shape) == 3 and all(_is_count(size) for size in shape)):
        raise InputError(
            f"{name}.shape is {shape}: give the class an attribute shape = (channels, height, width), "
            "for example (3, 32, 32)"
        )
    if not _is_count(levels):
        raise InputError(
            f"{name}.levels is {levels}: give the class an attribute levels = 256, the number of grey levels"
        )
    if classes is not None and not _is_count(classes):
        raise InputError(f"{name}.num_classes is {classes}: give a whole number, or None for data without classes")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


class OwnBatches:
    """Turns batches of the user's own DataLoaders into :class:`Batch`.

    The index of an image in an evaluation is its place in the order in which all processes together go through the
    split. What a DistributedSampler adds, so that all processes have the same number of images, is left out. In
    training an index is -1, for not known.

    Args:
        shape: (C, H, W) of the images.
        levels: number of grey levels.
    """

    def __init__(self, shape: tuple[int, ...], levels: int) -> None:
        self.shape, self.levels = shape, levels
        self._seen = 0  # images of this process in this evaluation

    def restart(self) -> None:
        """An evaluation begins."""
        self._seen = 0

    def __call__(self, given: Any, classes: int | None, trainer: Trainer) -> Batch:
        """The batch ``given``: (image, label) in a list or tuple, a mapping with these names, or images alone.

        Labels must lie in 0..classes-1; a model without classes (None) needs none.

        Raises:
            InputError: another form; images that are not uint8 ``[B, C, H, W]`` grey levels; labels that are no whole
                numbers ``[B]``, out of their range, or missing where the model needs them.
        """
        image, label = _parts(given)
        self._check_images(image)
        label = _label(label, len(image), classes)
        if trainer.training:
            return Batch(image, label, torch.full((len(image),), -1))
        rank, world, size = _share(trainer)
        index = (self._seen + torch.arange(len(image))) * world + rank
        self._seen += len(image)
        kept = index < (size or torch.inf)
        return Batch(image, label, index) if kept.all() else Batch(image[kept], label[kept], index[kept])

    def _check_images(self, image: Tensor) -> None:
        check_grey_levels(image, self.levels, "a batch of the data")
        if image.shape[1:] != self.shape:
            raise InputError(
                f"a batch of the data has images of shape {list(image.shape)}: the model takes [B, C, H, W] = "
                f"{['B', *self.shape]}".replace("'", "")
            )


def _label(label: Any, count: int, classes: int | None) -> Tensor:
    if label is None and classes is None:
        return torch.zeros(count, dtype=torch.int64)
    if label is None:
        raise InputError(f"a batch of the data has no labels, and the model needs classes: let it be {_FORMS}")
    label = torch.as_tensor(label)
    if label.is_floating_point() or label.dtype == torch.bool or label.shape != (count,):
        raise InputError(
            f"a batch of the data has labels {label.dtype} {list(label.shape)} for {count} images: give whole "
            "numbers, one for each image"
        )
    if classes is not None and not bool(((label >= 0) & (label < classes)).all()):
        raise InputError(
            f"a batch of the data has labels from {int(label.min())} to {int(label.max())}: the model's classes "
            f"are 0..{classes - 1}"
        )
    return label.long()


def _parts(given: Any) -> tuple[Tensor, Any]:
    image, label = given, None
    if isinstance(given, Mapping) and "image" in given:
        image, label = given["image"], given.get("label")
    elif isinstance(given, list | tuple) and len(given) in (1, 2):
        image, label = (*given, None)[:2]
    if isinstance(image, Tensor):
        return image, label
    if isinstance(given, Mapping):
        got = f"a dict with {', '.join(map(str, given))}"
    else:
        got = f"a {type(given).__name__}" + (f" of {len(given)}" if isinstance(given, list | tuple) else "")
    raise InputError(f"a batch of the data is {got}: let it be {_FORMS}, as tensors (collate_fn of a DataLoader)")


def _share(trainer: Trainer) -> tuple[int, int, int | None]:
    """Which images of the split this process evaluates: its place, the number of processes, and of all images."""
    loaders: dict[str, Any] = {
        "validate": trainer.val_dataloaders,
        "test": trainer.test_dataloaders,
        "predict": trainer.predict_dataloaders,
    }
    stage = trainer.state.stage.value if trainer.state.stage else ""
    loader = loaders.get(stage, trainer.val_dataloaders)  # before training, the validation is tried
    loader = loader[0] if isinstance(loader, list | tuple) and loader else loader
    sampler = getattr(loader, "sampler", None)
    if isinstance(sampler, DistributedSampler):
        return sampler.rank, sampler.num_replicas, len(sampler.dataset)  # type: ignore[arg-type]  # it has a length
    return trainer.global_rank, trainer.world_size, None
