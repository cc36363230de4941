"""What a report says of how its figures came about."""

import math
import re
from pathlib import Path

import pytest
from conftest import ROOT

from ddpm_lightning.evaluation import bound
from ddpm_lightning.evaluation.bound import steps_in_words
from ddpm_lightning.metrics import Score
from ddpm_lightning.objectives import ContinuousElbo, DenoisingElbo, ElboEstimator


@pytest.mark.parametrize(
    ("estimator", "T", "evaluated", "words"),
    [
        (DenoisingElbo(), 300, 299, "all 299"),
        (DenoisingElbo(10), 300, 10, "10 from equal runs"),
        (DenoisingElbo(500), 300, 299, "all 299"),
        (DenoisingElbo(T=50), 50, 49, "all 49 with T = 50"),
        (DenoisingElbo(7, T=50), 50, 7, "7 from equal runs with T = 50"),
        (ContinuousElbo(8), None, 8, "8 times from equal runs, T infinite"),
    ],
)
def test_steps_and_states_of_an_estimator(estimator: ElboEstimator, T: int | None, evaluated: int, words: str) -> None:
    assert estimator.evaluated(300) == (T, evaluated)
    assert steps_in_words(estimator, 300) == words


def test_the_table_gives_code_lengths_and_sets_diagnostics_apart() -> None:
    kinds = {"reconstruction": "log_prob", "diffusion": "cost", "elbo": "log_prob", "other_kl": "diagnostic"}
    values = {"reconstruction": -1.0, "diffusion": 3.0, "elbo": -4.0, "other_kl": 7.0}
    scores = {name: Score(values[name] * math.log(2), math.log(2), "nats", kind) for name, kind in kinds.items()}
    rows = [line.split() for line in bound.bound_table({"own": scores}, dims=10).splitlines()[2:]]
    names = ["reconstruction", "diffusion", "elbo", "(other_kl)"]
    assert [row[1] for row in rows] == names and [float(row[-3]) for row in rows] == [0.1, 0.3, 0.4, 0.7]
    assert all(float(row[-1]) == 0.1 for row in rows)


def test_the_protocol_names_what_the_report_holds() -> None:
    """Every key of the report that the protocol's table names is one that the code writes."""
    source = Path(bound.__file__).read_text()
    table = (ROOT / "docs/evaluation.md").read_text().partition("## What the standard errors")[0]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    names = {key.split(".")[-1] for row in rows for key in re.findall(r"`([\w.]+)`", row)}
    assert len(names) > 15
    for name in names:
        assert f'"{name}"' in source, name
