"""The pages of the lecture and the notebook run as they stand, and what they call exact is."""

import ast
import math
import re
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
from conftest import ROOT
from oracles import ScalarGaussianWorld, linear_betas
from scipy.integrate import quad

FOLDER = ROOT / "docs" / "lecture"
PAGES = [*sorted(FOLDER.glob("[0-9]*.md")), ROOT / "docs" / "notebook.md"]
FENCE = "```{code-cell} ipython3"

Namespace = dict[str, Any]


def cells(page: Path) -> Iterator[ast.Module]:
    """The code cells of a MyST notebook; a traceback names the line of the page."""
    text = page.read_text()
    found = list(re.finditer(rf"^{re.escape(FENCE)}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE))
    assert len(found) == text.count("```{code-cell}") > 0, f"{page}: a cell that is not opened by {FENCE} and closed"
    for cell in found:
        yield ast.parse("\n" * text.count("\n", 0, cell.start(1)) + cell[1], str(page))


def run(page: Path) -> Namespace:
    """The names that a page leaves behind. Its cells share one namespace, as in a notebook."""
    namespace: Namespace = {"__name__": "__main__"}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for cell in cells(page):
            exec(compile(cell, str(page), "exec"), namespace)
    assert not [str(each.message) for each in caught if each.filename == str(page)]
    return namespace


def in_four_steps(page: Namespace) -> None:
    world = ScalarGaussianWorld(page["m"], page["v"], linear_betas(4, 0.1, 0.7), "beta")
    terms = world.terms()
    for form in ("consistency", "denoising"):
        exact = {"reconstruction": terms["reconstruction"], **terms[f"{form}_form"]}
        assert page["exact"][form] == pytest.approx({name: exact[name] for name in page["exact"][form]}, abs=5e-6)
    assert page["exact"]["trajectory"]["elbo"] == page["exact"]["denoising"]["elbo"]
    assert page["log_p"] == pytest.approx(world.log_p())


def in_a_thousand_steps(page: Namespace) -> None:
    world = ScalarGaussianWorld(page["m"], page["v"], linear_betas(1000, 1e-4, 0.02), "beta")
    terms = world.terms()
    form = terms["consistency_form"]
    exact = {"consistency": form["consistency"], "literal_kl": form["consistency_literal_kl"]}
    assert page["exact"] == pytest.approx(exact, abs=5e-6)
    assert page["reconstruction"] == pytest.approx(terms["reconstruction"], abs=5e-6)
    assert page["prior_matching"] == pytest.approx(form["prior_matching"], abs=5e-6)
    assert page["bound"] == pytest.approx(form["elbo"], abs=2e-5)


def of_the_noise(page: Namespace) -> None:
    world = ScalarGaussianWorld(page["m"], page["v"], linear_betas(300, 1e-4, 0.02), "posterior")
    assert page["exact"] == pytest.approx(sum(world.eps_mse(t) for t in range(1, 301)) / 300)


def of_the_area(page: Namespace) -> None:
    low, high, v = page["low"], page["high"], page["v"]
    assert page["exact"] == pytest.approx(0.5 * quad(lambda gamma: v / (v + math.exp(gamma)), low, high)[0])
    gammas = [low + (high - low) * i / 11 for i in range(12)]
    abar = [1.0, *(1 / (1 + math.exp(gamma)) for gamma in gammas)]
    betas = [1 - b / a for a, b in pairwise(abar)]
    matching = ScalarGaussianWorld(page["m"], v, betas, "posterior").terms()["denoising_form"]["denoising_matching"]
    assert page["cost_of_chain"](12) == pytest.approx(matching)


EXACT: dict[str, Callable[[Namespace], None]] = {
    "3_bound": in_four_steps,
    "4_consistency": in_a_thousand_steps,
    "5_ddpm": of_the_noise,
    "7_likelihood": of_the_area,
}


@pytest.fixture(autouse=True)
def figures() -> Iterator[None]:
    before = plt.get_backend()
    plt.switch_backend("Agg")
    yield
    plt.close("all")
    plt.switch_backend(before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_page_runs_and_is_right(page: Path) -> None:
    names = run(page)
    assert plt.get_fignums(), "no figure"
    assert any(isinstance(node, ast.Assert) for cell in cells(page) for node in ast.walk(cell)), "nothing is checked"
    if page.stem in EXACT:
        EXACT[page.stem](names)


def test_a_cell_that_raises_fails(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Page\n\n{FENCE}\nx = 1\n```\n\nText.\n\n{FENCE}\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as raised:
        run(page)
    assert raised.traceback[-1].lineno + 1 == 10 and str(raised.traceback[-1].path) == str(page)
    page.write_text(f"# Page\n\n{FENCE}\nx = 1\n```\n\n```{{code-cell}} python\nx = 2\n```\n")
    with pytest.raises(AssertionError, match="not opened by"):
        run(page)


def test_the_path_is_whole() -> None:
    index = (FOLDER / "index.md").read_text()
    toctree = re.search(r"```{toctree}\n(.*?)```", index, flags=re.DOTALL)
    assert toctree is not None
    listed = [line for line in toctree[1].split() if (FOLDER / f"{line}.md").is_file()]
    assert listed == [page.stem for page in PAGES[:-1]] and len(listed) >= 7
    for page in (FOLDER / "index.md", *PAGES):
        links = re.findall(r"\]\(([^)#\s]+\.md)", page.read_text())
        assert links and not [link for link in links if not (page.parent / link).is_file()]
