"""A schedule at times that are known beforehand, computed all at once."""

import torch
from torch import Tensor

from ddpm_lightning.ops import log1mexp
from ddpm_lightning.schedules.base import Schedule

__all__ = ["TabulatedSchedule"]


class TabulatedSchedule(Schedule):
    """A view of a schedule for a walk over given times, whose values are computed once rather than in each step.

    A time of the table is recognised by the tensor object that it is, one of :attr:`times`; any other goes to the
    schedule itself, so the view gives the same values at all times.

    Args:
        schedule: what the values are of.
        times: float64 ``[K]`` in the order of the walk, decreasing, not the time of the data.

    Attributes:
        times: the K scalars to ask for.
    """

    def __init__(self, schedule: Schedule, times: Tensor) -> None:
        super().__init__()
        self.schedule = schedule
        self.times = times.unbind()
        self._scales: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        values = {
            name: getattr(schedule, name)(times)
            for name in ("gamma", "log_alpha", "log_sigma2", "log_unit_var", "alpha", "sigma")
        }
        self._values = {
            name: dict(zip(map(id, self.times), value.unbind(), strict=True)) for name, value in values.items()
        }

        fractions = log1mexp(values["gamma"][:-1] - values["gamma"][1:])
        neighbours = zip(map(id, self.times[1:]), map(id, self.times[:-1]), strict=True)
        self._fractions = dict(zip(neighbours, fractions.unbind(), strict=True))

    def log_step_fraction(self, s: Tensor, t: Tensor) -> Tensor:
        """log(1 - SNR(t)/SNR(s)); that of a walk's own steps is in the table."""
        fraction = self._fractions.get((id(s), id(t)))
        return super().log_step_fraction(s, t) if fraction is None else fraction

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t in the shape and type that meet images; those of a walk's times are made once."""
        key = (id(t), like.dtype)
        if key not in self._scales:
            scales = super().scales(t, like)
            if id(t) not in self._values["alpha"]:
                return scales
            self._scales[key] = scales
        return self._scales[key]

    def _value(self, name: str, t: Tensor) -> Tensor:
        value = self._values[name].get(id(t))
        if value is None:
            value = getattr(self.schedule, name)(t)
        return value

    @property
    def preserves_variance(self) -> bool:
        """That of the schedule."""
        return self.schedule.preserves_variance

    def grid(self, T: int | None = None) -> Tensor:
        """That of the schedule."""
        return self.schedule.grid(T)

    def gamma(self, t: Tensor) -> Tensor:
        """-log SNR(t)."""
        return self._value("gamma", t)

    def gamma_slope(self, t: Tensor) -> Tensor:
        """d gamma / dt, from the schedule."""
        return self.schedule.gamma_slope(t)

    def log_alpha(self, t: Tensor) -> Tensor:
        """Natural logarithm of the signal's scale."""
        return self._value("log_alpha", t)

    def log_sigma2(self, t: Tensor) -> Tensor:
        """Natural logarithm of the noise variance."""
        return self._value("log_sigma2", t)

    def log_unit_var(self, t: Tensor) -> Tensor:
        """log(alpha_t^2 + sigma_t^2)."""
        return self._value("log_unit_var", t)

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the signal."""
        return self._value("alpha", t)

    def sigma(self, t: Tensor) -> Tensor:
        """Standard deviation of the noise."""
        return self._value("sigma", t)
