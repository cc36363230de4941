"""Which steps an estimator of the bound evaluates: unbiased for any profile of costs, and less noisy for a true one."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import OLD_RUN, build, equal, state, trainer
from oracles import (
    ScalarGaussianWorld,
    assert_mean,
    denoising_term,
    draw_data,
    linear_betas,
    oracle_model,
)
from torch import Tensor
from worlds_continuous import DIMS, ENDS, continuous_terms, data, model_of

from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.bound import steps_in_words
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    CostProfile,
    DenoisingElbo,
    ElboEstimator,
    EqualRuns,
    SpreadSteps,
    StepDraw,
    TrajectoryElbo,
    steps,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.runs import Run
from ddpm_lightning.schedules import LinearGamma
from ddpm_lightning.training import DiffusionModule

FORMS: list[type[ElboEstimator]] = [TrajectoryElbo, ConsistencyElbo, DenoisingElbo]
STEEP = ScalarGaussianWorld(0.3, 0.25, linear_betas(200, 1e-4, 0.1), "beta")
DIM_OF_WORLD = 16


def taught(cost: Callable[[Tensor], Tensor], points: int = 32, count: int = 500, uniform: float = 0.1) -> CostProfile:
    """A profile that was told what each step of a chain costs."""
    profile = CostProfile(points, uniform)
    index = SpreadSteps().draw(count, points, torch.zeros(1, 1)).index[:, 0]
    profile.measure(count, index, cost((index - 0.5) / count)[None])
    return profile


PROFILES = {
    "steep": taught(lambda u: 1 / (u + 1e-3)),
    "rising": taught(lambda u: u**3 + 1e-6),
    "mostly nothing": taught(lambda u: (u > 0.6).double()),
    "two points": taught(lambda u: 3 - 2 * u, points=2),
    "hardly uniform": taught(lambda u: torch.exp(-20 * u), uniform=1e-3),
}


def measured(estimator: ElboEstimator, world: ScalarGaussianWorld = STEEP) -> ElboEstimator:
    """The estimator with its steps drawn by what they cost on images of the world."""
    generator, profile = torch.Generator().manual_seed(5), CostProfile()
    with torch.no_grad():
        estimator.measure(profile, oracle_model(world), draw_data(world, (64, 1, 4, 4), generator), generator)
    return estimator.choosing(profile)


# --- the draw


def every_outcome(
    profile: CostProfile, count: int, K: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[StepDraw, Tensor, Tensor]:
    """A draw for each outcome that the K uniform numbers can have, each with its probability: ``[K, B]`` both, and the
    probabilities of the steps."""
    p = profile.probabilities(count)
    edges = torch.cat([p.cumsum(0)[:-1], torch.arange(K + 1, dtype=torch.float64) / K]).unique()
    middles, lengths = (edges[1:] + edges[:-1]) / 2 * K, edges.diff() * K
    part = middles.long()
    size = int(part.bincount().max())
    uniforms, chances = torch.zeros(2, K, size, dtype=torch.float64)
    for k in range(K):
        own = part == k
        uniforms[k, : int(own.sum())], chances[k, : int(own.sum())] = middles[own] - k, lengths[own]
    given: Iterator[Tensor] = iter(uniforms)
    monkeypatch.setattr(steps, "rand", lambda like, generators: next(given))
    return profile.draw(count, K, torch.zeros(size, 1)), chances, p


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize(("count", "K"), [(19, 3), (8, 7), (299, 10), (5, 1), (1500, 20)])
def test_weights_undo_the_probabilities_exactly(name: str, count: int, K: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Summed over all outcomes, each step is taken once: E[sum_k w_k f(n_k)] = sum_n f(n) for every f."""
    draw, chance, p = every_outcome(PROFILES[name], count, K, monkeypatch)
    assert chance.sum(1).tolist() == pytest.approx([1.0] * K, abs=1e-9)
    taken = torch.zeros(count + 1, dtype=torch.float64).index_add_(
        0, draw.index.flatten(), (chance * draw.weight).flatten()
    )
    assert taken[1:].tolist() == pytest.approx([1.0] * count, rel=1e-9)
    assert float(draw.weight.max()) <= (1 + 1e-9) * count / (K * PROFILES[name].uniform)
    assert float(p.sum()) == pytest.approx(1, abs=1e-12) and float(p.min()) > 0


def test_draws_are_one_in_each_part_of_the_cumulative_probabilities() -> None:
    profile = PROFILES["steep"]
    draw = profile.draw(299, 10, torch.zeros(2000, 1), torch.Generator().manual_seed(0))
    assert draw.within is not None and draw.index.shape == draw.weight.shape == draw.within.shape == (10, 2000)
    upper = profile.probabilities(299).cumsum(0)
    p = torch.take(profile.probabilities(299), draw.index - 1)
    place = torch.take(upper, draw.index - 1) - (1 - draw.within) * p
    assert torch.equal((place * 10 + 1e-9).long(), torch.arange(10)[:, None].expand(10, 2000))
    assert torch.allclose(draw.weight, 1 / (10 * p))
    assert bool((draw.index.diff(dim=0) >= 0).all())
    # where a step is many parts long, the place within it is known in part; where it is short, not at all
    assert_mean(draw.within[draw.index > 100], 0.5, max_se=0.02)


def test_what_was_measured_on_one_chain_serves_another() -> None:
    """p_n follows the cost at the step's position, and the uniform share is all there is where it costs nothing."""
    profile = taught(lambda u: torch.exp(-4 * u), points=64, count=1000)
    for count in (10, 100, 1000, 3000):
        u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        expected = 0.9 * torch.exp(-4 * u) / torch.exp(-4 * u).sum() + 0.1 / count
        torch.testing.assert_close(profile.probabilities(count), expected, rtol=0.02, atol=0)
    assert float(PROFILES["mostly nothing"].probabilities(100)[0]) == pytest.approx(0.1 / 100)


def test_draws_of_an_image_do_not_depend_on_the_batch() -> None:
    profile = PROFILES["steep"]
    whole = profile.draw(299, 4, torch.zeros(5, 1), image_generators(0, range(5)))
    part = profile.draw(299, 4, torch.zeros(2, 1), image_generators(0, [3, 0]))
    assert torch.equal(part.index, whole.index[:, [3, 0]]) and torch.equal(part.weight, whole.weight[:, [3, 0]])
    assert len(set(map(tuple, whole.index.T.tolist()))) > 1


def test_all_steps_are_taken_once_whatever_they_cost() -> None:
    for K in (None, 8, 50):
        draw = PROFILES["steep"].draw(8, K, torch.zeros(3, 1))
        assert draw.index.tolist() == [[n] * 3 for n in range(1, 9)] and draw.weight.tolist() == [1.0] * 8


def test_steps_spread_over_the_chain_have_its_ends() -> None:
    for count, points in itertools.product((2, 31, 32, 33, 299, 3999), (2, 32)):
        index = SpreadSteps().draw(count, points, torch.zeros(1, 1)).index[:, 0]
        assert index[0] == 1 and index[-1] == count and len(index) <= points and bool((index.diff() > 0).all())


def test_costs_that_tell_nothing_are_not_taken_up() -> None:
    profile, index = CostProfile(4), torch.tensor([1, 4, 9])
    for costs in (torch.zeros(2, 3), torch.tensor([[1.0, torch.nan, 2.0]]), torch.tensor([[1.0, torch.inf, 2.0]])):
        profile.measure(9, index, costs)
        assert not profile.is_measured
    profile.measure(9, index, torch.tensor([[3.0, 0.0, 1.0], [4.0, 0.0, 1.0]]))
    assert profile.is_measured
    assert profile.cost.tolist() == pytest.approx([1.0, 0.0, 12.5**-0.5, 12.5**-0.5])
    assert profile.position.tolist() == pytest.approx([0.5 / 9, 3.5 / 9, 8.5 / 9, 8.5 / 9])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"points": 1}, "points = 1 must be 2 or more"),
        ({"uniform": 0.0}, r"uniform = 0 must lie in \(0, 1\]"),
        ({"uniform": 1.5}, r"uniform = 1\.5 must lie in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        CostProfile(**options)


# --- the bound


def test_typical_costs_are_the_exact_ones() -> None:
    """In the Gaussian world, where the cost of a step at the optimal denoiser has a closed form."""
    choice = measured(DenoisingElbo(5)).choice
    assert isinstance(choice, CostProfile)
    exact = torch.tensor([denoising_term(STEEP, n) for n in range(1, 200)], dtype=torch.float64)
    # step 2 lies between two that are measured, on a curve that falls steeply
    torch.testing.assert_close(choice.probabilities(199), 0.9 * exact / exact.sum() + 0.1 / 199, rtol=0.3, atol=0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("K", [1, 4])
def test_terms_are_those_of_all_steps(form: type[ElboEstimator], K: int) -> None:
    world = ScalarGaussianWorld(0.3, 0.25, linear_betas(40, 1e-3, 0.2), "posterior")
    generator, model = torch.Generator().manual_seed(2), oracle_model(world)
    x0 = draw_data(world, (1500, 1, 4, 4), generator)
    found = measured(form(K), world)(model, x0, generator).named()
    full = form()(model, x0, generator).named()
    terms = world.terms()
    exact = terms["reconstruction"] - terms["denoising_form"]["elbo"]
    cost = (found["reconstruction"] - found["elbo"]) / DIM_OF_WORLD
    assert_mean(cost, exact, max_se=0.6 * exact)
    for name, values in found.items():
        assert_mean((values - full[name]) / DIM_OF_WORLD, 0.0)


@pytest.mark.parametrize("profile", [PROFILES["steep"], PROFILES["rising"]])
def test_the_continuous_bound_is_exact(profile: CostProfile) -> None:
    generator = torch.Generator().manual_seed(2)
    estimator = ContinuousElbo(3).choosing(profile)
    with torch.inference_mode():
        terms = estimator(model_of(LinearGamma(*ENDS, T=9)), data(8000, generator), generator)
    for name, value in continuous_terms(*ENDS).items():
        assert_mean(terms.named()[name] / DIMS, value, max_se=0.06)
    edges, share = estimator.steps_at(model_of(LinearGamma(*ENDS, T=9)))
    assert len(edges) == 1001 and share == 1 / 1000 and int(terms.step_indices.max()) <= 1000


def test_noise_at_a_fixed_image_is_lower() -> None:
    """Where few steps carry the sum, by orders of magnitude."""
    model, x0 = oracle_model(STEEP), draw_data(STEEP, (1, 1, 4, 4), torch.Generator().manual_seed(1))

    def variance(estimator: ElboEstimator) -> float:
        terms = estimator(model, x0.expand(4000, -1, -1, -1), torch.Generator().manual_seed(3))
        return float((terms.total - terms.reconstruction).var())

    assert variance(measured(DenoisingElbo(5))) * 50 < variance(DenoisingElbo(5))


def test_words_for_a_report() -> None:
    choice = PROFILES["steep"]
    assert steps_in_words(DenoisingElbo(10).choosing(choice), 300) == "10 by typical cost"
    assert steps_in_words(DenoisingElbo(7, T=50).choosing(choice), 300) == "7 by typical cost with T = 50"
    assert steps_in_words(ContinuousElbo(8).choosing(choice), 300) == "8 times by typical cost, T infinite"
    assert steps_in_words(DenoisingElbo().choosing(choice), 300) == "all 299"


# --- in a run


def part_of_the_steps(**changes: object) -> DiffusionModule:
    return build(validation_bounds=[DenoisingElbo(3)], test_bounds=[DenoisingElbo(2), ContinuousElbo(2)], **changes)


def test_validation_measures_and_the_checkpoint_keeps_it(tmp_path: Path) -> None:
    module, runner = part_of_the_steps(), trainer(tmp_path, enable_checkpointing=False)
    estimators = module.bounds["test"]
    assert [module.drawing(each) for each in estimators] == estimators
    runner.fit(module, Digits(limit_val=8))
    assert all(isinstance(module.drawing(each).choice, CostProfile) for each in estimators)
    runner.save_checkpoint(tmp_path / "a.ckpt")
    runner.test(module, Digits(limit_test=40), verbose=False)
    again = DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
    trainer(tmp_path).test(again, Digits(limit_test=40), verbose=False)
    assert module.bound_scores["test"] == again.bound_scores["test"]
    again.profiles = part_of_the_steps().profiles
    trainer(tmp_path).test(again, Digits(limit_test=40), verbose=False)
    assert module.bound_scores["test"] != again.bound_scores["test"]


def test_measuring_leaves_training_alone_and_a_resumed_run_measures_the_same(tmp_path: Path) -> None:
    options = {"enable_checkpointing": False}
    straight, first, second, unmeasured = (part_of_the_steps() for _ in range(4))
    trainer(tmp_path, max_epochs=2, **options).fit(straight, Digits(limit_val=8))
    runner = trainer(tmp_path, **options)
    runner.fit(first, Digits(limit_val=8))
    runner.save_checkpoint(tmp_path / "half.ckpt")
    # two batches are evaluated before training goes on, and measure nothing
    resumed = trainer(tmp_path, max_epochs=2, num_sanity_val_steps=2, **options)
    resumed.fit(second, Digits(limit_val=8), ckpt_path=tmp_path / "half.ckpt")
    assert equal(state(straight), state(second))
    assert not torch.equal(state(first)["profiles.denoising.cost"], state(second)["profiles.denoising.cost"])
    trainer(tmp_path, max_epochs=2, limit_val_batches=0, **options).fit(unmeasured, Digits())
    assert not unmeasured.profiles["denoising"].is_measured
    assert equal(state(straight.model), state(unmeasured.model))


def test_an_old_checkpoint_draws_from_equal_runs(tmp_path: Path) -> None:
    run = Run(shutil.copytree(OLD_RUN, tmp_path / "run"))
    module, data = run.load()
    batch = data.split("test").batch(torch.arange(6))
    estimator = DenoisingElbo(3)
    assert isinstance(module.drawing(estimator).choice, EqualRuns)
    plain = estimator(
        module.ema_model, module.scale.to_model(batch.image), image_generators(module.eval_seed, range(6))
    )
    assert torch.equal(module.bound(estimator, batch)["elbo"], plain.total)


def test_a_checkpoint_of_other_forms_loads(tmp_path: Path) -> None:
    module, runner = part_of_the_steps(), trainer(tmp_path, enable_checkpointing=False)
    runner.fit(module, Digits(limit_val=8))
    runner.save_checkpoint(tmp_path / "a.ckpt")
    other = DiffusionModule.load_from_checkpoint(
        tmp_path / "a.ckpt", validation_bounds=[ConsistencyElbo(2)], test_bounds=[DenoisingElbo(4)]
    )
    assert other.profiles.keys() == {"consistency", "denoising"}
    assert not other.profiles["consistency"].is_measured
    assert equal(state(other.profiles["denoising"]), state(module.profiles["denoising"]))
