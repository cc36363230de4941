from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddpm_lightning.ops import log1mexp
from ddpm_lightning.schedules.base import Schedule

__all__ = ["TabulatedSchedule"]

_NAMES = ("gamma", "log_alpha", "log_sigma2", "log_unit_var", "alpha", "sigma")


def _looked_up(name: str) -> Callable[[Any, Tensor], Tensor]:
    """A method that reads the table, and asks the schedule where the time is not in it."""

    def value(self: "TabulatedSchedule", t: Tensor) -> Tensor:
        found = self._values[name].get(id(t))
        return getattr(self.schedule, name)(t) if found is None else found

    return value


def _of_each(values: Tensor) -> tuple[Tensor, ...]:
    """The values of each of K times, ``[K]`` -> ``[]``, ``[K, C, *space]`` -> ``[1, C, *space]``."""
    return values.unbind() if values.ndim == 1 else values.split(1)


class TabulatedSchedule(Schedule):
    """A view of a schedule, whose values at a sampler's times are computed all at once rather than in each step.

    A time of the table is recognised as the tensor object that it is, one of :attr:`times`. Any other time goes to the
    schedule itself, so the values are the same at all times.

    Args:
        schedule: what the values are of.
        times: float64 ``[K]``, decreasing, not the time of the data.

    Attributes:
        times: the K scalars to ask for.
    """

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.times = times.unbind()
        self._scales: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        values = {name: getattr(schedule, name)(times) for name in _NAMES}
        self._values = {
            name: dict(zip(map(id, self.times), _of_each(value), strict=True)) for name, value in values.items()
        }
        fractions = log1mexp(values["gamma"][:-1] - values["gamma"][1:])
        neighbours = zip(map(id, self.times[1:]), map(id, self.times[:-1]), strict=True)
        self._fractions = dict(zip(neighbours, _of_each(fractions), strict=True))

    def log_step_fraction(self, s: Tensor, t: Tensor) -> Tensor:
        fraction = self._fractions.get((id(s), id(t)))
        return super().log_step_fraction(s, t) if fraction is None else fraction

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        key = (id(t), like.dtype)
        if key not in self._scales:
            scales = super().scales(t, like)
            if id(t) not in self._values["alpha"]:
                return scales
            self._scales[key] = scales
        return self._scales[key]

    gamma, log_alpha, log_sigma2, log_unit_var, alpha, sigma = map(_looked_up, _NAMES)  # type: ignore[assignment]

    @property
    def preserves_variance(self) -> bool:
        return self.schedule.preserves_variance

    @property
    def pixel_shape(self) -> tuple[int, ...] | None:
        return self.schedule.pixel_shape

    def grid(self, T: int | None = None) -> Tensor:
        return self.schedule.grid(T)

    def gamma_slope(self, t: Tensor) -> Tensor:
        return self.schedule.gamma_slope(t)
