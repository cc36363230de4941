"""The bound in its three forms, term by term, against a world in which every term is known exactly."""

import importlib.util
import json
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from conftest import run_script
from oracles import (
    ScalarGaussianWorld,
    assert_mean,
    denoising_term,
    draw_data,
    linear_betas,
    marginal_moments,
    oracle_model,
)
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ConsistencyElbo, DenoisingElbo, ElboEstimator, ElboTerms, TrajectoryElbo
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedSmallVariance,
    GammaConditioning,
)
from ddpm_lightning.schedules import CosineChain

FORMS: list[type[ElboEstimator]] = [TrajectoryElbo, ConsistencyElbo, DenoisingElbo]
DIMS = 16
SCRIPT = Path(__file__).parents[1] / "scripts" / "check_bound.py"

CHAINS = {1: [0.3], 2: [0.2, 0.5], 10: linear_betas(10, 0.02, 0.4), 100: linear_betas(100, 1e-3, 0.1)}
DATA = {"wide": (0.3, 0.25), "narrow": (-0.7, 0.02), "standard": (0.0, 1.0)}
WORLDS = {
    f"T={T}, {variance}, {data}": ScalarGaussianWorld(*DATA[data], CHAINS[T], variance)
    for T in CHAINS
    for variance in ("beta", "posterior")
    for data in DATA
    if (T, variance) != (1, "posterior") and not (T == 100 and data == "standard")
}
TWENTY = ScalarGaussianWorld(0.3, 0.25, linear_betas(20, 0.01, 0.3), "beta")


@cache
def estimate(name: str, form: type[ElboEstimator]) -> dict[str, Tensor]:
    """Nats a dimension, ``[B]`` each; every form with noise of its own."""
    world = WORLDS[name]
    generator = torch.Generator().manual_seed(1 + FORMS.index(form))
    x0 = draw_data(world, (1500, 1, 4, 4), generator)
    return {term: values / DIMS for term, values in form()(oracle_model(world), x0, generator).named().items()}


def exact(world: ScalarGaussianWorld) -> dict[type[ElboEstimator], dict[str, float]]:
    terms = world.terms()
    reconstruction, elbo = terms["reconstruction"], terms["denoising_form"]["elbo"]
    return {
        TrajectoryElbo: {"reconstruction": reconstruction, "path_log_ratio": reconstruction - elbo, "elbo": elbo},
        ConsistencyElbo: {"reconstruction": reconstruction, **terms["consistency_form"]},
        DenoisingElbo: {"reconstruction": reconstruction, **terms["denoising_form"]},
    }


def run_lengths(count: int, steps: int) -> list[int]:
    """Lengths of ``steps`` nearly equal runs of ``count`` indices."""
    edges = [i * count // steps for i in range(steps + 1)]
    return [high - low for low, high in pairwise(edges)]


# --- the oracle itself


def test_oracle_has_the_published_values() -> None:
    """N(0.3, 0.25), T = 1000, 1e-4..0.02: bound -0.7269, log p -0.7258, the literal KL's bound -983.1."""
    world = ScalarGaussianWorld(0.3, 0.25, linear_betas(1000, 1e-4, 0.02), "beta")
    terms = world.terms()
    form = terms["consistency_form"]
    assert form["elbo"] == pytest.approx(-0.7269, abs=5e-5)
    assert world.log_p() == pytest.approx(-0.7258, abs=5e-5)
    literal = terms["reconstruction"] - form["prior_matching"] - form["consistency_literal_kl"]
    assert literal == pytest.approx(-983.1, abs=0.05)


@pytest.mark.parametrize("name", WORLDS)
def test_oracle_is_consistent(name: str) -> None:
    world = WORLDS[name]
    terms = world.terms()
    elbo = terms["denoising_form"]["elbo"]
    assert terms["consistency_form"]["elbo"] == pytest.approx(elbo, abs=1e-10)
    assert elbo <= world.log_p() + 1e-12
    summed = sum(denoising_term(world, n) for n in range(1, world.T))
    assert summed == pytest.approx(terms["denoising_form"]["denoising_matching"], abs=1e-12)


# --- every term of every form


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", WORLDS)
def test_terms_are_exact_in_expectation(name: str, form: type[ElboEstimator]) -> None:
    expected, values = exact(WORLDS[name])[form], estimate(name, form)
    assert set(values) == set(expected) == set(form.term_kinds)
    for term, value in expected.items():
        assert values[term].dtype == torch.float64
        assert_mean(values[term], value, max_se=0.015 * max(1.0, abs(value)))


@pytest.mark.parametrize("name", WORLDS)
def test_three_forms_have_one_total(name: str) -> None:
    world = WORLDS[name]
    totals = [estimate(name, form)["elbo"] for form in FORMS]
    for a, b in [(0, 1), (0, 2), (1, 2)]:
        assert_mean(totals[a] - totals[b], 0.0, max_se=0.025)
    for total in totals:
        se = float(total.std()) / math.sqrt(len(total))
        assert float(total.mean()) <= world.log_p() + 4 * se


@pytest.mark.parametrize("name", [name for name in WORLDS if "T=1," not in name])
def test_literal_kl_is_another_number(name: str) -> None:
    """Trap 13: about a nat for each step is lost, and the difference is not noise."""
    world, values = WORLDS[name], estimate(name, ConsistencyElbo)
    gap = values["consistency_literal_kl"] - values["consistency"]
    form = world.terms()["consistency_form"]
    assert_mean(gap, form["consistency_literal_kl"] - form["consistency"])
    assert float(gap.mean()) > 10 * float(gap.std()) / math.sqrt(len(gap))
    if world.T == 100:
        assert float(gap.mean()) > 0.8 * (world.T - 1)
    # and it stays out of the bound
    total = values["reconstruction"] - values["prior_matching"] - values["consistency"]
    torch.testing.assert_close(values["elbo"], total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_batch_equal_to_width(form: type[ElboEstimator]) -> None:
    """[32, 1, 32, 32]: coefficients [B] must not meet the width, with shared times and with times of each image."""
    expected = exact(TWENTY)[form]
    for steps in (None, 3):
        generator = torch.Generator().manual_seed(0)
        model = oracle_model(TWENTY)
        values: dict[str, list[Tensor]] = {name: [] for name in expected}
        for _ in range(2 if steps is None else 38):
            named = form(steps)(model, draw_data(TWENTY, (32, 1, 32, 32), generator), generator).named()
            for name in expected:
                values[name].append(named[name] / 1024)
        for name, value in expected.items():
            bound = 0.02 if steps is None else 0.05
            assert_mean(torch.cat(values[name]), value, max_se=bound * max(1.0, abs(value)))


def test_each_denoising_step_is_exact() -> None:
    world = WORLDS["T=10, beta, wide"]
    generator = torch.Generator().manual_seed(0)
    terms = DenoisingElbo()(oracle_model(world), draw_data(world, (2000, 1, 4, 4), generator), generator)
    assert terms.step_indices.tolist() == [list(range(1, 10))] * 2000
    for k, n in enumerate(range(1, 10)):
        assert_mean(terms.step_costs[:, k] / DIMS, denoising_term(world, n), max_se=0.01)


# --- some of the steps


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("T", "steps"), [(20, 3), (20, 1), (9, 4), (9, 5)])
def test_stratified_steps_are_unbiased(T: int, steps: int, form: type[ElboEstimator]) -> None:
    world = ScalarGaussianWorld(0.3, 0.25, linear_betas(T, 0.01, 0.4), "posterior")
    generator = torch.Generator().manual_seed(2)
    model = oracle_model(world)
    x0 = draw_data(world, (6000, 1, 4, 4), generator)
    terms = form(steps)(model, x0, generator)
    named, full = terms.named(), form()(model, x0, generator).named()
    bound = 0.1 if steps == 1 else 0.05
    for term, value in exact(world)[form].items():
        assert_mean(named[term] / DIMS, value, max_se=bound * max(1.0, abs(value)))
        assert_mean((named[term] - full[term]) / DIMS, 0.0, max_se=bound * max(1.0, abs(value)))
    lengths = run_lengths(T - 1, steps)
    assert terms.step_indices.shape == terms.step_costs.shape == (6000, steps)
    low = 1
    for k, length in enumerate(lengths):
        assert set(terms.step_indices[:, k].tolist()) == set(range(low, low + length))
        low += length


def test_stratified_denoising_steps_match_their_indices() -> None:
    world = WORLDS["T=10, posterior, wide"]
    generator = torch.Generator().manual_seed(0)
    terms = DenoisingElbo(3)(oracle_model(world), draw_data(world, (6000, 1, 4, 4), generator), generator)
    for n in range(1, 10):
        assert_mean(terms.step_costs[terms.step_indices == n] / DIMS, denoising_term(world, n), max_se=0.01)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [None, 19, 20, 1000, 3, 7, 1])
def test_step_costs_add_up(steps: int | None, form: type[ElboEstimator]) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = draw_data(TWENTY, (1000, 1, 4, 4), generator)
    terms = form(steps)(oracle_model(TWENTY), x0, generator)
    every = steps is None or steps >= 19
    count = 19 if steps is None or every else steps
    assert terms.step_costs.shape == terms.step_indices.shape == (1000, count)
    lengths = [1] * 19 if every else run_lengths(19, count)
    assert sum(lengths) == 19
    weighted = (terms.step_costs * torch.tensor(lengths, dtype=torch.float64)).sum(1)
    if every:
        assert terms.step_indices.tolist() == [list(range(1, 20))] * 1000
    if form is TrajectoryElbo:
        # the ends are extra: log q(x_1 | x_0) - log p(x_T)
        ends = (terms.costs["path_log_ratio"] - weighted) / DIMS
        mean, var = marginal_moments(TWENTY, 20)
        expected = 0.5 * (mean**2 + var) - 0.5 * (math.log(TWENTY.betas[0]) + 1)
        assert_mean(ends, expected, max_se=0.01)
    else:
        name = "consistency" if form is ConsistencyElbo else "denoising_matching"
        torch.testing.assert_close(weighted, terms.costs[name], rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_more_steps_than_there_are_is_all_of_them(form: type[ElboEstimator]) -> None:
    def run(steps: int | None) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        return form(steps)(oracle_model(TWENTY), draw_data(TWENTY, (5, 1, 4, 4), generator), generator).named()

    whole = run(None)
    for steps in (19, 20, 500):
        assert all(torch.equal(whole[name], values) for name, values in run(steps).items())
    assert not torch.equal(run(18)["elbo"], whole["elbo"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [0, -2])
def test_no_steps(form: type[ElboEstimator], steps: int) -> None:
    with pytest.raises(InputError, match=f"steps = {steps} must be 1 or more"):
        form(steps)(oracle_model(TWENTY), torch.zeros(2, 1, 4, 4), torch.Generator())


def test_one_path_cancels_most_of_its_noise() -> None:
    """Over one path the log ratios telescope; windows drawn apart keep the noise of each."""
    world = WORLDS["T=100, beta, wide"]
    generator = torch.Generator().manual_seed(0)
    x0 = draw_data(world, (400, 1, 4, 4), generator)
    for form in (TrajectoryElbo, ConsistencyElbo):
        path = form()(oracle_model(world), x0, generator)
        apart = form(98)(oracle_model(world), x0, generator).total
        assert path.total.var() < 0.1 * apart.var()
        # the step costs of one path hardly vary in their sum
        assert path.step_costs.sum(1).var() < 0.5 * path.step_costs.var(0).sum()


# --- any model, not only the optimal one


class Wrong(nn.Module):
    """A bad, nonlinear, elementwise denoiser that looks at its noise level."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return 1.3 * torch.tanh(x) + 0.4 * t.reshape(-1, 1, 1, 1)


def wrong_model(*, clip_x0: bool) -> DiffusionModel:
    return DiffusionModel(
        network=Wrong(),
        schedule=CosineChain(12),
        parameterization=EpsParameterization(),
        conditioning=GammaConditioning(),
        variance=FixedSmallVariance(),
        decoder=DiscretizedGaussian(levels=17),
        clip_x0=clip_x0,
    )


def grey_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.randint(17, (count, 1, 4, 4), generator=generator).double() / 16 - 1


def test_three_forms_agree_for_a_wrong_model() -> None:
    """The forms are one identity in the model: it needs neither the optimum nor linearity nor a density."""
    x0, model = grey_images(8000), wrong_model(clip_x0=True)
    estimators = [TrajectoryElbo(), ConsistencyElbo(), DenoisingElbo(), DenoisingElbo(4), ConsistencyElbo(4)]
    totals = [
        estimator(model, x0, torch.Generator().manual_seed(seed)).total for seed, estimator in enumerate(estimators)
    ]
    scale = abs(float(totals[2].mean()))
    for seed in (0, 1, 3, 4):
        assert_mean(totals[seed] - totals[2], 0.0, max_se=0.02 * scale)


def test_clipping_lowers_each_denoising_term() -> None:
    """For data in the range, clipping x0-hat moves it towards x_0, draw by draw."""
    x0 = grey_images(200)
    clipped, raw = (
        DenoisingElbo()(wrong_model(clip_x0=clip_x0), x0, torch.Generator().manual_seed(0)) for clip_x0 in (True, False)
    )
    assert bool((clipped.step_costs <= raw.step_costs + 1e-9).all())
    assert bool((clipped.step_costs < raw.step_costs - 1e-3).any())


# --- one generator for each image


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("wrong", [False, True])
def test_terms_of_an_image_do_not_depend_on_the_batch(
    form: type[ElboEstimator], steps: int | None, wrong: bool
) -> None:
    images = grey_images(8)
    model = wrong_model(clip_x0=True) if wrong else oracle_model(TWENTY)

    def run(order: list[int]) -> ElboTerms:
        return form(steps)(model, images[order], image_generators(11, order))

    whole = run(list(range(8)))
    for order in ([5, 2, 7], [3], list(range(7, -1, -1))):
        part = run(order)
        for name, values in whole.named().items():
            assert torch.equal(part.named()[name], values[order]), name
        assert torch.equal(part.step_costs, whole.step_costs[order])
        assert torch.equal(part.step_indices, whole.step_indices[order])
    other = form(steps)(model, images, image_generators(12, range(8)))
    assert bool((other.total != whole.total).all())


def test_estimates_follow_the_generator() -> None:
    x0 = grey_images(4)
    for form in FORMS:
        first, again, other = (
            form(2)(wrong_model(clip_x0=True), x0, torch.Generator().manual_seed(seed)).total for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.equal(first, other)


def test_terms_keep_the_images_apart() -> None:
    for form in FORMS:
        terms = form()(wrong_model(clip_x0=True), grey_images(3), torch.Generator().manual_seed(0))
        assert all(values.shape == (3,) for values in terms.named().values())
        assert set(terms.named()) == set(form.term_kinds)
        for kind, names in (("cost", terms.costs), ("diagnostic", terms.diagnostics)):
            assert {name for name in form.term_kinds if form.term_kinds[name] == kind} == set(names)
        assert torch.equal(terms.total, terms.named()["elbo"])


# --- scripts/check_bound.py

INPUTS = {"beta_start": 0.05, "beta_end": 0.4, "data_mean": 0.3, "data_var": 0.25}


def case(T: int, variance: str = "beta", *, known: bool = False, **changes: Any) -> dict[str, Any]:
    inputs = {"T": T, **INPUTS, "reverse_variance": variance, **changes}
    if known:
        world = ScalarGaussianWorld(0.3, 0.25, linear_betas(T, 0.05, 0.4), variance)
        inputs |= world.terms()
        inputs["trajectory_form"] = {"elbo": inputs["denoising_form"]["elbo"]}
    return inputs


def test_check_bound_accepts_right_values(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case(4), case(10, "posterior", known=True)]))
    # as it is called, since it starts processes of its own
    command = [sys.executable, str(SCRIPT), "--cases", str(path), "--max_se", "0.04"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert len(results) == 2
    for result, T, variance in zip(results, (4, 10), ("beta", "posterior"), strict=True):
        assert {name: result[name] for name in (*INPUTS, "T", "reverse_variance")} == case(T, variance)
        world = ScalarGaussianWorld(0.3, 0.25, linear_betas(T, 0.05, 0.4), variance)
        expected = world.terms()
        expected["trajectory_form"] = {"elbo": expected["denoising_form"]["elbo"]}
        assert set(result) == {*INPUTS, "T", "reverse_variance", *expected}
        for form, names in expected.items():
            pairs = names.items() if isinstance(names, dict) else [("", names)]
            assert not isinstance(names, dict) or set(result[form]) == set(names)
            for name, value in pairs:
                figure = result[form][name] if name else result[form]
                assert set(figure) == {"mean", "se"}
                assert 0 < figure["se"] <= 0.04 * max(1.0, abs(figure["mean"]))
                assert abs(figure["mean"] - value) <= 4 * figure["se"]


def test_check_bound_rejects_a_wrong_value(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = case(4, known=True)
    wrong["consistency_form"]["consistency"] += 0.3
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([wrong]))
    monkeypatch.setattr(script, "ProcessPoolExecutor", lambda **_: ThreadPoolExecutor(1))
    assert script.main(cases=path, max_se=0.02) == 1
    captured = capsys.readouterr()
    assert "consistency_form.consistency" in captured.err
    assert "denoising_form" not in captured.err
    assert len(json.loads(captured.out)) == 1


def test_check_bound_exits_with_2_on_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case(4), case(0)]))
    done = run_script("check_bound.py", "--cases", str(path), "--max_se", "0.02")
    assert done.returncode == 2
    assert "T = 0" in done.stderr and "Traceback" not in done.stderr
    assert not done.stdout


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script as a module: it finds bad input before it starts a process."""
    specification = importlib.util.spec_from_file_location("check_bound", SCRIPT)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


BAD_CASES: dict[str, tuple[str | None, list[str]]] = {
    **{
        f"no {missing}": (
            json.dumps([{key: value for key, value in case(4).items() if key != missing}]),
            [f"lacks {missing}"],
        )
        for missing in case(4)
    },
    "T=0": (json.dumps([case(0)]), ["T = 0"]),
    "large beta": (json.dumps([case(4, beta_end=1.5)]), ["beta_end = 1.5"]),
    "small beta": (json.dumps([case(4, beta_start=0.0)]), ["beta_start = 0"]),
    "no spread": (json.dumps([case(4, data_var=0.0)]), ["data_var = 0"]),
    "unknown variance": (json.dumps([case(4, "learned")]), ["reverse_variance", "learned"]),
    "posterior, T=1": (json.dumps([case(1, "posterior")]), ["FixedSmallVariance", "T = 1"]),
    "bad JSON": ("[{", ["cases.json", "JSON"]),
    "no list": (json.dumps(case(4)), ["cases.json", "list of objects"]),
    "no objects": (json.dumps([3]), ["cases.json", "list of objects"]),
    "no file": (None, ["cases.json", "No such file"]),
    "T of text": (json.dumps([case(4) | {"T": "four"}]), ["T", "four"]),
    "T of 4.5": (json.dumps([case(4) | {"T": 4.5}]), ["T", "4.5"]),
    "variance of text": (json.dumps([case(4, data_var="wide")]), ["data_var", "wide"]),
    "mean of null": (json.dumps([case(4, data_mean=None)]), ["data_mean"]),
    "mean of nan": (json.dumps([case(4, data_mean=math.nan)]), ["data_mean"]),
    "infinite variance": (json.dumps([case(4, data_var=math.inf)]), ["data_var"]),
}


@pytest.mark.parametrize("bad", BAD_CASES)
def test_check_bound_names_bad_input(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bad: str,
) -> None:
    text, names = BAD_CASES[bad]
    # a case that slips through must not start processes and run (for a mean of nan it would run for ever)
    monkeypatch.setattr(script, "ProcessPoolExecutor", lambda **_: pytest.fail("bad input was not found"))
    path = tmp_path / "cases.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError) as refused:
        script.main(cases=path)
    for name in names:
        assert name in str(refused.value)
