"""What a report says of how its figures came about."""

import pytest

from ddpm_lightning.objectives import ContinuousElbo, DenoisingElbo, ElboEstimator
from ddpm_lightning.training.callbacks.reports import _steps_evaluated, _steps_in_words


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
