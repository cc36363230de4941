"""Options of a sweep: lists of values and ranges."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from ddpm_lightning.errors import InputError

__all__ = ["LARGEST_GRID", "Option", "Range", "Values", "read_space", "refuse_own", "short_name", "shown", "word"]

Scalar = bool | int | float | str | None
LARGEST_GRID = 10_000
_OWN = (
    "run_dir", "ckpt_path", "config", "print_config", "trainer.default_root_dir", "trainer.fast_dev_run", "dry_run",
    "no_device_check",
)  # fmt: skip


@dataclass(frozen=True)
class Values:
    """A list of values; one that is itself a list is kept as text in JSON."""

    values: tuple[Scalar, ...]

    def corners(self) -> tuple[Scalar, ...]:
        """Values that stand for all."""
        return self.values

    def points(self, where: str) -> list[Scalar]:
        """All values, for a grid; InputError where they have no end."""
        return list(self.values)

    def suggested(self, trial: Any, name: str) -> Scalar:
        """The value of an optuna.Trial, which is drawn at the first call."""
        return trial.suggest_categorical(name, self.values)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``: whole ones if both are, on a logarithmic scale, or in steps."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_whole(self) -> bool:
        return isinstance(self.low, int)

    def corners(self) -> tuple[Scalar, ...]:
        return self.low, self.high

    def points(self, where: str) -> list[Scalar]:
        step = self.step or (1 if self.is_whole and not self.log else None)
        if step is None:
            raise InputError(f"{where}: a grid needs a list of values, or a range with a step")
        count = round((self.high - self.low) / step) + 1
        if count > LARGEST_GRID:
            raise InputError(f"{where}: a grid of {count:,} points is too large: give a larger step")
        return [type(self.low)(self.low + k * step) for k in range(count)]

    def suggested(self, trial: Any, name: str) -> Scalar:
        if self.is_whole:
            return trial.suggest_int(name, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(name, self.low, self.high, step=self.step, log=self.log)


Option = Values | Range


def word(value: Scalar) -> str:
    """A value as it is written on the command line."""
    return value if isinstance(value, str) else json.dumps(value)


def shown(value: Scalar) -> str:
    """A value as it is shown to people."""
    return f"{value:.4g}" if isinstance(value, float) else word(value)


def refuse_own(name: str, where: str) -> None:
    """Refuse an option that the sweep sets itself; InputError."""
    if name in _OWN:
        raise InputError(f"{where}: {name} is the sweep's own affair: leave it out")


def read_space(space: Any, file: str) -> dict[str, Option]:
    """The options of a sweep, those first on which others depend.

    Args:
        space: what the file says, names of options to lists or mappings.
        file: its name, for messages.

    Raises:
        InputError: no option, or one whose values make no sense.
    """
    if not isinstance(space, Mapping) or not space:
        raise InputError(f"{file}: space must map options to values, as in  model.optimizer.lr: [1e-3, 1e-2]")
    options: dict[str, Option] = {}
    for name, values in space.items():
        where = f"{file}: space: {name}"
        if not isinstance(name, str) or name.startswith("-"):
            raise InputError(f"{where}: write the name of an option without dashes, as in model.optimizer.lr")
        refuse_own(name, f"{file}: space")
        short = short_name(name)
        if short in map(short_name, options):
            raise InputError(f"{where} is there twice")
        options[name] = _range(values, where) if isinstance(values, Mapping) else _values(values, where)
    # --model.schedule LinearGamma comes before --model.schedule.T 100, which belongs to it
    return dict(sorted(options.items(), key=lambda item: short_name(item[0]).count(".")))


def short_name(name: str) -> str:
    return name.replace(".init_args.", ".")


def _values(values: Any, where: str) -> Values:
    if not isinstance(values, list):
        raise InputError(f"{where} must be a list of values or a range {{low: ..., high: ...}}, not {values!r}")
    if not values:
        raise InputError(f"{where} has no values")
    plain = tuple(json.dumps(each) if isinstance(each, list | dict) else each for each in values)
    for each in plain:
        if not isinstance(each, Scalar):
            raise InputError(f"{where}: {each} is no value: write it in quotes")
        if isinstance(each, float) and not math.isfinite(each):
            raise InputError(f"{where}: {each} must be a finite number")
    if len({word(each) for each in plain}) < len(plain):
        raise InputError(f"{where}: a value is there twice")
    return Values(plain)


def _range(given: Mapping[Any, Any], where: str) -> Range:
    known = ("low", "high", "log", "step")
    for key in given:
        if key not in known:
            near = get_close_matches(str(key), known, 1)
            raise InputError(f"{where}: a range has low, high, log and step, not {key}" + _meant(near))
    for key in ("low", "high"):
        if key not in given:
            raise InputError(f"{where}: a range needs {key}")
    log, numbers = given.get("log", False), {key: given[key] for key in ("low", "high", "step") if key in given}
    if not isinstance(log, bool):
        raise InputError(f"{where}: log must be true or false, not {log!r}")
    for key, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{where}: {key} must be a finite number, not {value!r}")
    low, high, step = numbers["low"], numbers["high"], numbers.get("step")
    if not low < high:
        raise InputError(f"{where}: low = {low} must be below high = {high}")
    if log and low <= 0:
        raise InputError(f"{where}: low = {low} must be positive: the range is logarithmic")
    if step is not None and (log or step <= 0):
        raise InputError(f"{where}: step = {step} " + ("goes with no log" if log else "must be positive"))
    if step is not None and abs((high - low) / step - round((high - low) / step)) > 1e-9:
        raise InputError(f"{where}: high = {high} must be low = {low} and a whole number of steps of {step}")
    if all(isinstance(value, int) for value in numbers.values()):
        return Range(low, high, log, step)
    return Range(float(low), float(high), log, step)


def _meant(near: list[str]) -> str:
    return f": did you mean {near[0]}?" if near else ""
