"""Means over images: each counted once, whatever the batches and the processes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_lightning.metrics import MeanAndError, bits_per_dim


def values(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3 - 1


def metric_of(batches: list[Tensor]) -> MeanAndError:
    metric = MeanAndError()
    for batch in batches:
        metric.update(batch)
    return metric


def gathered(metrics: list[MeanAndError]) -> MeanAndError:
    """One metric with the states that synchronisation gives: one entry for each process."""
    metric = MeanAndError()
    metric.update(torch.zeros(1))
    for name in ("count", "mean", "m2"):
        setattr(metric, name, torch.cat([getattr(part, name) for part in metrics]))
    return metric


def assert_is_that_of(metric: MeanAndError, data: Tensor, *, rel: float = 1e-12) -> None:
    array, figures = data.double().numpy(), metric.compute()
    assert float(figures["count"]) == len(array)
    assert float(figures["mean"]) == pytest.approx(array.mean(), rel=rel)
    assert float(figures["se"]) == pytest.approx(array.std(ddof=1) / math.sqrt(len(array)), rel=rel)
    assert all(figure.dtype == torch.float64 and figure.ndim == 0 for figure in figures.values())


@pytest.mark.parametrize("sizes", [[100], [64, 36], [64, 64, 3], [1] * 20, [1, 99, 7], [2]])
def test_uneven_batches(sizes: list[int]) -> None:
    """Trap 21: not a mean of the means of the batches."""
    data = values(sum(sizes))
    assert_is_that_of(metric_of(list(data.split(sizes))), data)


def test_float32_values_are_added_in_float64() -> None:
    data = values(10_000).float() + 1000
    assert_is_that_of(metric_of(list(data.split(333))), data)


@pytest.mark.parametrize("sizes", [[50, 50], [3, 97], [1, 2, 30, 4], [10, 1]])
def test_processes_of_unequal_size(sizes: list[int]) -> None:
    """Trap 20: the states of several processes merge into those of one."""
    data = values(sum(sizes))
    data += torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)) * 10.0  # processes differ
    assert_is_that_of(gathered([metric_of(list(part.split(7))) for part in data.split(sizes)]), data)


def test_a_process_without_images() -> None:
    data = values(30)
    assert_is_that_of(gathered([MeanAndError(), metric_of([data]), MeanAndError()]), data)


@pytest.mark.parametrize("offset", [1e8, -1e8, 1e12])
def test_large_offsets(offset: float) -> None:
    """A sum of squares would lose everything: 1e8 squared leaves no digit for a spread of 3."""
    spread = torch.randint(-50, 50, (999,), generator=torch.Generator().manual_seed(0)).double()
    data = offset + spread
    expected = float(np.std(spread.numpy(), ddof=1)) / math.sqrt(999)
    for metric in (metric_of(list(data.split(50))), gathered([metric_of([part]) for part in data.split(200)])):
        figures = metric.compute()
        assert float(figures["mean"]) == pytest.approx(offset + float(spread.mean()), rel=1e-15)
        assert float(figures["se"]) == pytest.approx(expected, rel=1e-6 if abs(offset) < 1e10 else 1e-3)


def test_one_value_has_no_standard_error() -> None:
    figures = metric_of([torch.tensor([3.0])]).compute()
    assert float(figures["mean"]) == 3
    assert math.isnan(float(figures["se"]))
    assert float(figures["count"]) == 1


def test_equal_values_have_none_of_it() -> None:
    assert float(metric_of([torch.full((5,), 0.25), torch.full((3,), 0.25)]).compute()["se"]) == 0


def test_reset() -> None:
    metric = metric_of([values(10)])
    metric.reset()
    data = values(12, seed=1)
    metric.update(data)
    assert_is_that_of(metric, data)


def test_calling_the_metric_gives_the_batch_and_keeps_the_rest() -> None:
    data = values(30)
    metric = MeanAndError()
    for batch in data.split(8):
        figures = metric(batch)
        assert float(figures["mean"]) == pytest.approx(float(batch.mean()), rel=1e-12)
    assert_is_that_of(metric, data)


def test_calls_and_updates_mix() -> None:
    """torchmetrics lets one accumulate by a call or by update(); the states after a call must take an update."""
    data = values(30)
    metric = MeanAndError()
    metric(data[:8])
    metric.update(data[8:20])
    metric(data[20:])
    assert_is_that_of(metric, data)


def test_merge_state_then_update() -> None:
    data = values(30)
    metric = metric_of([data[:8]])
    metric.merge_state(metric_of([data[8:20]]))
    assert_is_that_of(metric, data[:20])
    metric.update(data[20:])
    assert_is_that_of(metric, data)


@pytest.mark.parametrize(
    ("nats", "dims", "bits"), [(math.log(256) * 784, 784, 8.0), (-math.log(2), 1, -1.0), (0, 5, 0)]
)
def test_bits_per_dim(nats: float, dims: int, bits: float) -> None:
    assert bits_per_dim(nats, dims) == pytest.approx(bits, rel=1e-14)
