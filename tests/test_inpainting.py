"""Inpainting by replacement, against its own exact chain and the exact posterior of Gaussian data."""

from functools import partial

import pytest
import torch
from oracles import assert_covariance
from torch import Tensor
from worlds_cases import CORRELATED, GAMMAS, SCHEDULE, network_model, noise, states_of
from worlds_chain import Chain, chain_of, optimal_model
from worlds_gaussian import _pushed

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import LinearMeasurement, MaskOperator, MMPSDenoiser
from ddpm_lightning.samplers import (
    AncestralSampler,
    DDIMSampler,
    DPMSolverSampler,
    HeunSampler,
    InpaintingFactory,
    MomentMatchingSampler,
    ReplacementSampler,
    Sampler,
)

MASK = torch.tensor([[[True, False], [False, True]]])
KNOWN = torch.tensor([0.9, 7.0, 7.0, -0.8], dtype=torch.float64).reshape(1, 1, 2, 2)
ROWS = MASK.flatten()
HIDDEN = ~ROWS


def replacement_moments(chain: Chain, resamplings: int) -> list[tuple[Tensor, Tensor]]:
    """Mean and covariance of every state of ancestral sampling with the variance beta, exact at any T."""
    ratio, var, _, _, _ = chain.between(1)
    eye, known = CORRELATED.eye, KNOWN.flatten()

    def replaced(moments: tuple[Tensor, Tensor], n: int) -> tuple[Tensor, Tensor]:
        keep = HIDDEN.to(known.dtype)
        mean = torch.where(ROWS, chain.alpha[n] * known, moments[0])
        return mean, moments[1] * keep[:, None] * keep + chain.sigma2[n] * torch.diag(1 - keep)

    moments = [(torch.zeros_like(known), chain.prior_var * eye)]
    for n in range(chain.T - 1, -1, -1):
        state = moments[-1]
        for i in range(resamplings if n > 0 else 1):
            if i > 0:
                state = _pushed(state, ratio[n] * eye, torch.zeros_like(known), var[n])
            added = var[n] if n > 0 else torch.zeros_like(var[n])
            state = replaced(_pushed(state, *CORRELATED.reverse_map(chain, n), added), n)
        moments.append(state)
    return moments


@pytest.mark.parametrize("resamplings", [1, 3])
def test_states_of_replacement(resamplings: int) -> None:
    sampler = ReplacementSampler(AncestralSampler(), KNOWN, MASK, resamplings)
    states = states_of(optimal_model(CORRELATED, SCHEDULE), sampler, 30_000)
    for state, (mean, cov) in zip(states[:-1], replacement_moments(chain_of(GAMMAS), resamplings), strict=False):
        assert_covariance(state, mean, cov)
    mean, cov = replacement_moments(chain_of(GAMMAS), resamplings)[-1]
    assert torch.equal(states[-1][:, ROWS], KNOWN.flatten()[ROWS].expand(30_000, 2))
    assert_covariance(states[-1][:, HIDDEN], mean[HIDDEN], cov[HIDDEN][:, HIDDEN])


def test_resampling_approaches_the_posterior() -> None:
    """Exact moments, no sampling, T = 250: the error of the unknown pixels' mean, in posterior standard deviations, and
    the ratio of their variances. The table of docs/sampling.md."""
    chain = chain_of([-9 + 18 * i / 249 for i in range(250)])
    exact_mean, exact_cov = CORRELATED.posterior(CORRELATED.eye[ROWS], KNOWN.flatten()[ROWS], 0.0)
    exact_variances = exact_cov.diagonal()[HIDDEN]
    expected = {1: (0.757, 1.220), 2: (0.501, 1.125), 5: (0.244, 1.053), 10: (0.130, 1.027), 25: (0.054, 1.011)}
    for resamplings, row in expected.items():
        mean, cov = replacement_moments(chain, resamplings)[-1]
        error = float(((mean - exact_mean)[HIDDEN].abs() / exact_variances.sqrt()).max())
        ratio = float(cov.diagonal()[HIDDEN].sum() / exact_variances.sum())
        assert (error, ratio) == pytest.approx(row, abs=6e-4)


def test_moment_matching_samples_the_posterior_of_its_measurement() -> None:
    """The wrapped sampler under the MMPS denoiser, which is exact here; at the end the known pixels are put in."""
    model = optimal_model(CORRELATED, SCHEDULE)
    operator = MaskOperator(MASK)
    measurement = LinearMeasurement(operator, operator.apply(KNOWN), 0.1)
    guided = model.with_denoiser(partial(MMPSDenoiser, measurement=measurement, iterations=2))
    sampler = MomentMatchingSampler(AncestralSampler(), KNOWN, MASK, iterations=2, noise_var=0.1)
    mine, theirs = states_of(model, sampler, 500), states_of(guided, AncestralSampler(), 500)
    for state, other in zip(mine[:-1], theirs[:-1], strict=True):
        assert torch.equal(state, other)
    assert torch.equal(mine[-1][:, HIDDEN], theirs[-1][:, HIDDEN])
    assert torch.equal(mine[-1][:, ROWS], KNOWN.flatten()[ROWS].expand(500, 2))
    assert not torch.equal(theirs[-1][:, ROWS], mine[-1][:, ROWS])


FACTORIES: list[InpaintingFactory] = [partial(ReplacementSampler, resamplings=2), MomentMatchingSampler]


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), DDIMSampler(0.5)])
def test_an_image_does_not_depend_on_the_batch(sampler: Sampler, factory: InpaintingFactory) -> None:
    model, x_T = network_model(), noise(6, size=4)
    known, masks = 0.5 * noise(6, seed=5, size=4), noise(6, seed=6, size=4) > 0

    def run(order: list[int]) -> Tensor:
        inpainting = factory(sampler, known[order], masks[order])
        with torch.inference_mode():
            return inpainting(model, x_T[order], generators=image_generators(4, order))

    whole = run(list(range(6)))
    assert torch.equal(whole[masks], known[masks])
    for order in ([5, 0, 3], [2], list(range(5, -1, -1))):
        assert torch.equal(run(order), whole[order])


def test_replacement_of_nothing_and_of_everything() -> None:
    model, x_T = network_model(), noise(3)
    nothing, everything = torch.zeros_like(MASK), torch.ones_like(MASK)
    plain = DDIMSampler()(model, x_T)
    assert torch.equal(ReplacementSampler(DDIMSampler(), KNOWN, nothing)(model, x_T), plain)
    assert torch.equal(ReplacementSampler(DDIMSampler(), KNOWN, everything)(model, x_T), KNOWN.expand(3, 1, 2, 2))


def test_replacement_errors() -> None:
    model, x_T = network_model(), noise(3)
    with pytest.raises(InputError, match="resamplings = 0 must be 1 or more"):
        ReplacementSampler(DDIMSampler(), KNOWN, MASK, 0)
    for known in (torch.zeros(2, 1, 2, 2), torch.zeros(1, 1, 2, 3)):
        with pytest.raises(InputError, match="known images of shape"):
            ReplacementSampler(DDIMSampler(), known, MASK)(model, x_T)
    with pytest.raises(InputError, match="mask of shape"):
        ReplacementSampler(DDIMSampler(), KNOWN, torch.ones(1, 3, 2, dtype=torch.bool))(model, x_T)
    for arguments, message in (({"iterations": 0}, "iterations = 0"), ({"noise_var": 0.0}, "noise_var = 0")):
        with pytest.raises(InputError, match=message):
            MomentMatchingSampler(DDIMSampler(), KNOWN, MASK, **arguments)
    with pytest.raises(InputError, match="known images of shape"):
        MomentMatchingSampler(DDIMSampler(), torch.zeros(2, 1, 2, 2), MASK)(model, x_T)


SAMPLERS: list[tuple[Sampler, bool]] = [
    (AncestralSampler(), False),
    (DDIMSampler(), True),
    (DDIMSampler(0.1), False),
    (DPMSolverSampler(), True),
    (DPMSolverSampler(1, sde=True), False),
    (HeunSampler(), True),
    (ReplacementSampler(DDIMSampler(), KNOWN, MASK), False),
    (MomentMatchingSampler(DDIMSampler(), KNOWN, MASK), True),
    (MomentMatchingSampler(AncestralSampler(), KNOWN, MASK), False),
]


@pytest.mark.parametrize(("sampler", "deterministic"), SAMPLERS)
def test_a_deterministic_sampler_draws_nothing(sampler: Sampler, deterministic: bool) -> None:
    model, x_T = network_model(), noise(3)
    walks: list[list[Tensor]] = [[], []]
    for seed, states in enumerate(walks):
        sampler(model, x_T, generators=image_generators(seed, range(3)), callback=lambda x, s, to=states: to.append(x))
    assert torch.equal(*map(torch.stack, walks)) == sampler.is_deterministic == deterministic
