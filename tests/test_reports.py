"""What a report says of how its figures came about."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from ddpm_lightning.callbacks import reports
from ddpm_lightning.callbacks.reports import _steps_evaluated, _steps_in_words
from ddpm_lightning.objectives import ContinuousElbo, DenoisingElbo, ElboEstimator


@pytest.mark.parametrize(
    ("estimator", "T", "evaluated", "words"),
    [
        (DenoisingElbo(), 300, 299, "all 299"),
        (DenoisingElbo(10), 300, 10, "10"),
        (DenoisingElbo(500), 300, 299, "all 299"),
        (DenoisingElbo(T=50), 50, 49, "all 49 with T = 50"),
        (DenoisingElbo(7, T=50), 50, 7, "7 with T = 50"),
        (ContinuousElbo(8), None, 8, "8 times, T infinite"),
    ],
)
def test_steps_and_states_of_an_estimator(estimator: ElboEstimator, T: int | None, evaluated: int, words: str) -> None:
    assert _steps_evaluated(estimator, 300) == {"T": T, "steps_evaluated": evaluated}
    assert _steps_in_words(estimator, 300) == words


def test_the_protocol_names_what_the_report_holds() -> None:
    """Every key of the report that the protocol's table names is one that the code writes."""
    source = Path(reports.__file__).read_text()
    table = (ROOT / "docs/evaluation.md").read_text().partition("## What the standard errors")[0]
    rows = [line.split("|")[3] for line in table.splitlines() if line.startswith("| ") and "`" in line]
    names = {key.split(".")[-1] for row in rows for key in re.findall(r"`([\w.]+)`", row)}
    assert len(names) > 15
    for name in names:
        assert f'"{name}"' in source, name
