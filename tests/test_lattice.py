"""Lattice systems: exact values, simulators against them, and errors that are as large as they say."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.lattice import (
    Action,
    Chains,
    Estimate,
    FreeFieldAction,
    IsingAction,
    Phi4Action,
    binder_cumulant,
    energy,
    free_field_exact,
    integrated_autocorrelation_time,
    ising_exact,
    jackknife,
    magnetisation,
    mean_action,
    mean_square,
    neighbour_product,
    phi4_ring_exact,
    power_spectrum,
    simulate_free_field,
    simulate_ising,
    simulate_phi4,
    specific_heat,
    susceptibility,
)

CRITICAL = math.log(1 + math.sqrt(2)) / 2
# computed apart from the package: Kaufman's formula, sums over modes, and quadrature with other points
ORACLE: dict[str, list[dict[str, float]]] = json.loads((Path(__file__).parent / "data" / "lattice.json").read_text())
EXACT: dict[str, tuple[Any, tuple[str, ...]]] = {
    "ising": (ising_exact, ("L", "beta")),
    "free_field": (free_field_exact, ("L", "dim", "m2")),
    "ring": (phi4_ring_exact, ("N", "kappa", "lam")),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def agree(found: Estimate, exact: float, errors: float = 4.5) -> None:
    assert 0 < found.se < 0.03 * max(1.0, abs(exact)), found
    assert abs(found.mean - exact) < errors * found.se, f"{found}, exact {exact}"


# exact values


@pytest.mark.parametrize("name", EXACT)
def test_exact_values(name: str) -> None:
    function, arguments = EXACT[name]
    worst: dict[str, float] = {}
    for expected in ORACLE[name]:
        found = function(*(expected[argument] for argument in arguments))
        for key, value in expected.items():
            worst[key] = max(worst.get(key, 0.0), abs(found[key] - value))
    print(name, worst)
    assert len(ORACLE[name]) >= 3 and max(worst.values()) < 1e-10


@pytest.mark.parametrize("L", [2, 3, 4])
@pytest.mark.parametrize("beta", [0.1, CRITICAL, 0.9])
def test_ising_against_the_sum_over_all_states(L: int, beta: float) -> None:
    bits = torch.arange(2 ** (L * L))[:, None] >> torch.arange(L * L) & 1
    action = IsingAction(beta)(2.0 * bits.reshape(-1, 1, L, L) - 1)
    log_z = torch.logsumexp(-action, 0)
    p = torch.exp(-action - log_z)
    mean = (p * action).sum()
    found, N = ising_exact(L, beta), L * L
    assert found["logZ_per_spin"] == pytest.approx(log_z.item() / N, abs=1e-12)
    assert found["energy_per_spin"] == pytest.approx(mean.item() / beta / N, abs=1e-11)
    assert found["specific_heat_per_spin"] == pytest.approx(
        ((p * (action - mean).square()).sum() / N).item(), abs=1e-11
    )
    assert found["entropy_nats_per_spin"] == pytest.approx((-(p * p.log()).sum() / N).item(), abs=1e-11)


def test_ising_of_large_lattices() -> None:
    # Onsager: the energy at the critical point is -sqrt 2, and its correction falls as 1 / L
    corrections = [L * (ising_exact(L, CRITICAL)["energy_per_spin"] + math.sqrt(2)) for L in (64, 256, 1024)]
    assert corrections[0] == pytest.approx(corrections[2], rel=1e-3) and abs(corrections[0]) < 1
    # Catalan's constant G: log Z / N = log(2) / 2 + 2 G / pi
    onsager = math.log(2) / 2 + 2 * 0.915965594177219015 / math.pi
    assert ising_exact(1024, CRITICAL)["logZ_per_spin"] == pytest.approx(onsager, abs=1e-6)
    # two ground states at low temperature, free spins at high
    assert ising_exact(64, 100.0)["entropy_nats_per_spin"] == pytest.approx(math.log(2) / 4096, abs=1e-12)
    assert ising_exact(64, 1e-6)["bits_per_spin"] == pytest.approx(1, abs=1e-11)
    # high-temperature series: log Z / N = log 2 + 2 log cosh b + tanh(b)^4 + ...
    assert ising_exact(32, 0.01)["logZ_per_spin"] == pytest.approx(
        math.log(2) + 2 * math.log(math.cosh(0.01)) + math.tanh(0.01) ** 4, abs=1e-11
    )


@pytest.mark.parametrize("beta", [0.3, CRITICAL, 0.6])
def test_ising_is_smooth_in_beta(beta: float) -> None:
    h, L = 1e-4, 20
    below, here, above = (ising_exact(L, beta + shift) for shift in (-h, 0, h))
    slope = (above["logZ_per_spin"] - below["logZ_per_spin"]) / (2 * h)
    assert here["energy_per_spin"] == pytest.approx(-slope, abs=1e-6)
    curvature = (above["energy_per_spin"] - below["energy_per_spin"]) / (2 * h)
    assert here["specific_heat_per_spin"] == pytest.approx(-(beta**2) * curvature, abs=1e-5)


def test_exact_values_under_inference_mode() -> None:
    with torch.inference_mode():
        assert ising_exact(8, 0.4) == ising_exact(8, 0.4)


@pytest.mark.parametrize(("L", "dim"), [(5, 1), (4, 2), (3, 3)])
def test_free_field_against_its_precision_matrix(L: int, dim: int) -> None:
    m2, N = 0.3, L**dim
    units = torch.eye(N, dtype=torch.float64).reshape(N, 1, *(L,) * dim)
    precision = FreeFieldAction(m2).gradient(units).reshape(N, N)
    covariance = torch.linalg.inv(precision)
    found = free_field_exact(L, dim, m2)
    assert found["logZ"] == pytest.approx(0.5 * torch.logdet(2 * math.pi * covariance).item(), abs=1e-10)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(N, dtype=torch.float64), covariance)
    assert found["entropy_nats_per_site"] == pytest.approx(gaussian.entropy().item() / N, abs=1e-10)
    assert found["variance"] == pytest.approx(covariance[0, 0].item(), abs=1e-12)
    assert found["neighbour_covariance"] == pytest.approx(covariance[0, 1].item(), abs=1e-12)
    # and the action is minus the log density, up to log Z
    phi = normal(6, 1, *(L,) * dim)
    log_density = -FreeFieldAction(m2)(phi) - found["logZ"]
    assert torch.allclose(log_density, gaussian.log_prob(phi.flatten(1)), rtol=0, atol=1e-10)


def test_phi4_without_coupling_is_the_free_field() -> None:
    kappa, N = 0.4, 16
    ring, free = phi4_ring_exact(N, kappa, 0.0), free_field_exact(N, 1, (1 - 2 * kappa) / kappa)
    assert ring["logZ"] == pytest.approx(free["logZ"] - N / 2 * math.log(2 * kappa), abs=1e-10)
    assert ring["phi2"] == pytest.approx(free["variance"] / (2 * kappa), abs=1e-11)
    assert ring["nn"] == pytest.approx(free["neighbour_covariance"] / (2 * kappa), abs=1e-11)
    assert ring["susceptibility"] == pytest.approx(0.5 / (1 - 2 * kappa), abs=1e-10)
    entropy = free["entropy_nats_per_site"] - 0.5 * math.log(2 * kappa)
    assert ring["entropy_nats_per_site"] == pytest.approx(entropy, abs=1e-10)


@pytest.mark.parametrize("N", [2, 3])
@pytest.mark.parametrize(("kappa", "lam"), [(0.3, 0.1), (-0.2, 1.0), (0.5, 10.0)])
def test_phi4_against_integrals(N: int, kappa: float, lam: float) -> None:
    x = torch.linspace(-5, 5, 161, dtype=torch.float64)
    phi = torch.cartesian_prod(*[x] * N)[:, None]
    action = Phi4Action(kappa, lam)(phi)
    log_z = torch.logsumexp(-action, 0)
    p = torch.exp(-action - log_z)
    found = phi4_ring_exact(N, kappa, lam)
    assert found["logZ"] == pytest.approx(log_z.item() + N * math.log((x[1] - x[0]).item()), abs=1e-9)
    for key, values in {
        "phi2": phi[:, 0, 0].square(),
        "phi4": phi[:, 0, 0].pow(4),
        "nn": phi[:, 0, 0] * phi[:, 0, 1],
        "susceptibility": phi[:, 0, 0] * phi[:, 0].sum(1),
        "entropy_nats_per_site": (action + log_z + N * math.log((x[1] - x[0]).item())) / N,
    }.items():
        assert found[key] == pytest.approx((p * values).sum().item(), abs=1e-9), key


@pytest.mark.parametrize(("kappa", "lam"), [(0.3, 0.1), (0.6, 10.0), (-0.4, 0.5), (2.0, 0.022)])
def test_phi4_does_not_depend_on_the_points(kappa: float, lam: float, monkeypatch: pytest.MonkeyPatch) -> None:
    coarse = phi4_ring_exact(9, kappa, lam)
    monkeypatch.setattr("ddpm_lightning.lattice.exact._POINTS", 801)
    monkeypatch.setattr("ddpm_lightning.lattice.exact._NATS", 60.0)
    assert phi4_ring_exact(9, kappa, lam) == pytest.approx(coarse, rel=1e-10, abs=1e-10)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: ising_exact(1, 0.4), "L = 1"),
        (lambda: ising_exact(4, -1.0), "beta = -1"),
        (lambda: ising_exact(4, math.nan), "beta = nan"),
        (lambda: ising_exact(4, 200.0), "beta = 200"),
        (lambda: free_field_exact(4, 0, 1.0), "dim = 0"),
        (lambda: free_field_exact(4, 2, 0.0), "m2 = 0"),
        (lambda: phi4_ring_exact(1, 0.1, 0.1), "N = 1"),
        (lambda: phi4_ring_exact(4, 0.1, -0.1), "lam = -0.1"),
        (lambda: phi4_ring_exact(4, 0.5, 0.0), "kappa = 0.5"),
        (lambda: phi4_ring_exact(4, math.nan, 0.1), "kappa = nan"),
        (lambda: Phi4Action(math.inf, 0.1), "kappa = inf"),
        (lambda: Phi4Action(0.1, 0.0), "lam = 0"),
        (lambda: FreeFieldAction(-1.0), "m2 = -1"),
        (lambda: IsingAction(0.4)(torch.ones(4, 4)), r"phi of shape \[4, 4\]"),
        (lambda: IsingAction(0.4)(torch.ones(4, 1, 4, dtype=torch.int8)), "torch.int8"),
        (lambda: simulate_ising(4, 0.4, 0), "samples = 0"),
        (lambda: simulate_ising(4, 0.4, 1, seed=-1), "seed = -1"),
        (lambda: simulate_phi4(4, 1, 0.1, 0.1, 1, steps=0), "steps = 0"),
        (lambda: simulate_phi4(4, 1, 0.1, 0.1, 1, length=0.0), "length = 0"),
        (lambda: simulate_phi4(8, 2, 0.1, 10.0, 25, updates=2, steps=8), "steps = 8"),
        (lambda: simulate_free_field(4, 1, 0.1, 0), "count = 0"),
        (lambda: energy(torch.ones(6, 1, 2), block=4), "block = 4"),
        (lambda: energy(torch.ones(6, 1, 2), block=6), "block = 6"),
        (lambda: energy(torch.ones(6, 1, 2), torch.ones(5)), "weights"),
        (lambda: energy(torch.ones(6, 1, 2), -torch.ones(6)), "weights"),
        (lambda: energy(torch.ones(3, 1, 2), torch.tensor([0.0, 1.0, 0.0])), "weights"),
        (lambda: integrated_autocorrelation_time(torch.ones(1)), "series"),
    ],
)
def test_arguments_that_make_no_sense_are_named(call: Any, name: str) -> None:
    with pytest.raises(InputError, match=name):
        call()


# actions


@pytest.mark.parametrize("action", [IsingAction(0.4), FreeFieldAction(0.3), Phi4Action(0.27, 0.022)], ids=str)
@pytest.mark.parametrize("space", [(5,), (4, 6), (3, 2, 5)], ids=str)
def test_actions(action: Action, space: tuple[int, ...]) -> None:
    phi = normal(3, 1, *space).requires_grad_()
    found = action(phi)
    assert found.shape == (3,) and found.dtype == torch.float64
    (gradient,) = torch.autograd.grad(found.sum(), phi)
    assert torch.allclose(action.gradient(phi.detach()), gradient, rtol=0, atol=1e-12)
    # site by site
    for row, value in zip(phi.detach()[:, 0], found.tolist(), strict=True):
        total = 0.0
        for site in itertools.product(*map(range, space)):
            x = row[site].item()
            for mu in range(len(space)):
                y = row[tuple((k + (d == mu)) % space[d] for d, k in enumerate(site))].item()
                total += {
                    IsingAction: lambda x=x, y=y: -0.4 * x * y,
                    FreeFieldAction: lambda x=x, y=y: 0.5 * (y - x) ** 2,
                    Phi4Action: lambda x=x, y=y: -2 * 0.27 * x * y,
                }[type(action)]()
            total += {IsingAction: 0.0, FreeFieldAction: 0.15 * x**2, Phi4Action: 0.956 * x**2 + 0.022 * x**4}[
                type(action)
            ]
        assert value == pytest.approx(total, abs=1e-10)


# simulators


@pytest.mark.parametrize(("L", "dim", "m2"), [(64, 1, 0.1), (15, 1, 0.5), (16, 2, 0.25), (8, 3, 0.5), (5, 3, 1.0)])
def test_free_field_samples(L: int, dim: int, m2: float) -> None:
    chains = simulate_free_field(L, dim, m2, 10000, seed=1)
    phi, exact = chains.fields, free_field_exact(L, dim, m2)
    assert phi.shape == (10000, 1, *(L,) * dim) and (chains.chains, chains.block) == (10000, 1)
    agree(mean_square(phi), exact["variance"])
    agree(neighbour_product(phi), exact["neighbour_covariance"])
    agree(susceptibility(phi), 1 / m2)
    agree(mean_action(phi, FreeFieldAction(m2)), 0.5)
    agree(binder_cumulant(phi), 0)
    spectrum = power_spectrum(phi)
    assert int(spectrum.modes.sum()) == L**dim and spectrum.k2[0] == 0 and bool((spectrum.k2.diff() > 1e-6).all())
    deviations = (spectrum.mean * (m2 + spectrum.k2) - 1) / (spectrum.se * (m2 + spectrum.k2))
    assert deviations.abs().max() < 4.5
    # shells of one random field are nearly independent: their deviations are as large as their errors say
    K = len(deviations)
    assert abs(deviations.square().mean().item() - 1) < 4.5 * math.sqrt(2 / K)
    total = (spectrum.mean * spectrum.modes).sum().item() / L**dim
    assert total == pytest.approx(mean_square(phi).mean, rel=1e-6)


@pytest.mark.parametrize("beta", [0.3, CRITICAL, 0.5])
def test_ising_samples(beta: float) -> None:
    L = 16
    chains = simulate_ising(L, beta, 40, chains=100, updates=2, warm_up=50, seed=2)
    phi, exact = chains.fields, ising_exact(L, beta)
    assert phi.shape == (4000, 1, L, L) and bool((phi.abs() == 1).all())
    agree(energy(phi, block=chains.block), exact["energy_per_spin"])
    agree(specific_heat(phi, beta, block=chains.block), exact["specific_heat_per_spin"])
    agree(mean_action(phi, IsingAction(beta), block=chains.block), beta * exact["energy_per_spin"])
    assert 0.5 <= chains.autocorrelation_time.mean < 6


@pytest.mark.parametrize("beta", [0.25, CRITICAL, 0.6])
def test_every_state_of_a_small_ising_lattice_is_as_frequent_as_it_should_be(beta: float) -> None:
    chains = simulate_ising(3, beta, 40, chains=300, updates=4, warm_up=20, seed=3)
    bits = torch.arange(512)[:, None] >> torch.arange(9) & 1
    p = torch.softmax(-IsingAction(beta)(2.0 * bits.reshape(-1, 1, 3, 3) - 1), 0)
    states = ((chains.fields.flatten(1) > 0).long() << torch.arange(9)).sum(1)
    found = torch.bincount(states, minlength=512).double()
    expected = p * len(states)
    rare = expected < 5
    found, expected = (torch.cat([v[~rare], v[rare].sum()[None]]) for v in (found, expected))
    used = expected > 0
    squares = ((found - expected).square() / expected)[used]
    freedom = int(used.sum()) - 1
    # four updates leave a little correlation, which spreads the counts by some percent
    assert squares.sum() < 1.15 * (freedom + 5 * math.sqrt(2 * freedom))
    # |m| and the cumulant against the sums over the states
    m = (2.0 * bits - 1).mean(1).double()
    agree(magnetisation(chains.fields, block=chains.block), (p * m.abs()).sum().item())
    m2, m4 = (p * m**2).sum().item(), (p * m**4).sum().item()
    agree(binder_cumulant(chains.fields, block=chains.block), 1 - m4 / (3 * m2**2))
    agree(susceptibility(chains.fields, block=chains.block), 9 * m2)
    connected = 9 * (m2 - (p * m.abs()).sum().item() ** 2)
    agree(susceptibility(chains.fields, block=chains.block, connected=True), connected)


@pytest.mark.parametrize(("N", "kappa", "lam"), [(16, 0.3, 0.1), (16, 0.4, 0.05), (32, 0.25, 0.022), (15, -0.3, 2.0)])
def test_phi4_samples_on_a_ring(N: int, kappa: float, lam: float) -> None:
    chains = simulate_phi4(N, 1, kappa, lam, 60, chains=400, updates=2, warm_up=50, length=2.0, steps=10, seed=4)
    phi, exact, block = chains.fields, phi4_ring_exact(N, kappa, lam), chains.block
    assert phi.shape == (24000, 1, N) and 0.7 < chains.acceptance < 1
    agree(mean_square(phi, block=block), exact["phi2"])
    agree(mean_square(phi.square(), block=block), exact["phi4"])
    agree(neighbour_product(phi, block=block), exact["nn"])
    agree(susceptibility(phi, block=block), exact["susceptibility"])
    action = exact["entropy_nats_per_site"] - exact["logZ"] / N
    agree(mean_action(phi, Phi4Action(kappa, lam), block=block), action)


@pytest.mark.parametrize(("kappa", "lam"), [(0.135, 0.1), (0.27, 0.022)])
def test_phi4_on_the_smallest_square_is_a_ring(kappa: float, lam: float) -> None:
    # its four sites have two neighbours each, by two bonds
    chains = simulate_phi4(2, 2, kappa, lam, 50, chains=400, updates=2, warm_up=50, length=2.0, steps=10, seed=15)
    phi, exact, block = chains.fields, phi4_ring_exact(4, 2 * kappa, lam), chains.block
    agree(mean_square(phi, block=block), exact["phi2"])
    agree(neighbour_product(phi, block=block), exact["nn"])
    agree(susceptibility(phi, block=block), exact["susceptibility"])


def test_a_coarse_trajectory_is_corrected_by_its_rejections() -> None:
    chains = simulate_phi4(16, 1, 0.3, 0.1, 40, chains=250, updates=2, warm_up=60, length=2.0, steps=3, seed=5)
    assert 0.3 < chains.acceptance < 0.8
    agree(mean_square(chains.fields, block=chains.block), phi4_ring_exact(16, 0.3, 0.1)["phi2"])


def virial(phi: Tensor, kappa: float, lam: float) -> Tensor:
    """phi dS/dphi per site, whose mean is 1 in every dimension."""
    return (phi * Phi4Action(kappa, lam).gradient(phi)).flatten(1).double().mean(1)


@pytest.mark.parametrize(("L", "dim"), [(16, 2), (4, 3)])
def test_phi4_samples_in_more_dimensions(L: int, dim: int) -> None:
    kappa, lam = (0.27, 0.022) if dim == 2 else (0.15, 0.1)
    chains = simulate_phi4(L, dim, kappa, lam, 20, chains=64, updates=3, warm_up=60, seed=6)
    assert chains.fields.shape == (1280, 1, *(L,) * dim) and 0.6 < chains.acceptance < 1
    means = jackknife(lambda m: m[..., 0], virial(chains.fields, kappa, lam)[:, None], block=chains.block)
    agree(means, 1)


def test_a_seed_says_it_all() -> None:
    def drawn(seed: int) -> list[Tensor]:
        chains: list[Chains] = [
            simulate_free_field(4, 2, 1.0, 3, seed=seed),
            simulate_ising(4, 0.4, 2, chains=3, warm_up=2, seed=seed),
            simulate_phi4(4, 2, 0.2, 0.1, 2, chains=3, warm_up=2, seed=seed),
        ]
        return [each.fields for each in chains]

    for one, again, other in zip(drawn(7), drawn(7), drawn(8), strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)


def test_chains_follow_each_other_or_are_interleaved() -> None:
    chains = Chains(torch.arange(6.0).reshape(6, 1, 1), 2, 1, 1.0, Estimate(0.5, 0.0))
    assert chains.block == 3 and chains.interleaved.flatten().tolist() == [0, 3, 1, 4, 2, 5]


# errors


def ar1(a: float, chains: int, T: int, seed: int) -> Tensor:
    noise = normal(chains, T, seed=seed)
    x = torch.empty_like(noise)
    x[:, 0] = noise[:, 0]
    for t in range(1, T):
        x[:, t] = a * x[:, t - 1] + math.sqrt(1 - a * a) * noise[:, t]
    return x


@pytest.mark.parametrize("a", [-0.3, 0.0, 0.5, 0.9])
def test_autocorrelation_time_of_an_autoregressive_process(a: float) -> None:
    exact = (1 + a) / (2 * (1 - a))
    found = integrated_autocorrelation_time(ar1(a, 20, 3000, seed=9))
    assert found.se < 0.1 * exact + 0.01
    assert abs(found.mean - exact) < 4 * found.se + math.exp(-5) * exact
    # one chain is much like twenty that are shorter
    assert integrated_autocorrelation_time(ar1(a, 1, 20000, seed=10)[0]).mean == pytest.approx(exact, rel=0.25)


def test_an_autocorrelation_time_that_cannot_be_known() -> None:
    assert math.isnan(integrated_autocorrelation_time(ar1(0.99, 5, 20, seed=11)).mean)
    assert math.isnan(integrated_autocorrelation_time(torch.ones(30)).mean)


def test_error_of_independent_samples_is_the_usual_one() -> None:
    x = normal(50, 1)
    found = jackknife(lambda m: m[..., 0], x)
    assert found.mean == pytest.approx(x.mean().item()) and found.se == pytest.approx(x.std().item() / math.sqrt(50))
    assert str(Estimate(1.25, 0.03125)) == "1.25 +- 0.031"


def test_errors_of_correlated_samples_are_calibrated() -> None:
    # 400 experiments of 16 chains: the deviation of the mean over the error is Student's t with 15 degrees of freedom
    tau, x = 9.5, ar1(0.9, 400 * 16, 60, seed=12)
    found = [jackknife(lambda m: m[..., 0], part.reshape(-1, 1), block=60) for part in x.split(16)]
    squares = torch.tensor([(each.mean / each.se) ** 2 for each in found])
    freedom = 15.0
    variance = freedom / (freedom - 2)
    kurtosis = 3 + 6 / (freedom - 4)
    assert abs(squares.mean().item() - variance) < 4.5 * variance * math.sqrt((kurtosis - 1) / 400)
    # samples taken for independent ones have an error that is too small by sqrt(2 tau), nearly
    naive = [jackknife(lambda m: m[..., 0], part.reshape(-1, 1)).se for part in x.split(16)]
    assert sum(naive) < sum(each.se for each in found) / math.sqrt(tau)


def test_errors_of_functions_of_means_are_calibrated() -> None:
    x = normal(500, 100, seed=13)
    found = [jackknife(lambda m: m[..., 1] - m[..., 0] ** 2, torch.stack([row, row**2], 1)) for row in x]
    deviations = torch.tensor([(each.mean - 0.99) / each.se for each in found])
    assert abs(deviations.mean().item()) < 0.3  # a quadratic's error is correlated with its value
    assert 0.9 < deviations.std().item() < 1.25


def test_weights_repeat_samples() -> None:
    phi = normal(30, 1, 6)
    counts = torch.arange(30) % 3
    repeated = phi.repeat_interleave(counts, 0)
    spins = phi.sign()
    for observable in (magnetisation, susceptibility, binder_cumulant, mean_square, neighbour_product, energy):
        assert observable(phi, counts).mean == pytest.approx(observable(repeated).mean, rel=1e-12)
        assert observable(phi, 7 * counts).se == pytest.approx(observable(phi, counts).se, rel=1e-12)
    assert specific_heat(spins, 0.4, counts).mean == pytest.approx(
        specific_heat(spins.repeat_interleave(counts, 0), 0.4).mean, rel=1e-12
    )
    assert torch.allclose(power_spectrum(phi, counts).mean, power_spectrum(repeated).mean)


def test_reweighting_leads_from_one_temperature_to_another() -> None:
    # from 0.37 to 0.4 on 8 x 8, by the ratio of the two densities
    chains = simulate_ising(8, 0.37, 30, chains=150, updates=3, warm_up=30, seed=14)
    phi = chains.fields
    log_weights = IsingAction(0.37)(phi) - IsingAction(0.4)(phi)
    weights = torch.exp(log_weights - log_weights.max())
    exact = ising_exact(8, 0.4)
    agree(energy(phi, weights, chains.block), exact["energy_per_spin"])
    agree(specific_heat(phi, 0.4, weights, chains.block), exact["specific_heat_per_spin"])
    assert abs(energy(phi, block=chains.block).mean - exact["energy_per_spin"]) > 0.05


def test_observables_of_known_configurations() -> None:
    up = torch.ones(4, 1, 4, 4)
    up[1::2] *= -1
    found = {f.__name__: f(up) for f in (energy, magnetisation, susceptibility, binder_cumulant, mean_square)}
    assert {name: each.mean for name, each in found.items()} == {
        "energy": -2, "magnetisation": 1, "susceptibility": 16, "binder_cumulant": pytest.approx(2 / 3),
        "mean_square": 1,
    }  # fmt: skip
    assert all(each.se == 0 for each in found.values())
    x = torch.arange(8.0)
    wave = (torch.cos(2 * math.pi * 3 / 8 * x) + torch.zeros(2, 1, 8, 8)).contiguous()
    spectrum = power_spectrum(wave)
    (peak,) = (spectrum.mean > 1e-9).nonzero()
    # the modes (0, 3) and (0, -3) carry it, (3, 0) and (-3, 0) are of the same shell
    assert spectrum.k2[peak].item() == pytest.approx(4 * math.sin(3 * math.pi / 8) ** 2)
    assert (spectrum.mean * spectrum.modes)[peak].item() == pytest.approx(64 / 2)
