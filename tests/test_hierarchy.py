"""Hierarchical VAEs: every term against the joint Gaussian that a linear one is, and diffusion as a special case."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import run_script
from oracles import ScalarGaussianWorld, assert_mean, draw_data, linear_betas, oracle_model
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    ImportanceWeightedElbo,
    TrajectoryElbo,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    CategoricalDecoder,
    ConvLevel,
    DiffusionLevel,
    DiscretizedGaussian,
    ForwardProcess,
    HierarchicalVAE,
    LinearLevel,
    PlainGaussian,
    VectorLevel,
)
from ddpm_lightning.schedules import BetaChain

SIZES = {1: [2, 3], 2: [3, 2, 1], 4: [2, 1, 3, 2, 2]}


def linear_hierarchy(sizes: list[int], seed: int) -> HierarchicalVAE:
    """A linear hierarchy with random weights, float64."""
    levels = [LinearLevel(size) for size in sizes[1:]]
    model = HierarchicalVAE(levels, PlainGaussian(levels=256), sizes[:1]).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


class Joint:
    """The joint Gaussian of (x_0, ..., x_T) under p, and of (x_1, ..., x_T) given x_0 under q, in closed form.

    A state is an affine function of independent noise: x = mean + S eps.
    """

    def __init__(self, model: HierarchicalVAE, x0: Tensor) -> None:
        self.model, self.x0 = model, x0
        sizes = [math.prod(shape) for shape in model.shapes]
        self.ends = [0, *torch.tensor(sizes).cumsum(0).tolist()]
        total = self.ends[-1]
        self.p_mean, self.p_scale = torch.zeros(total).double(), torch.zeros(total, total).double()
        top = self._of(model.T)
        self.p_scale[top, top] = torch.eye(sizes[-1]).double()
        for n in range(model.T, 0, -1):
            self._step(self.p_mean, self.p_scale, n, n - 1, model.levels[n - 1].down, model.levels[n - 1].log_var_down)
        self.q_mean, self.q_scale = torch.zeros(total).double(), torch.zeros(total, total).double()
        self.q_mean[self._of(0)] = x0
        for n in range(1, model.T + 1):
            self._step(self.q_mean, self.q_scale, n - 1, n, model.levels[n - 1].up, model.levels[n - 1].log_var_up)

    def _of(self, n: int) -> slice:
        return slice(self.ends[n], self.ends[n + 1])

    def _step(self, mean: Tensor, scale: Tensor, a: int, b: int, linear: Any, log_var: Any) -> None:
        mean[self._of(b)] = linear.weight @ mean[self._of(a)] + linear.bias
        scale[self._of(b)] = linear.weight @ scale[self._of(a)]
        scale[self._of(b), self._of(b)] += torch.diag((0.5 * log_var).exp())

    def expected_log(self, a: int, b: int, linear: Any, log_var: Any) -> float:
        """E_q log N(x_b; A x_a + b, v)."""
        mean = self.q_mean[self._of(b)] - linear.weight @ self.q_mean[self._of(a)] - linear.bias
        scale = self.q_scale[self._of(b)] - linear.weight @ self.q_scale[self._of(a)]
        square = mean.square() + scale.square().sum(1)
        return float(-0.5 * (square / log_var.exp() + log_var + math.log(2 * math.pi)).sum())

    def log_p(self) -> float:
        of = self._of(0)
        covariance = self.p_scale[of] @ self.p_scale[of].T
        return float(torch.distributions.MultivariateNormal(self.p_mean[of], covariance).log_prob(self.x0))

    def posterior_kl(self) -> float:
        """KL(q(x_1..x_T | x_0) || p(x_1..x_T | x_0))."""
        d = self.ends[1]
        p = self.p_scale @ self.p_scale.T
        gain = p[d:, :d] @ torch.linalg.inv(p[:d, :d])
        posterior = torch.distributions.MultivariateNormal(
            self.p_mean[d:] + gain @ (self.x0 - self.p_mean[:d]), p[d:, d:] - gain @ p[:d, d:]
        )
        q = torch.distributions.MultivariateNormal(self.q_mean[d:], self.q_scale[d:] @ self.q_scale[d:].T)
        return float(torch.distributions.kl_divergence(q, posterior))

    def terms(self) -> dict[str, float]:
        levels, T = self.model.levels, self.model.T
        up = [self.expected_log(n - 1, n, levels[n - 1].up, levels[n - 1].log_var_up) for n in range(1, T + 1)]
        down = [self.expected_log(n, n - 1, levels[n - 1].down, levels[n - 1].log_var_down) for n in range(1, T + 1)]
        top = self._of(T)
        second_moment = self.q_mean[top].square() + self.q_scale[top].square().sum(1)
        prior = float(-0.5 * (second_moment + math.log(2 * math.pi)).sum())
        terms = {
            "reconstruction": down[0],
            "prior_matching": up[-1] - prior,
            "consistency": sum(up[:-1]) - sum(down[1:]),
        }
        return {**terms, "elbo": terms["reconstruction"] - terms["prior_matching"] - terms["consistency"]}


@pytest.mark.parametrize("T", SIZES)
def test_the_gap_to_log_p_is_the_kl_of_the_posteriors(T: int) -> None:
    """The oracle by itself, two ways."""
    with torch.no_grad():
        joint = Joint(linear_hierarchy(SIZES[T], seed=T), torch.linspace(-1, 1, SIZES[T][0]).double())
        assert joint.log_p() - joint.terms()["elbo"] == pytest.approx(joint.posterior_kl(), rel=1e-9)


@pytest.mark.parametrize("T", SIZES)
@pytest.mark.parametrize("estimator", [ConsistencyElbo(), ConsistencyElbo(closed_entropy=True), TrajectoryElbo()])
def test_terms_of_a_linear_hierarchy_are_exact_in_expectation(T: int, estimator: ElboEstimator) -> None:
    model = linear_hierarchy(SIZES[T], seed=T)
    with torch.no_grad():
        for row, x0 in enumerate(torch.randn(2, SIZES[T][0], generator=torch.Generator().manual_seed(9)).double()):
            expected = Joint(model, x0).terms()
            named = estimator(model, x0.expand(60_000, -1), torch.Generator().manual_seed(row)).named()
            assert set(named) >= set(expected) or isinstance(estimator, TrajectoryElbo)
            for name in set(expected) & set(named):
                assert_mean(named[name], expected[name], max_se=0.05)


@pytest.mark.parametrize("T", SIZES)
def test_the_plain_vae_has_no_consistency_term(T: int) -> None:
    named = ConsistencyElbo()(linear_hierarchy(SIZES[T], seed=T), torch.zeros(5, SIZES[T][0]).double()).named()
    assert (named["consistency"] == 0).all() == (T == 1)


@torch.no_grad()
def exact_encoder(model: HierarchicalVAE) -> torch.distributions.Normal:
    """Give a hierarchy of scalar states its exact posterior, a Gaussian of the encoder's form; returns p(x_0)."""
    mean, var = torch.zeros(1).double(), torch.ones(1).double()
    for level in reversed(model.levels):
        a, b, v = level.down.weight[0], level.down.bias, level.log_var_down.exp()
        below_mean, below_var = a * mean + b, a**2 * var + v
        gain = a * var / below_var
        level.up.weight.copy_(gain[None])
        level.up.bias.copy_(mean - gain * below_mean)
        level.log_var_up.copy_((var - gain * a * var).log())
        mean, var = below_mean, below_var
    return torch.distributions.Normal(mean, var.sqrt())


def test_with_the_exact_posterior_every_path_gives_log_p() -> None:
    model = linear_hierarchy([1, 1, 1, 1], seed=3)
    p = exact_encoder(model)
    with torch.no_grad():
        x0 = torch.linspace(-2, 2, 50).double()[:, None]
        log_p = p.log_prob(x0)[:, 0]
        torch.testing.assert_close(TrajectoryElbo()(model, x0).total, log_p, rtol=1e-10, atol=1e-10)
        assert_mean(ConsistencyElbo()(model, x0[:1].expand(20_000, 1)).total, float(log_p[0]))
        terms = ImportanceWeightedElbo(5)(model, x0).named()
        torch.testing.assert_close(terms["elbo"], log_p, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(terms["log_effective_paths"], torch.full_like(log_p, math.log(5)))


# --- importance weights


@torch.no_grad()
def test_the_importance_weighted_bound_rises_to_log_p() -> None:
    """Encoders wider than the posteriors and off their centres, so the weights have a variance."""
    model = linear_hierarchy([1, 1, 1, 1], seed=3)
    p = exact_encoder(model)
    for level in model.levels:
        level.log_var_up.add_(0.4)
        level.up.bias.add_(0.3 * (0.5 * level.log_var_up).exp())
    x0 = torch.full((4000, 1), 0.7).double()
    log_p = float(p.log_prob(x0[0]))
    ks = (1, 2, 5, 30)
    draws = {k: ImportanceWeightedElbo(k)(model, x0, torch.Generator().manual_seed(k)).total for k in ks}
    # E log w in closed form, and E w = p(x_0) for every K
    assert_mean(draws[1], Joint(model, x0[0]).terms()["elbo"], max_se=0.02)
    for total in draws.values():
        assert total.dtype == torch.float64
        assert_mean((total - log_p).exp(), 1.0, max_se=0.02)
    gaps = [log_p - float(draws[k].mean()) for k in ks]
    errors = [float(draws[k].std()) / math.sqrt(len(x0)) for k in ks]
    for before, after, se in zip(gaps, gaps[1:], errors, strict=False):
        assert before - after > 5 * se, gaps
    # the gap is var(w) / (2 K p^2) to first order in 1/K (Burda et al. 2016; Domke & Sheldon 2018, 1808.09034)
    variance = float((draws[1] - log_p).exp().var())
    assert gaps[-1] == pytest.approx(variance / (2 * ks[-1]), rel=0.2, abs=4 * errors[-1])
    assert gaps[-1] < 0.1 * gaps[0]


@pytest.mark.parametrize("T", SIZES)
def test_one_path_is_the_trajectory_form(T: int) -> None:
    model = linear_hierarchy(SIZES[T], seed=T)
    x0 = torch.randn(7, SIZES[T][0], generator=torch.Generator().manual_seed(0)).double()
    ours = ImportanceWeightedElbo(1)(model, x0, image_generators(0, range(7)))
    theirs = TrajectoryElbo()(model, x0, image_generators(0, range(7)))
    assert torch.equal(ours.total, theirs.total) and torch.equal(ours.reconstruction, theirs.reconstruction)
    assert ours.named()["log_effective_paths"].abs().max() < 1e-12


def test_paths_are_independent_draws_and_the_terms_are_their_means() -> None:
    diffusion = oracle_model(WORLD)
    x0 = draw_data(WORLD, (6, 1, 4, 4), torch.Generator().manual_seed(0))
    generators = image_generators(1, range(6))
    paths = [TrajectoryElbo(T=4)(diffusion, x0, generators) for _ in range(3)]
    estimator = ImportanceWeightedElbo(3, T=4)
    terms = estimator(diffusion, x0, image_generators(1, range(6)))
    totals = torch.stack([path.total for path in paths])
    assert float(totals.std(0).min()) > 0.1
    expected = totals.max(0).values + (totals - totals.max(0).values).exp().mean(0).log()
    torch.testing.assert_close(terms.total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.reconstruction, torch.stack([path.reconstruction for path in paths]).mean(0))
    assert set(terms.named()) == set(estimator.term_kinds) and (terms.costs["jensen_gap"] < 0).all()
    assert (estimator.name, estimator.evaluated(6)) == ("iwae_3", (4, 3))
    # an image's bound does not depend on its batch
    one = estimator(diffusion, x0[2:3], image_generators(1, [2]))
    torch.testing.assert_close(one.total, terms.total[2:3], rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_weights_far_beyond_floating_point_are_averaged() -> None:
    model = HierarchicalVAE([LinearLevel(2)], PlainGaussian(levels=256), (2,)).double()
    x0 = torch.tensor([[1e4, 1e4]]).double()
    total = ImportanceWeightedElbo(4)(model, x0, torch.Generator().manual_seed(0)).total
    assert total.isfinite().all() and float(total) < -1e6


@pytest.mark.parametrize("decoder", [DiscretizedGaussian(16), CategoricalDecoder(16), PlainGaussian(16)])
@pytest.mark.parametrize("estimator", [ConsistencyElbo(), TrajectoryElbo(), ImportanceWeightedElbo(3)])
def test_the_decoders_of_a_diffusion_model_stand_at_the_bottom(decoder: Any, estimator: ElboEstimator) -> None:
    model = HierarchicalVAE([LinearLevel(5), LinearLevel(3)], decoder, (1, 2, 4))
    assert model.shapes == [(1, 2, 4), (5,), (3,)]
    x0 = (torch.randint(0, 16, (7, 1, 2, 4)) * (2 / 15) - 1).float()
    terms = estimator(model, x0, image_generators(0, range(7)))
    assert terms.total.shape == (7,) and terms.total.isfinite().all()
    images = model.sample(x0, torch.Generator().manual_seed(0))
    assert images.shape == x0.shape
    if not decoder.is_density:
        assert terms.total.max() < 0
        level = (images + 1) * 7.5
        torch.testing.assert_close(level, level.round(), rtol=0, atol=1e-4)


def test_gradients_reach_every_weight() -> None:
    model = linear_hierarchy([2, 3, 2], seed=0)
    ConsistencyElbo()(model, torch.randn(4, 2).double()).total.sum().neg().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


WORLD = ScalarGaussianWorld(0.3, 0.25, linear_betas(6, 0.05, 0.4), "beta")


@pytest.mark.parametrize("estimator", [ConsistencyElbo(), ConsistencyElbo(closed_entropy=True), TrajectoryElbo()])
def test_a_diffusion_model_is_a_hierarchy(estimator: ElboEstimator) -> None:
    """Fixed encoders and one network for all levels: each term is the diffusion model's to the bit."""
    diffusion = oracle_model(WORLD)
    hierarchy = HierarchicalVAE([DiffusionLevel(diffusion, n) for n in range(1, 7)], diffusion.decoder, (1, 4, 4))
    x0 = draw_data(WORLD, (64, 1, 4, 4), torch.Generator().manual_seed(0))
    ours = estimator(diffusion, x0, image_generators(1, range(64)))
    theirs = estimator(hierarchy, x0, image_generators(1, range(64)))
    assert ours.named().keys() == theirs.named().keys()
    for name, value in ours.named().items():
        assert torch.equal(value, theirs.named()[name]), name
    assert torch.equal(ours.step_costs, theirs.step_costs)


@pytest.mark.parametrize("level", [VectorLevel(16, carry=0.8, fixed_encoder=True), ConvLevel(1, 8, 1, 1, 0.8, True)])
def test_a_fixed_encoder_is_a_step_of_a_diffusion_process(level: VectorLevel | ConvLevel) -> None:
    """q(x_n | x_{n-1}) is that of a chain with 1 - beta = 0.8^2, and only the decoder is trained."""
    shape = (16,) if isinstance(level, VectorLevel) else (1, 4, 4)
    model = HierarchicalVAE([level], PlainGaussian(256), shape)
    process = ForwardProcess(BetaChain([1 - 0.8**2, 0.5]))
    x0 = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = model.encoder_step(1, x0, x0), process.transition(x0, torch.tensor(0.0), torch.tensor(0.5))
    torch.testing.assert_close(ours.mean, theirs.mean)
    torch.testing.assert_close(ours.log_prob(x0), theirs.log_prob(x0), rtol=1e-6, atol=0)
    assert {name.split(".")[2] for name, _ in model.named_parameters()} == {"down"}


@pytest.mark.parametrize("steps", [None, 2])
def test_the_entropy_in_closed_form_is_the_same_number_in_expectation(steps: int | None) -> None:
    x0 = draw_data(WORLD, (4000, 1, 4, 4), torch.Generator().manual_seed(0))
    drawn, closed = (
        ConsistencyElbo(steps, closed_entropy=closed)(oracle_model(WORLD), x0, image_generators(0, range(4000)))
        for closed in (False, True)
    )
    assert_mean((drawn.total - closed.total) / 16, 0.0, max_se=0.02)
    if steps is None:
        # along one path log q and log p share most of their noise, which the closed form leaves to log p alone
        assert closed.total.std() > 1.5 * drawn.total.std()


REFUSED: dict[str, tuple[Any, str]] = {
    "T = 0": (lambda: HierarchicalVAE([], PlainGaussian(256), (2,)), "hierarchy = [] must hold one level at least"),
    "samples": (lambda: ImportanceWeightedElbo(0), "samples = 0 must be 1 or more"),
    "size": (lambda: LinearLevel(0), "size = 0 must be 1 or more"),
    "denoising": (lambda: DenoisingElbo()(linear_hierarchy([2, 2], 0), torch.zeros(1, 2)), "the denoising form needs"),
    "continuous": (
        lambda: ContinuousElbo()(linear_hierarchy([2, 2], 0), torch.zeros(1, 2)),
        "the continuous form needs",
    ),
    "T": (lambda: ConsistencyElbo(T=5)(linear_hierarchy([2, 2], 0), torch.zeros(1, 2)), "leave T out"),
    "steps": (
        lambda: ConsistencyElbo(steps=1)(linear_hierarchy([2, 2, 2, 2], 0), torch.zeros(1, 2).double()),
        "evaluate all steps",
    ),
    "fixed encoder": (
        lambda: HierarchicalVAE([VectorLevel(3, fixed_encoder=True)], PlainGaussian(256), (2,)),
        "level 1, VectorLevel: fixed_encoder = true needs a state of the same shape as the one below",
    ),
    "n": (lambda: DiffusionLevel(oracle_model(WORLD), 7), "n = 7 must lie in 1..6"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_sentence(case: str) -> None:
    make, sentence = REFUSED[case]
    with pytest.raises(InputError) as refused:
        make()
    assert sentence in str(refused.value)


def case_of(model: HierarchicalVAE, x: Tensor) -> dict[str, Any]:
    """The model as a case of ``check_bound.py``."""

    def side(linear: Any, log_var: Any) -> dict[str, Any]:
        return {"A": linear.weight.tolist(), "b": linear.bias.tolist(), "var": log_var.exp().tolist()}

    return {
        "kind": "linear_hierarchy",
        "x": x.tolist(),
        "encoder": [side(level.up, level.log_var_up) for level in model.levels],
        "decoder": [side(level.down, level.log_var_down) for level in model.levels],
        "exact": [Joint(model, row).terms() for row in x],
    }


@torch.no_grad()
def test_check_bound_evaluates_hierarchies(tmp_path: Path) -> None:
    x = torch.tensor([[0.3, -0.4], [1.0, 0.2]]).double()
    case = case_of(linear_hierarchy([2, 1, 2], seed=5), x)
    exact = json.loads(json.dumps(case["exact"]))
    case["exact"][1]["consistency"] += 0.5
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case]))
    done = run_script("check_bound.py", "--cases", str(path), "--max_se", "0.04")
    assert done.returncode == 1
    assert "x[1].consistency_form.consistency" in done.stderr and "x[0]" not in done.stderr
    terms = json.loads(done.stdout)[0]["terms"]
    assert [set(each) for each in terms] == [{"consistency_form", "trajectory_form"}] * 2
    for each, known in zip(terms, exact, strict=True):
        assert set(each["consistency_form"]) == set(known)
        assert abs(each["trajectory_form"]["elbo"]["mean"] - known["elbo"]) <= 4 * each["trajectory_form"]["elbo"]["se"]


BAD_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "kind": ({"kind": "linear"}, "kind is 'linear'"),
    "lengths": ({"decoder": []}, "lists of one length"),
    "no levels": ({"decoder": [], "encoder": []}, "hierarchy = [] must hold"),
    "chain": ({"x": [[1.0, 2.0, 3.0]]}, "A must be finite numbers of shape [1, 3]"),
    "ragged": ({"x": [[1.0], [2.0, 3.0]]}, "x must be finite numbers"),
    "exact": ({"exact": [{}]}, "exact must be a list with an object for each of the 2"),
    "text": ({"exact": [{"elbo": "a"}, {}]}, "consistency_form.elbo is 'a'"),
}


@torch.no_grad()
@pytest.mark.parametrize("bad", BAD_CASES)
def test_check_bound_names_bad_hierarchies(tmp_path: Path, bad: str) -> None:
    changes, sentence = BAD_CASES[bad]
    good = case_of(linear_hierarchy([2, 1, 2], seed=5), torch.zeros(2, 2).double())
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([good | changes]))
    done = run_script("check_bound.py", "--cases", str(path))
    assert done.returncode == 2 and sentence in done.stderr and "Traceback" not in done.stderr
