"""Chains against the definitions of the lecture, written out with plain floats."""

import copy
import math
import pickle
import re

import pytest
import torch
from oracles import ScalarGaussianWorld, linear_betas
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.schedules import BetaChain, CosineChain, LinearChain, Schedule, chain_grid, strided_grid


def alpha_bars(betas: list[float]) -> list[float]:
    return ScalarGaussianWorld(0.0, 1.0, betas, "beta").abar


def cosine_betas(T: int) -> list[float]:
    def f(t: float) -> float:
        return math.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - f(t) / f(t - 1), 0.999) for t in range(1, T + 1)]


CHAINS: dict[str, tuple[Schedule, list[float]]] = {
    "linear 1000": (LinearChain(1000), linear_betas(1000, 1e-4, 0.02)),
    "linear 300": (LinearChain(300, 1e-4, 0.02), linear_betas(300, 1e-4, 0.02)),
    "linear 1": (LinearChain(1, 0.3, 0.5), [0.3]),
    "linear 2": (LinearChain(2, 0.3, 0.5), [0.3, 0.5]),
    "linear 49": (LinearChain(49, 0.01, 0.2), linear_betas(49, 0.01, 0.2)),
    "scaled 100": (LinearChain(100, 1e-4, 0.02, reference_T=1000), linear_betas(100, 1e-3, 0.2)),
    "cosine 1000": (CosineChain(1000), cosine_betas(1000)),
    **{f"cosine {T}": (CosineChain(T), cosine_betas(T)) for T in (1, 2, 3, 4, 5, 50)},
    "uneven": (BetaChain([0.5, 1e-5, 0.9, 0.1]), [0.5, 1e-5, 0.9, 0.1]),
}


@pytest.fixture(params=CHAINS)
def chain(request: pytest.FixtureRequest) -> tuple[Schedule, list[float]]:
    return CHAINS[request.param]


def test_alpha_bar_counts_from_one(chain: tuple[Schedule, list[float]]) -> None:
    """Trap 1: the first time above 0 has alpha-bar = 1 - beta_1, and time 0 has alpha-bar = 1."""
    schedule, betas = chain
    grid = chain_grid(schedule.T)
    assert len(betas) == schedule.T
    abar = (2 * schedule.log_alpha(grid)).exp().tolist()
    assert abar == pytest.approx(alpha_bars(betas), rel=1e-11)
    assert abar[0] == 1
    assert abar[1] == pytest.approx(1 - betas[0], rel=1e-14)
    assert (schedule.alpha(grid) ** 2).tolist() == pytest.approx(abar, rel=1e-11)


def test_sigma_and_gamma_follow_from_alpha_bar(chain: tuple[Schedule, list[float]]) -> None:
    schedule, betas = chain
    grid = chain_grid(schedule.T)
    assert (schedule.alpha(grid) ** 2 + schedule.sigma(grid) ** 2).tolist() == pytest.approx(
        [1.0] * len(grid), abs=1e-14
    )
    for t, abar in zip(grid[1:], alpha_bars(betas)[1:], strict=True):
        assert float(schedule.gamma(t)) == pytest.approx(-math.log(abar / (1 - abar)), rel=1e-9, abs=1e-9)
        assert float(schedule.log_sigma2(t)) == pytest.approx(math.log(1 - abar), rel=1e-9, abs=1e-12)


def test_gamma_increases_from_minus_infinity(chain: tuple[Schedule, list[float]]) -> None:
    schedule, _ = chain
    times = torch.linspace(0, 1, 7 * schedule.T + 1, dtype=torch.float64)
    gamma = schedule.gamma(times)
    assert gamma.dtype == torch.float64 and gamma.shape == times.shape
    assert gamma[0] == -torch.inf
    assert bool(gamma[1:].isfinite().all())
    assert bool((gamma.diff() > 0).all())


def test_step_variance_is_beta(chain: tuple[Schedule, list[float]]) -> None:
    schedule, betas = chain
    grid = chain_grid(schedule.T)
    assert schedule.log_step_var(grid[:-1], grid[1:]).exp().tolist() == pytest.approx(betas, rel=1e-9)


def test_posterior_variance_is_beta_tilde(chain: tuple[Schedule, list[float]]) -> None:
    schedule, betas = chain
    grid, abar = chain_grid(schedule.T), alpha_bars(betas)
    expected = [betas[t - 1] * (1 - abar[t - 1]) / (1 - abar[t]) for t in range(1, schedule.T + 1)]
    assert expected[0] == 0
    assert schedule.log_posterior_var(grid[:-1], grid[1:]).exp().tolist() == pytest.approx(expected, rel=1e-9)


def test_everything_is_finite_at_a_clean_image(chain: tuple[Schedule, list[float]]) -> None:
    schedule, betas = chain
    zero, first = chain_grid(schedule.T)[:2]
    assert schedule.alpha(zero) == 1 and schedule.sigma(zero) == 0
    assert schedule.log_step_fraction(zero, first) == 0
    assert float(schedule.log_step_var(zero, first).exp()) == pytest.approx(betas[0], rel=1e-13)


def test_transitions_compose() -> None:
    """q(x_t | x_s) is the marginal over x_u of q(x_t | x_u) q(x_u | x_s), on and off the grid."""
    schedule = LinearChain(100, 0.001, 0.2)
    times: list[tuple[float, float, float]] = [
        (0.0, 0.01, 1.0),
        (0.1, 0.5, 0.9),
        (0.123, 0.1234, 0.777),
        (0, 0.4, 0.41),
    ]
    for s, u, t in (map(torch.tensor, triple) for triple in times):
        s, u, t = s.double(), u.double(), t.double()

        def ratio(a: Tensor, b: Tensor) -> Tensor:
            return (schedule.log_alpha(b) - schedule.log_alpha(a)).exp()

        def var(a: Tensor, b: Tensor) -> Tensor:
            return schedule.log_step_var(a, b).exp()

        torch.testing.assert_close(ratio(s, u) * ratio(u, t), ratio(s, t), rtol=1e-12, atol=0)
        torch.testing.assert_close(ratio(u, t) ** 2 * var(s, u) + var(u, t), var(s, t), rtol=1e-10, atol=0)


def test_cosine_betas_are_clipped_before_alpha_bar() -> None:
    """Trap 9: alpha-bar belongs to the clipped betas, so the two agree at the end of the chain."""
    schedule = CosineChain(20, max_beta=0.5)
    grid = chain_grid(20)
    betas = schedule.log_step_var(grid[:-1], grid[1:]).exp()
    assert betas.max().item() == pytest.approx(0.5, rel=1e-12)
    assert int((betas > 0.4999).sum()) > 1
    abar_T = math.prod(1 - beta for beta in betas.tolist())
    assert float(schedule.alpha(grid[-1]) ** 2) == pytest.approx(abar_T, rel=1e-10)


def test_lecture_chain_still_shows_the_image() -> None:
    """Trap 10: the betas of T = 1000 leave alpha-bar_T = 0.048 at T = 300; reference_T scales them."""
    end = torch.ones((), dtype=torch.float64)
    assert float(LinearChain(300).alpha(end) ** 2) == pytest.approx(0.048, abs=5e-4)
    assert float(LinearChain(1000).alpha(end) ** 2) == pytest.approx(4.04e-5, abs=1e-7)
    for T in (100, 250, 2000):
        scaled = LinearChain(T, reference_T=1000)
        grid = chain_grid(T)
        betas = scaled.log_step_var(grid[:-1], grid[1:]).exp().tolist()
        assert betas == pytest.approx(linear_betas(T, 0.1 / T, 20 / T), rel=1e-9)
        assert float(scaled.alpha(end) ** 2) < 6e-5


def test_extreme_betas_stay_finite() -> None:
    schedule = BetaChain([0.9] * 1000)
    grid = chain_grid(1000)
    gamma = schedule.gamma(grid[1:])
    assert bool(gamma.isfinite().all())
    assert float(gamma[-1]) == pytest.approx(1000 * math.log(10), rel=1e-12)
    assert schedule.log_step_var(grid[:-1], grid[1:]).exp().tolist() == pytest.approx([0.9] * 1000, rel=1e-9)
    tiny = BetaChain([1e-12] * 3)
    assert tiny.log_sigma2(chain_grid(3)[1:]).exp().tolist() == pytest.approx([1e-12, 2e-12, 3e-12], rel=1e-9)


@pytest.mark.parametrize("kind", ["half", "bfloat16", "float", "deepcopy", "state_dict", "pickle"])
def test_float64_survives(kind: str) -> None:
    """Trap 29: precision plugins cast modules; gamma must not notice."""
    t = torch.linspace(0, 1, 37, dtype=torch.float64)
    expected = LinearChain(1000).gamma(t)
    model = nn.Sequential(LinearChain(1000))
    if kind == "half":
        model.half()
    elif kind == "bfloat16":
        model.to(torch.bfloat16)
    elif kind == "float":
        model.float()
    elif kind == "deepcopy":
        model = copy.deepcopy(model).half()
    elif kind == "pickle":
        model = pickle.loads(pickle.dumps(model))
    else:
        other = nn.Sequential(LinearChain(1000))
        other.load_state_dict(model.half().state_dict())
        model = other
    schedule = model[0]
    assert isinstance(schedule, Schedule)
    assert schedule.gamma(t).dtype == torch.float64
    assert torch.equal(schedule.gamma(t), expected)
    assert torch.equal(schedule.gamma(t.float()), LinearChain(1000).gamma(t.float().double()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LinearChain(0), "T = 0 must be 1 or more"),
        (lambda: LinearChain(-3), "T = -3 must be 1 or more"),
        (lambda: CosineChain(0), "T = 0 must be 1 or more"),
        (lambda: LinearChain(10, 1e-4, 1.5), "beta_end = 1.5 must lie strictly between 0 and 1"),
        (lambda: LinearChain(10, 1e-4, 1.0), "beta_end = 1 must lie strictly between 0 and 1"),
        (lambda: LinearChain(10, 0.0, 0.5), "beta_start = 0 must lie strictly between 0 and 1"),
        (lambda: LinearChain(10, -0.1, 0.5), "beta_start = -0.1 must lie strictly between 0 and 1"),
        (lambda: LinearChain(10, math.nan, 0.5), "beta_start = nan must lie strictly between 0 and 1"),
        (
            lambda: LinearChain(10, reference_T=1000),
            "beta_end = 0.02 (times reference_T / T = 100) must lie strictly between 0 and 1",
        ),
        (lambda: CosineChain(10, max_beta=1.0), "max_beta = 1 must lie strictly between 0 and 1"),
        (lambda: CosineChain(10, max_beta=0.0), "max_beta = 0 must lie strictly between 0 and 1"),
        (lambda: BetaChain([]), "a chain needs at least one beta"),
        (lambda: BetaChain([0.1, 1.0]), "every beta must lie strictly between 0 and 1, these span 0.1 to 1"),
        (lambda: BetaChain([0.1, math.nan]), "every beta must lie strictly between 0 and 1, these span nan to nan"),
    ],
)
def test_errors_name_the_argument(make: type, message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        make()


# --- grids


def test_strided_grids_are_subsets_with_both_ends() -> None:
    """Traps 6 and 7: no time that the chain does not have, the last one always visited, none twice."""
    for T in range(1, 41):
        chain = chain_grid(T).tolist()
        assert len(chain) == T + 1 and chain[0] == 0 and chain[-1] == 1
        for steps in range(1, T + 1):
            grid = strided_grid(chain_grid(T), steps)
            assert grid.dtype == torch.float64
            assert len(grid) == steps + 1
            assert grid[0] == 0 and grid[-1] == 1
            assert bool((grid.diff() > 0).all())
            assert set(grid.tolist()) <= set(chain)
            strides = (grid * T).round().long().diff()
            assert int(strides.max() - strides.min()) <= 1
        assert strided_grid(chain_grid(T), None).tolist() == strided_grid(chain_grid(T), T).tolist() == chain


@pytest.mark.parametrize("steps", [0, -1, 11])
def test_strided_grid_errors(steps: int) -> None:
    with pytest.raises(InputError, match=f"steps = {steps} must lie between 1 and the chain's T = 10"):
        strided_grid(chain_grid(10), steps)
