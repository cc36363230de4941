"""A schedule computed beforehand for a walk gives what the schedule gives."""

import pytest
import torch
from torch import Tensor
from worlds_flow import SCHEDULES, elementwise_model, start

from ddpm_lightning.process import ProductDenoiser
from ddpm_lightning.samplers import AncestralSampler
from ddpm_lightning.schedules import LearnedGamma, Schedule, TabulatedSchedule

ALL: dict[str, Schedule] = {**{name: schedule for name, (schedule, _) in SCHEDULES.items()}, "learned": LearnedGamma()}
NAMES = ("gamma", "log_alpha", "log_sigma2", "log_unit_var", "alpha", "sigma")


@pytest.mark.parametrize("name", ALL)
def test_it_gives_the_same_at_its_times_and_elsewhere(name: str) -> None:
    schedule = ALL[name]
    times = schedule.grid(9)[1:].flip(0)
    table = TabulatedSchedule(schedule, times)
    elsewhere = [torch.tensor(0.37, dtype=torch.float64), torch.tensor([0.2, 0.9], dtype=torch.float64)]
    for function in NAMES:
        for t in (*table.times, *elsewhere):
            torch.testing.assert_close(getattr(table, function)(t), getattr(schedule, function)(t), rtol=1e-14, atol=0)
    for t, s in zip(table.times[:-1], table.times[1:], strict=True):
        for function in ("log_step_fraction", "log_step_var", "log_posterior_var"):
            torch.testing.assert_close(getattr(table, function)(s, t), getattr(schedule, function)(s, t))
    assert table.preserves_variance == schedule.preserves_variance == (name != "exploding")
    for dtype in (torch.float32, torch.float64):
        x = torch.zeros(2, 1, 3, 3, dtype=dtype)
        for t in (*table.times, *elsewhere, *table.times):
            for ours, theirs in zip(table.scales(t, x), schedule.scales(t, x), strict=True):
                assert ours.dtype == dtype and ours.shape == (*t.shape, *[1] * (4 - t.ndim))
                torch.testing.assert_close(ours, theirs)
    assert torch.equal(table.gamma_slope(times), schedule.gamma_slope(times))
    assert torch.equal(table.grid(5), schedule.grid(5))


def test_a_walk_asks_its_schedule_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = elementwise_model(), []
    gamma = type(model.schedule).gamma

    def counted(self: Schedule, t: Tensor) -> Tensor:
        asked.append(t.numel())
        return gamma(self, t)

    monkeypatch.setattr(type(model.schedule), "gamma", counted)
    costs = []
    for steps in (5, 50):
        asked.clear()
        AncestralSampler()(model, start(model, (1, 1, 2, 2)), grid=model.with_steps(steps).grid)
        costs.append(len(asked))
    assert costs[0] == costs[1]


def test_a_tabulated_model_is_a_view_with_every_wrapper() -> None:
    model = elementwise_model()
    state = list(model.state_dict())

    def factor(x_t: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        return -x0_hat.square().flatten(1).sum(1)

    wrapped = model.with_denoiser(lambda d: ProductDenoiser(d, factor)).with_denoiser(
        lambda d: ProductDenoiser(d, lambda x_t, x0_hat, t: 2 * factor(x_t, x0_hat, t))
    )
    times = model.grid[1:].flip(0)[:3]
    table, scalars = wrapped.tabulated(times)
    x_t = start(model, (2, 1, 2, 2))
    ours, theirs = (m.reverse_process.denoiser(x_t, t) for m, t in ((table, scalars[1]), (wrapped, times[1])))
    assert torch.equal(ours.x0, theirs.x0) and torch.equal(ours.eps, theirs.eps)
    assert not torch.equal(theirs.x0, model.reverse_process.denoiser(x_t, times[1]).x0)
    assert table.network is model.network and list(model.state_dict()) == state
    assert model.schedule is not table.schedule and wrapped.schedule is model.schedule
