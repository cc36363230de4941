"""Time grids by noise level: equal steps in gamma and Karras' steps in sigma / alpha, for every schedule."""

import math

import pytest
import torch

from ddpm_lightning.errors import InputError
from ddpm_lightning.schedules import (
    BetaChain,
    CosineChain,
    CosineGamma,
    KarrasGrid,
    LearnedGamma,
    LinearChain,
    LinearGamma,
    LogSNRGrid,
    Schedule,
    StridedGrid,
    VarianceExploding,
    karras_grid,
    logsnr_grid,
    strided_grid,
)


def learned() -> LearnedGamma:
    """Far from linear."""
    schedule = LearnedGamma(-9.0, 6.0, T=20, units=5)
    with torch.no_grad():
        schedule.raw_height += torch.tensor([3.0, 0.0, 5.0, 1.0, 4.0])
    return schedule


SCHEDULES: dict[str, Schedule] = {
    "linear chain": LinearChain(1000),
    "cosine chain": CosineChain(50),
    "betas": BetaChain([0.02, 0.1, 0.05, 0.6]),
    "linear": LinearGamma(-13.0, 5.0, T=10),
    "cosine": CosineGamma(-9.0, 8.0, T=10),
    "learned": learned(),
    "exploding": VarianceExploding(CosineGamma(-9.0, 8.0, T=10)),
    "exploding chain": VarianceExploding(LinearChain(30, 1e-3, 0.3)),
}


@pytest.mark.parametrize("steps", [2, 3, 8, 100])
@pytest.mark.parametrize("name", SCHEDULES)
def test_steps_are_equal_in_gamma_or_follow_karras(name: str, steps: int) -> None:
    schedule = SCHEDULES[name]
    chain = schedule.grid()
    gamma_first, gamma_last = (float(schedule.gamma(chain[i]).detach()) for i in (1, -1))
    equal = [gamma_first + (gamma_last - gamma_first) * i / (steps - 1) for i in range(steps)]

    def karras(rho: float) -> list[float]:
        """Equation 5 as printed, from the largest sigma down, and the last state first."""
        large, small = math.exp(gamma_last / 2), math.exp(gamma_first / 2)
        sigmas = [
            (large ** (1 / rho) + i / (steps - 1) * (small ** (1 / rho) - large ** (1 / rho))) ** rho
            for i in range(steps)
        ]
        return [2 * math.log(sigma) for sigma in reversed(sigmas)]

    cases = [
        (logsnr_grid(schedule, chain, steps), equal),
        (karras_grid(schedule, chain, steps), karras(7.0)),
        (karras_grid(schedule, chain, steps, rho=2.5), karras(2.5)),
    ]
    for grid, gammas in cases:
        assert grid.dtype == torch.float64 and grid.shape == (steps + 1,) and not grid.requires_grad
        assert grid[0] == chain[0] and grid[1] == chain[1] and grid[-1] == 1
        assert bool((grid.diff() > 0).all())
        assert schedule.gamma(grid[1:]).detach().tolist() == pytest.approx(gammas, abs=1e-9)


def test_linear_gamma_is_inverted_to_the_last_digits() -> None:
    schedule = LinearGamma(-13.0, 5.0, T=7)
    expected = torch.linspace(0, 1, 1001, dtype=torch.float64)
    assert float((logsnr_grid(schedule, schedule.grid(), 1001)[1:] - expected).abs().max()) < 2e-15


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_step_and_all_steps(name: str) -> None:
    schedule = SCHEDULES[name]
    chain = schedule.grid()
    for grid in (logsnr_grid(schedule, chain, 1), karras_grid(schedule, chain, 1)):
        assert grid.tolist() == [float(chain[0]), 1.0]
    assert len(logsnr_grid(schedule, chain, None)) == len(chain)


def test_a_longer_chain_starts_at_its_own_first_state() -> None:
    schedule = LinearChain(100)
    assert logsnr_grid(schedule, schedule.grid(400), 7)[1] == 1 / 400


@pytest.mark.parametrize("steps", [0, -2])
def test_steps_errors(steps: int) -> None:
    schedule = LinearChain(10)
    with pytest.raises(InputError, match=f"steps = {steps} must be 1 or more"):
        logsnr_grid(schedule, schedule.grid(), steps)
    with pytest.raises(InputError, match=f"steps = {steps} must be 1 or more"):
        karras_grid(schedule, schedule.grid(), steps)


@pytest.mark.parametrize("rho", [0.0, -7.0, math.inf, math.nan])
def test_rho_errors(rho: float) -> None:
    with pytest.raises(InputError, match="rho = "):
        KarrasGrid(rho)
    with pytest.raises(InputError, match="rho = "):
        karras_grid(LinearChain(10), LinearChain(10).grid(), 5, rho=rho)


def test_a_chain_of_one_state_has_one_step() -> None:
    schedule = BetaChain([0.5])
    with pytest.raises(InputError, match="steps = 2 must be 1 for a chain of one state"):
        logsnr_grid(schedule, schedule.grid(), 2)


@pytest.mark.parametrize("steps", [3, None])
def test_grids_as_objects(steps: int | None) -> None:
    schedule = CosineChain(20)
    chain = schedule.grid()
    pairs = [
        (StridedGrid(), strided_grid(chain, steps)),
        (LogSNRGrid(), logsnr_grid(schedule, chain, steps)),
        (KarrasGrid(), karras_grid(schedule, chain, steps)),
        (KarrasGrid(3.0), karras_grid(schedule, chain, steps, 3.0)),
    ]
    for grid, times in pairs:
        assert torch.equal(grid(schedule, chain, steps), times)
