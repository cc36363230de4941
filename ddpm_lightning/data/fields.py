"""Real-valued fields on grids of one to three dimensions, from a user's own file."""

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddpm_lightning.data.batches import Split
from ddpm_lightning.data.datamodule import ArrayDataModule, SplitName
from ddpm_lightning.data.stored import ArrayFile, StoredRows
from ddpm_lightning.errors import InputError

__all__ = ["Fields"]

# rows from which mean and standard deviation are measured, at most
_MEASURED = 20_000
_AT_ONCE = 500


class Fields(ArrayDataModule):
    """Fields ``[N, C, *space]`` of real numbers with one, two or three dimensions of space.

    The file is .npy, .npz, HDF5 or zarr (the last two need ``pip install "ddpm-lightning[fields]"``). A file larger
    than ``memory_gb`` is read row by row. The model sees the fields standardised, (x - mean) / std for each channel;
    samples come back in the units of the file.

    Args:
        path: the file. It must be given.
        key: name of the array in it; None for the only one, or the one called fields, x, images or data.
        channel_axis: false for a file ``[N, *space]`` without channels.
        val_path: a file of validation fields of the same form; None sets rows of ``path`` aside.
        test_path: a file of test fields; None sets rows of ``path`` aside.
        val_fraction: share of the rows of ``path`` that is set aside for validation, where there is no ``val_path``.
        test_fraction: the same for the test.
        split_seed: which rows are set aside.
        label: name of an array of classes, whole numbers ``[N]`` from 0.
        vector: name of an array of real numbers ``[N, K]`` or ``[N]``, to be given to the network.
        field: name of an array ``[N, C', *space]`` of fields, to be given to the network.
        mean: of each channel; None measures it on training fields, at most 20,000. A run keeps what it was trained
            with.
        std: the same for the standard deviation. A channel that never changes gets 1.
        memory_gb: arrays up to this size, in units of 10^9 bytes, are read into memory as float32.
        options: batch_size and the other arguments of :class:`ArrayDataModule`.

    Raises:
        InputError: a file that cannot be read, or with an array of another rank, type or length than it should have.
    """

    levels = None

    def __init__(
        self,
        path: str = "",
        key: str | None = None,
        channel_axis: bool = True,
        val_path: str | None = None,
        test_path: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        split_seed: int = 0,
        label: str | None = None,
        vector: str | None = None,
        field: str | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        memory_gb: float = 2.0,
        **options: Any,
    ) -> None:
        if not path:
            raise InputError("--data.path is missing: name the file that holds the fields")
        self.path, self.key, self.channel_axis = path, key, channel_axis
        self.files = {"train": path, "val": val_path or path, "test": test_path or path}
        self.label, self.vector, self.field, self.memory_gb = label, vector, field, memory_gb
        self._scale = (mean, std)
        for name, value in (("val_fraction", val_fraction), ("test_fraction", test_fraction)):
            if not 0 < value < 1:
                raise InputError(f"--data.{name} {value:g} must lie between 0 and 1")
        if not memory_gb >= 0:
            raise InputError(f"--data.memory_gb {memory_gb:g} must be 0 or more")
        if split_seed < 0:
            raise InputError(f"--data.split_seed {split_seed} must be 0 or more")
        self._arrays: dict[str, dict[str, Any]] = {}
        whole = self._described("train")["fields"]
        self.shape = self._row_shape(whole.shape, self.path)
        shares: dict[str, float] = {
            "val": 0.0 if val_path else val_fraction,
            "test": 0.0 if test_path else test_fraction,
        }
        self._rows = self._divided(whole.shape[0], shares, split_seed)
        later: tuple[SplitName, ...] = ("val", "test")
        for name in later:
            if self.files[name] != path:
                found = self._described(name)["fields"].shape
                if self._row_shape(found, self.files[name]) != self.shape:
                    raise InputError(
                        f"--data.{name}_path {self.files[name]} holds fields of shape {list(found[1:])} and "
                        f"--data.path {path} of shape {list(whole.shape[1:])}: give the same"
                    )
                self._rows[name] = np.arange(found[0])
        super().__init__({name: len(rows) for name, rows in self._rows.items()}, **options)
        self._check_conditions()

    # ---------------------------------------------------------------- facts

    @cached_property
    def scale(self) -> Mapping[str, Sequence[float]]:  # type: ignore[override]  # measured on first use
        """``mean`` and ``std`` of each channel."""
        mean, std = self._scale
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) != self.shape[0]:
                raise InputError(f"--data.{name} has {len(values)} numbers for {self.shape[0]} channels: give one each")
        if mean is None or std is None:
            measured = self._measured()
            mean, std = measured[0] if mean is None else mean, measured[1] if std is None else std
        return {"mean": list(mean), "std": list(std)}

    def _measured(self) -> tuple[list[float], list[float]]:
        train = self._stored("train")
        chosen = np.sort(np.random.default_rng(0).permutation(len(train))[:_MEASURED])
        counts, means, squares = 0, np.zeros(self.shape[0]), np.zeros(self.shape[0])
        low, high = np.full(self.shape[0], np.inf), np.full(self.shape[0], -np.inf)
        whole = self._split("train").images if self._fits(train) else train
        for start in range(0, len(chosen), _AT_ONCE):
            part = whole[torch.from_numpy(chosen[start : start + _AT_ONCE])].double().transpose(0, 1).flatten(1).numpy()
            # the update of Chan et al. 1979: no difference of large sums
            count, mean = counts + part.shape[1], part.mean(1)
            squares += part.var(1) * part.shape[1] + (mean - means) ** 2 * counts * part.shape[1] / count
            means += (mean - means) * part.shape[1] / count
            counts = count
            low, high = np.minimum(low, part.min(1)), np.maximum(high, part.max(1))
        # by its ends: rounding gives a channel that never changes some standard deviation
        constant = low == high
        if constant.any():
            channels = ", ".join(map(str, np.flatnonzero(constant)))
            print(f"{self.path}: channel {channels} never changes, and gets std 1", file=sys.stderr, flush=True)
        return np.where(constant, low, means).tolist(), np.where(constant, 1.0, np.sqrt(squares / counts)).tolist()

    # ---------------------------------------------------------------- splits

    def load(self, split: SplitName) -> Split:
        return self._split(split)

    def _split(self, name: SplitName) -> Split:
        if name in self._splits:
            return self._splits[name]
        rows, stored = self._rows[name], self._stored(name)
        images = stored.in_memory() if self._fits(stored) else cast(Tensor, stored)
        arrays = self._described(name)
        labels = torch.zeros(len(rows), dtype=torch.int64)
        cond: dict[str, Tensor] = {}
        if "label" in arrays:
            named = f"--data.label {self.label}"
            labels = StoredRows(arrays["label"], rows, (), named).classes(cast(int, self.num_classes) - 1)
        if "vector" in arrays:
            values = arrays["vector"]
            vector = StoredRows(values, rows, (cast(int, self.vector_size),), self._named(name, self.vector))
            cond["vector"] = vector.in_memory()
        if "field" in arrays:
            values = arrays["field"]
            shape = (cast(int, self.field_channels), *self.shape[1:])
            field = StoredRows(values, rows, shape, self._named(name, self.field))
            cond["field"] = field.in_memory() if self._fits(field) else cast(Tensor, field)
        self._splits[name] = Split(images, labels, cond=cond)
        return self._splits[name]

    def check(self, name: SplitName, split: Split) -> None:
        """Nothing: files were compared with each other, and values are looked at when they are read."""

    def _stored(self, name: SplitName) -> StoredRows:
        return StoredRows(self._described(name)["fields"], self._rows[name], self.shape, self._named(name, self.key))

    def _named(self, split: SplitName, key: str | None) -> str:
        return f"{self.files[split]}" + (f", {key}" if key else "")

    def _fits(self, stored: StoredRows) -> bool:
        array = stored.array
        if array.must_load and array.nbytes > 1e9 * self.memory_gb:
            raise InputError(
                f"{stored.name} is compressed and holds {array.nbytes / 1e9:.3g} GB, more than --data.memory_gb "
                f"{self.memory_gb:g}: save it with np.savez or as .npy, or raise the limit"
            )
        return array.must_load or stored.nbytes <= 1e9 * self.memory_gb

    def _divided(self, count: int, shares: dict[str, float], seed: int) -> dict[SplitName, np.ndarray]:
        sizes = {name: round(share * count) or int(share > 0) for name, share in shares.items()}
        if count - sum(sizes.values()) < 1:
            raise InputError(
                f"--data.path {self.path} holds {count} fields: too few for training, validation and test, which take "
                f"the rest, {sizes['val']} and {sizes['test']}; give more, or lower --data.val_fraction and "
                "--data.test_fraction"
            )
        try:
            order = np.random.default_rng(seed).permutation(count)
        except MemoryError:
            raise InputError(f"--data.path {self.path} claims {count} fields, whose order alone fills memory") from None
        ends = np.cumsum([sizes["val"], sizes["test"]])
        val, test, train = np.split(order, ends)
        return {"train": np.sort(train), "val": np.sort(val), "test": np.sort(test)}

    # ---------------------------------------------------------------- files

    def _described(self, split: str) -> dict[str, Any]:
        """The arrays of a split's file by what they are for."""
        path = self.files[split]
        if path not in self._arrays:
            file = ArrayFile(path, "--data.path" if path == self.path else f"--data.{split}_path")
            found = {"fields": file.array(self.key, "--data.key")}
            for name in ("label", "vector", "field"):
                if (key := getattr(self, name)) is not None:
                    found[name] = file.array(key, f"--data.{name}")
            self._arrays[path] = found
            array = found["fields"]
            if array.dtype.kind != "f":
                raise InputError(
                    f"{path} holds {array.dtype} numbers, and fields are real: save it with .astype('float32') "
                    "(pictures of grey levels have data modules of their own)"
                )
            for name, each in found.items():
                if each.shape[:1] != array.shape[:1]:
                    raise InputError(
                        f"{path} holds {array.shape[0]} fields, and {getattr(self, name)} has the shape "
                        f"{list(each.shape)}: give one row for each field"
                    )
        return self._arrays[path]

    def _row_shape(self, shape: Sequence[int], path: str) -> tuple[int, ...]:
        row = tuple(shape[1:]) if self.channel_axis else (1, *shape[1:])
        if not 2 <= len(row) <= 4 or min(shape) < 1:
            form = "[N, C, *space]" if self.channel_axis else "[N, *space]"
            raise InputError(
                f"{path} holds an array of shape {list(shape)}: fields are {form} with one to three dimensions of "
                "space; for a file without an axis of channels set --data.channel_axis false"
            )
        return row

    def _check_conditions(self) -> None:
        self.num_classes = self._classes("train") if self.label else None
        self.vector_size, self.field_channels = self._size("vector", "train"), self._size("field", "train")
        later: tuple[SplitName, ...] = ("val", "test")
        for split in later:
            if self.files[split] == self.path:
                continue
            for name, mine in (("vector", self.vector_size), ("field", self.field_channels)):
                if (theirs := self._size(name, split)) != mine:
                    raise InputError(
                        f"--data.{split}_path {self.files[split]}: {getattr(self, name)} has the size {theirs}, and in "
                        f"--data.path {self.path} it is {mine}: give the same"
                    )
            if self.num_classes is not None:
                self._classes(split, self.num_classes - 1)

    def _size(self, name: str, split: SplitName) -> int | None:
        """Numbers of a vector, channels of a field; None where the data have none."""
        if getattr(self, name) is None:
            return None
        shape = tuple(self._described(split)[name].shape)
        space, form = ((), "[N, K] or [N]") if name == "vector" else (self.shape[1:], f"[N, C, *{[*self.shape[1:]]}]")
        given = (*shape, 1) if name == "vector" and len(shape) == 1 else shape
        if len(given) != 2 + len(space) or given[2:] != space or given[1] < 1:
            file = "" if split == "train" else f" of {self.files[split]}"
            raise InputError(f"--data.{name} {getattr(self, name)}{file}: has the shape {list(shape)}; give {form}")
        return int(given[1])

    def _classes(self, split: SplitName, last: int | None = None) -> int:
        """Number of classes; ``last`` is the last one that there may be, by default one for each row."""
        array = self._described(split)["label"]
        file = "" if split == "train" else f" of {self.files[split]}"
        rows = StoredRows(array, np.arange(array.shape[0]), (), f"--data.label {self.label}{file}")
        return int(rows.classes(len(rows) - 1 if last is None else last).max()) + 1
