"""Weights on the error of eps, against the papers' formulas and against integrals that are known."""

import math
from statistics import NormalDist

import pytest
import torch
from oracles import assert_mean
from worlds_continuous import ENDS, VAR, continuous_terms, data, model_of

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    EDMWeighting,
    ElboWeighting,
    EquispacedTimes,
    MinSNRWeighting,
    P2Weighting,
    StratifiedTimes,
    UniformWeighting,
    WeightedMSE,
    Weighting,
)
from ddpm_lightning.schedules import CosineChain, LinearChain, LinearGamma, Schedule

SCHEDULES = [LinearGamma(-12.0, 8.0), LinearChain(50, 0.003, 0.2), CosineChain(20)]


def quadrature(weighting: Weighting, schedule: Schedule, error: object, cells: int = 200_000) -> float:
    """Integral of weight times error(gamma) over the time axis from the first state to 1, by midpoints."""
    first = float(schedule.grid()[1])
    t = first + (1 - first) * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    return float((weighting(schedule, t) * error(schedule.gamma(t))).mean() * (1 - first))  # type: ignore[operator]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_formulas(schedule: Schedule) -> None:
    times = schedule.grid()[[1, 5, len(schedule.grid()) // 2, -1]]
    for t in times:
        gamma, slope = float(schedule.gamma(t)), float(schedule.gamma_slope(t))
        snr, sigma = math.exp(-gamma), math.exp(gamma / 2)
        density_of_log_sigma = math.exp(-((math.log(sigma) + 0.7) ** 2) / (2 * 1.1**2)) / (1.1 * math.sqrt(2 * math.pi))
        expected = {
            UniformWeighting(): 1.0,
            MinSNRWeighting(): min(snr, 5.0) / snr,
            MinSNRWeighting(0.2): min(snr, 0.2) / snr,
            P2Weighting(): 1 / (1 + snr),
            P2Weighting(k=0.5, power=2.0): 1 / (0.5 + snr) ** 2,
            ElboWeighting(): slope / 2,
            # the loss on x0's error times sigma^2, and d log sigma / dt = gamma' / 2
            EDMWeighting(0.4, -0.7, 1.1): (sigma**2 + 0.4**2)
            / (sigma * 0.4) ** 2
            * sigma**2
            * density_of_log_sigma
            * slope
            / 2,
        }
        for weighting, value in expected.items():
            weight = weighting(schedule, t.expand(3))
            assert weight.dtype == torch.float64 and weight.shape == (3,)
            assert weight.tolist() == pytest.approx([value] * 3, rel=1e-9), weighting


def test_min_snr_is_at_most_one_and_flat_in_the_noise() -> None:
    schedule = LinearGamma(-40.0, 40.0)
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    weight = MinSNRWeighting(5.0)(schedule, t)
    assert float(weight.max()) == 1.0 and bool((weight.diff() >= 0).all())
    noisy = torch.exp(-schedule.gamma(t)) < 5
    assert bool((weight[noisy] == 1).all()) and bool((weight[~noisy] < 1).all())
    assert float(weight[0]) == pytest.approx(5 * math.exp(-40), rel=1e-9)


def test_p2_limits() -> None:
    schedule = LinearGamma(-40.0, 40.0)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert P2Weighting(k=2.0)(schedule, ends).tolist() == pytest.approx([math.exp(-40), 0.5], rel=1e-9)
    assert P2Weighting(power=0.0)(schedule, ends).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_edm_integrates_to_its_own_expectation(schedule: Schedule) -> None:
    """Whatever the schedule: for any error(gamma) of eps, against a sum over EDM's own distribution of log sigma."""
    first, last = (float(schedule.gamma(t)) for t in schedule.grid()[[1, -1]])
    sd, mean, std = 0.4, -1.0, 0.8
    edges = NormalDist(mean, std)
    # equal slices of the probability that the schedule reaches
    low, high = edges.cdf(first / 2), edges.cdf(last / 2)
    count = 20_000
    total = 0.0
    for k in range(count):
        sigma = math.exp(edges.inv_cdf(low + (high - low) * (k + 0.5) / count))
        error_of_x0 = sigma**2 * 0.7 / (0.3 + sigma)
        total += (sigma**2 + sd**2) / (sigma * sd) ** 2 * error_of_x0 * (high - low) / count
    value = quadrature(EDMWeighting(sd, mean, std), schedule, lambda gamma: 0.7 / (0.3 + torch.exp(gamma / 2)))
    assert value == pytest.approx(total, rel=1e-4)


def test_edm_loss_of_gaussian_data_is_one() -> None:
    """With sigma_data the data's own, the optimal denoiser's loss is 1 at every noise level (Karras et al., 5)."""
    generator = torch.Generator().manual_seed(0)
    objective = WeightedMSE(EquispacedTimes(), weighting=EDMWeighting(VAR**0.5), continuous=True)
    model = model_of(LinearGamma(-24.0, 18.0))
    with torch.inference_mode():
        losses = [objective(model, data(500, generator), generator).mean() for _ in range(40)]
    assert_mean(torch.stack(losses), 1.0, max_se=0.01)


@pytest.mark.parametrize("schedule", [LinearGamma(*ENDS, T=9), LinearChain(20, 0.01, 0.3)])
def test_elbo_weighting_gives_the_diffusion_term(schedule: Schedule) -> None:
    """On the chain the span 1 - 1/T of the time axis counts too: without it the value is 5 % off."""
    first, last = (float(schedule.gamma(t)) for t in schedule.grid()[[1, -1]])
    generator = torch.Generator().manual_seed(1)
    objective = WeightedMSE(StratifiedTimes(), weighting=ElboWeighting(), continuous=True)
    with torch.inference_mode():
        losses = [objective(model_of(schedule), data(500, generator), generator).mean() for _ in range(60)]
    expected = continuous_terms(first, last)["diffusion"]
    assert_mean(torch.stack(losses), expected, max_se=0.005 * expected)


def test_times_of_the_axis_of_the_grid_and_of_another_grid() -> None:
    """E |eps - eps-hat|^2 = s / (1 + s), s = VAR exp(-gamma): an average over states, and an elementary integral."""
    first, last = -2.0, 10.0
    schedule = LinearGamma(first, last, T=3)
    on_the_axis = 2 * continuous_terms(first, last)["diffusion"] / (last - first)

    def on_a_grid(T: int) -> float:
        signals = [VAR * math.exp(-(first + (last - first) * i / (T - 1))) for i in range(T)]
        return sum(s / (1 + s) for s in signals) / T

    generator = torch.Generator().manual_seed(2)
    for objective, expected in (
        (WeightedMSE(StratifiedTimes()), on_a_grid(3)),
        (WeightedMSE(StratifiedTimes(), T=5), on_a_grid(5)),
        (WeightedMSE(StratifiedTimes(), continuous=True), on_the_axis),
    ):
        with torch.inference_mode():
            losses = [objective(model_of(schedule), data(300, generator), generator).mean() for _ in range(50)]
        assert_mean(torch.stack(losses), expected, max_se=0.003)
    assert min(abs(on_a_grid(3) - on_a_grid(5)), abs(on_a_grid(5) - on_the_axis)) > 0.05
    with pytest.raises(InputError, match="T = 1 must be 2 or more"):
        WeightedMSE(StratifiedTimes(), T=1)(model_of(schedule), torch.zeros(2, 1, 4, 4))


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (lambda: MinSNRWeighting(0.0), "clip"),
        (lambda: P2Weighting(k=-1.0), "k"),
        (lambda: EDMWeighting(sigma_data=0.0), "sigma_data"),
        (lambda: EDMWeighting(std=math.nan), "std"),
    ],
)
def test_arguments_out_of_range(make: object, option: str) -> None:
    with pytest.raises(InputError, match=f"^{option} = .* must be positive and finite$"):
        make()  # type: ignore[operator]
