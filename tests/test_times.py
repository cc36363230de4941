"""How times are drawn: unbiased, equally spaced over all parts of a step, and where the losses are large."""

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import build, equal, state, trainer
from conftest import run_ddpm_pair
from oracles import assert_mean
from recorded_times import RecordedTimes
from torch import Tensor, nn

from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import (
    EquispacedTimes,
    ImportanceTimes,
    NoiseMSE,
    StratifiedTimes,
    TimeDraw,
    TimeSampler,
    UniformTimes,
    WeightedMSE,
)
from ddpm_lightning.objectives.times import steps_of
from ddpm_lightning.ops import BatchGenerator, image_generators


def peak(position: Tensor) -> Tensor:
    """A loss that is 100 times as large on the first twentieth of the axis."""
    return torch.where(position < 0.05, 10.0, 0.1).double()


def taught(loss: Callable[[Tensor], Tensor], bins: int = 20) -> ImportanceTimes:
    """A sampler that has seen ``loss`` in every bin."""
    times = ImportanceTimes(bins, history=4)
    position = (torch.arange(4 * bins, dtype=torch.float64) + 0.5) / (4 * bins)
    times.update(position, loss(position))
    return times


SAMPLERS: dict[str, TimeSampler] = {
    "uniform": UniformTimes(),
    "stratified": StratifiedTimes(),
    "equispaced": EquispacedTimes(),
    "importance, empty": ImportanceTimes(),
    "importance, taught": taught(peak),
}
UNIFORM = [name for name in SAMPLERS if name != "importance, taught"]


def accumulated(batches: int, seed: int = 0) -> list[BatchGenerator]:
    """Those of the batches of one optimiser step, each with a generator of its own beside the step's."""

    def generator(seed: int) -> torch.Generator:
        return torch.Generator().manual_seed(seed)

    return [
        BatchGenerator(
            generator(10_000 + 100 * seed + batch), step_generator=generator(seed), batch=batch, batches=batches
        )
        for batch in range(batches)
    ]


# --- all samplers


@pytest.mark.parametrize("name", SAMPLERS)
def test_draws_are_unbiased(name: str) -> None:
    """E[weight f(position)] is the integral of f; of a discrete chain, the mean over its steps."""
    generator, like = torch.Generator().manual_seed(0), torch.zeros(16, 1, 1, 1)
    draws = [SAMPLERS[name](like, generator) for _ in range(3000)]
    position, weight = torch.stack([d.position for d in draws]), torch.stack([d.weight for d in draws])
    assert position.dtype == weight.dtype == torch.float64 and position.shape == weight.shape == (3000, 16)
    assert float(position.min()) >= 0 and float(position.max()) < 1
    integrals: list[tuple[Callable[[Tensor], Tensor], float]] = [
        (torch.ones_like, 1.0),
        (lambda u: u, 0.5),
        (lambda u: torch.exp(-5 * u), (1 - math.exp(-5)) / 5),
        (lambda u: (u > 0.9).double(), 0.1),
        (lambda u: torch.sin(9 * u), (1 - math.cos(9)) / 9),
        (peak, 0.05 * 10 + 0.95 * 0.1),
        (lambda u: steps_of(TimeDraw(u, u), 7).double() ** 2, sum(i**2 for i in range(1, 8)) / 7),
    ]
    for f, integral in integrals:
        # one figure a batch: the draws of a stratified batch are not independent
        assert_mean((weight * f(position)).mean(1), integral, max_se=0.05 * max(1.0, integral))
        # and each place in the batch by itself
        assert_mean(weight[:, 3] * f(position[:, 3]), integral)


@pytest.mark.parametrize("name", UNIFORM)
@pytest.mark.parametrize(("steps", "batch"), [(1, 3), (7, 3), (10, 16), (7, 7)])
def test_each_time_is_uniform(name: str, steps: int, batch: int) -> None:
    """Every image's own step is uniform over 1..T, ends included, whatever its place in the batch."""
    generator, like = torch.Generator().manual_seed(0), torch.zeros(batch, 1, 1, 1)
    draws = torch.stack([steps_of(SAMPLERS[name](like, generator), steps) for _ in range(3000)])
    assert draws.dtype == torch.int64 and draws.shape == (3000, batch)
    assert set(draws.flatten().tolist()) == set(range(1, steps + 1))
    for place in {0, batch // 2, batch - 1}:
        for i in range(1, steps + 1):
            assert_mean((draws[:, place] == i).double(), 1 / steps, max_se=0.01)


@pytest.mark.parametrize("name", SAMPLERS)
def test_as_many_positions_as_images(name: str) -> None:
    """Trap 23: never one more through rounding, never sorted, with one generator, one an image or those of a step."""
    for count in (1, 2, 3, 10, 49, 100):
        for generators in (torch.Generator().manual_seed(1), image_generators(0, range(count)), *accumulated(3)):
            draw = SAMPLERS[name](torch.zeros(count, 1, 1, 1), generators)
            assert draw.position.shape == draw.weight.shape == (count,)
            assert count < 10 or draw.position.tolist() != sorted(draw.position.tolist())


def test_steps_of_the_ends() -> None:
    ends = torch.tensor([0.0, 0.25, math.nextafter(0.25, 0), math.nextafter(1.0, 0)], dtype=torch.float64)
    draw = TimeDraw(ends, torch.ones(4))
    assert steps_of(draw, 4).tolist() == [1, 2, 1, 4]
    assert steps_of(draw, 1).tolist() == [1] * 4
    # 0.99... * 3 rounds up to 3 here
    assert all(int(steps_of(draw, T).max()) == T for T in range(1, 2000))


# --- uniform and stratified


@pytest.mark.parametrize(("steps", "batch"), [(10, 10), (10, 20), (100, 5), (7, 3)])
def test_stratified_times_cover_the_chain(steps: int, batch: int) -> None:
    generator, like = torch.Generator().manual_seed(0), torch.zeros(batch, 1, 1, 1)
    orders = set()
    for _ in range(50):
        draws = steps_of(StratifiedTimes()(like, generator), steps).tolist()
        for k, i in enumerate(sorted(draws)):
            # the k-th smallest lies in the k-th of B equal parts of (0, T]
            assert math.floor(k * steps / batch) + 1 <= i <= math.ceil((k + 1) * steps / batch)
        if steps % batch == 0 or batch % steps == 0:
            parts = Counter((i - 1) * batch // steps if batch < steps else i for i in draws)
            assert set(parts.values()) == {max(1, batch // steps)}
        orders.add(tuple(draws))
    assert len(orders) > 25


def test_uniform_times_are_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    like = torch.zeros(2, 1, 1, 1)
    draws = torch.stack([steps_of(UniformTimes()(like, generator), 5) for _ in range(5000)]).double()
    assert_mean((draws[:, 0] - 3) * (draws[:, 1] - 3), 0.0, max_se=0.05)


# --- equally spaced


def assert_equispaced(positions: Tensor) -> float:
    """They are {(u_0 + j/N) mod 1}, each once; returns u_0 modulo 1/N."""
    count = len(positions)
    offset = float(positions.min())
    assert 0 <= offset < 1 / count
    expected = offset + torch.arange(count, dtype=torch.float64) / count
    assert torch.allclose(positions.sort().values, expected, rtol=0, atol=1e-12)
    return offset


def test_accumulated_batches_together_are_equally_spaced() -> None:
    """Over six batches: one offset, which is the first number of the step's generator."""
    u0 = float(torch.rand(1, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    positions = []
    for generator in accumulated(6, seed=7):
        part = EquispacedTimes()(torch.zeros(6, 1, 1, 1), generator).position
        # each batch spans the axis, and the order is its own
        assert_equispaced(part)
        positions.append(part)
    expected = sorted((u0 + j / 36) % 1 for j in range(36))
    assert torch.cat(positions).sort().values.tolist() == pytest.approx(expected, abs=1e-12)
    orders = {tuple(part.argsort().tolist()) for part in positions}
    assert len(orders) > 3


def test_processes_and_batches_together_are_equally_spaced() -> None:
    """Three processes, which draw from generators in the same state, and two batches."""
    positions = [
        EquispacedTimes()(torch.zeros(4, 1, 1, 1), replace(generator, part=part, parts=3)).position
        for part in range(3)
        for generator in accumulated(2)
    ]
    assert_equispaced(torch.cat(positions))
    alone = [
        EquispacedTimes()(torch.zeros(4, 1, 1, 1), BatchGenerator(torch.Generator(), part, 3)) for part in range(3)
    ]
    assert_equispaced(torch.cat([draw.position for draw in alone]))


def test_without_accumulation_the_batch_is_the_whole() -> None:
    like = torch.zeros(9, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    offsets = {round(assert_equispaced(EquispacedTimes()(like, generator).position), 9) for _ in range(20)}
    assert len(offsets) == 20
    assert_equispaced(EquispacedTimes()(like, image_generators(0, range(9))).position)


def test_batches_of_different_sizes_are_unbiased() -> None:
    for count, batch in ((5, 0), (3, 1)):
        values = []
        for seed in range(3000):
            draw = EquispacedTimes()(torch.zeros(count, 1, 1, 1), accumulated(2, seed)[batch])
            values.append(torch.exp(-5 * draw.position).mean())
        assert_mean(torch.stack(values), (1 - math.exp(-5)) / 5, max_se=0.005)


# --- importance


def test_uniform_until_every_bin_is_full() -> None:
    times = ImportanceTimes(bins=3, history=2)
    times.update(torch.tensor([0.1, 0.2, 0.3, 0.5, 0.5, 0.9]), torch.tensor([9.0, 8.0, 7.0, 1.0, 1.0, 5.0]))
    assert times.probabilities().tolist() == pytest.approx([1 / 3] * 3)
    assert ImportanceTimes()(torch.zeros(5, 1, 1, 1)).weight.tolist() == pytest.approx([1.0] * 5, rel=1e-12)
    times.update(torch.tensor([0.7]), torch.tensor([3.0]))
    # the first bin has forgotten its 9
    root = [math.sqrt((64 + 49) / 2), 1.0, math.sqrt((25 + 9) / 2)]
    expected = [0.999 * r / sum(root) + 0.001 / 3 for r in root]
    assert times.probabilities().tolist() == pytest.approx(expected, rel=1e-6)


def test_history_is_that_of_a_queue_for_each_bin() -> None:
    """Batches of any size, with more losses in a bin than it remembers, and losses that are not finite."""
    times = ImportanceTimes(bins=4, history=3)
    queues = [deque[float](maxlen=3) for _ in range(4)]
    generator = torch.Generator().manual_seed(0)
    for batch in (1, 2, 30, 7, 5, 64, 3):
        position = torch.rand(batch, generator=generator, dtype=torch.float64)
        loss = torch.rand(batch, generator=generator)
        loss[::6] = math.nan if batch % 2 else math.inf
        times.update(position, loss)
        for u, value in zip(position.tolist(), loss.tolist(), strict=True):
            if math.isfinite(value):
                queues[int(u * 4)].append(value)
        for k, queue in enumerate(queues):
            assert sorted(times.losses[k].tolist()) == sorted([*queue, *[0.0] * (3 - len(queue))])
    assert bool((times.counts >= 3).all())


def test_draws_follow_the_probabilities_and_weights_undo_them() -> None:
    times = taught(peak)
    p = times.probabilities()
    draw = times(torch.zeros(40_000, 1, 1, 1), torch.Generator().manual_seed(0))
    index = (draw.position * 20).long()
    for k in (0, 1, 19):
        assert_mean((index == k).double(), float(p[k]), max_se=0.003)
        inside = draw.position[index == k] * 20 - k
        assert_mean(inside, 0.5)
        assert_mean(inside.square(), 1 / 3)
    assert torch.allclose(draw.weight, 1 / (20 * p[index]))
    assert float(draw.weight.max()) < 1 / times.uniform


def test_importance_lowers_the_variance_of_a_peaked_loss() -> None:
    """By the closed form sum_k L_k^2 / (bins^2 p_k) - mean^2, and by a measurable factor."""
    variances = {}
    for name in ("uniform", "importance, taught"):
        draw = SAMPLERS[name](torch.zeros(40_000, 1, 1, 1), torch.Generator().manual_seed(3))
        variances[name] = float((draw.weight * peak(draw.position)).var())
    mean = 0.05 * 10 + 0.95 * 0.1
    p = taught(peak).probabilities()
    levels = peak((torch.arange(20) + 0.5) / 20)
    assert variances["uniform"] == pytest.approx(0.05 * 100 + 0.95 * 0.01 - mean**2, rel=0.1)
    exact = float((levels.square() / (400 * p)).sum()) - mean**2
    assert variances["importance, taught"] == pytest.approx(exact, rel=0.1, abs=1e-6)
    assert variances["importance, taught"] < variances["uniform"] / 1000


def test_losses_of_zero_are_no_division_by_zero() -> None:
    assert taught(torch.zeros_like).probabilities().tolist() == pytest.approx([1 / 20] * 20)
    assert float(taught(lambda u: (u > 0.95).double()).probabilities()[0]) == pytest.approx(0.001 / 20)


def test_history_survives_a_state_dict() -> None:
    objective, again = (WeightedMSE(times) for times in (taught(peak), ImportanceTimes(20, history=4)))
    again.load_state_dict(objective.state_dict())
    like = torch.zeros(64, 1, 1, 1)
    first, second = (o.times(like, torch.Generator().manual_seed(0)) for o in (objective, again))
    assert torch.equal(first.position, second.position) and torch.equal(first.weight, second.weight)
    for times in (objective.times, again.times):
        times.update(first.position, peak(first.position))
    assert equal(state(objective), state(again))


def test_nothing_waits_for_the_device() -> None:
    """On the meta device whatever needs a value on the host raises."""
    times = ImportanceTimes(bins=4).to("meta")
    like = torch.zeros(6, 1, 1, 1, device="meta")
    for sampler in (times, UniformTimes(), StratifiedTimes(), EquispacedTimes()):
        draw = sampler(like)
        assert draw.position.device.type == draw.weight.device.type == "meta"
        steps_of(draw, 7)
    times.update(draw.position, torch.zeros(6, device="meta"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"bins": 0}, "bins = 0 must be 1 or more"),
        ({"history": 0}, "history = 0 must be 1 or more"),
        ({"uniform": 0.0}, r"uniform = 0 must lie in \(0, 1\]"),
        ({"uniform": 1.5}, r"uniform = 1\.5 must lie in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=f"^{words}$"):
        ImportanceTimes(**options)


# --- in training


class OneNumber(nn.Module):
    """The smallest network that trains."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.gain * x


def optimiser_steps(folder: Path, epochs: int, batches: int, accumulated: int) -> list[list[dict]]:
    """The recorded draws of each optimiser step; an epoch's last step has what batches are left."""
    records = [(int(path.name[:3]), torch.load(path)) for path in sorted(folder.glob("*.pt"))]
    assert {call for call, _ in records} == set(range(epochs * batches))
    steps: dict[tuple[int, int], list[dict]] = {}
    for call, record in records:
        epoch, batch = divmod(call, batches)
        steps.setdefault((epoch, batch // accumulated), []).append(record)
    return list(steps.values())


def assert_steps_share_their_offset(steps: list[list[dict]], parts: int, processes: int = 1) -> None:
    offsets = set()
    for step in steps:
        assert [record["parts"] for record in step] == [parts] * len(step)
        batches: dict[int, list[Tensor]] = {}
        for record in step:
            batches.setdefault(record["part"], []).append(record["position"])
        assert set(batches) == set(range(len(step) // processes))
        assert all(len(batch) == processes for batch in batches.values())
        # each batch, that of all processes, covers the axis by itself
        for batch in batches.values():
            assert_equispaced(torch.cat(batch))
        if len(batches) == parts:  # not the last, shorter one of an epoch
            positions = torch.cat([record["position"] for record in step])
            offsets.add(round(assert_equispaced(positions) * len(positions), 6))
    assert len(offsets) == sum(len(step) == parts * processes for step in steps)


def test_accumulated_batches_share_their_offset(tmp_path: Path) -> None:
    module = build(network=OneNumber(), objective=NoiseMSE(RecordedTimes(str(tmp_path))))
    options = {"max_epochs": 2, "accumulate_grad_batches": 3, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer(tmp_path, **options).fit(module, Digits(batch_size=64))
    steps = optimiser_steps(tmp_path, epochs=2, batches=20, accumulated=3)
    assert [len(step) for step in steps] == [3, 3, 3, 3, 3, 3, 2] * 2
    assert_steps_share_their_offset(steps, 3)


@pytest.mark.cli
def test_processes_and_accumulated_batches_share_their_offset(tiny: list[str], tmp_path: Path) -> None:
    draws = tmp_path / "draws"
    draws.mkdir()
    run_ddpm_pair(
        "fit", *tiny, f"--run_dir={tmp_path}/run", "--trainer.accelerator=cpu", "--trainer.strategy=ddp",
        "--trainer.devices=2", "--trainer.accumulate_grad_batches=3", "--trainer.max_epochs=1",
        "--trainer.limit_val_batches=0", "--trainer.callbacks=[]", "--trainer.enable_checkpointing=false",
        "--model.objective.init_args.times=recorded_times.RecordedTimes",
        f"--model.objective.init_args.times.init_args.folder={draws}",
    )  # fmt: skip
    steps = optimiser_steps(draws, epochs=1, batches=10, accumulated=3)
    assert [len(step) for step in steps] == [6, 6, 6, 2] and len(steps[0][0]["position"]) == 64
    assert_steps_share_their_offset(steps, 3, processes=2)


def test_resumed_importance_sampling_ends_where_the_uninterrupted_one_does(tmp_path: Path) -> None:
    options = {"limit_val_batches": 0, "enable_checkpointing": False}

    def module() -> nn.Module:
        objective = NoiseMSE(ImportanceTimes(bins=5, history=3))
        return build(network=OneNumber(), objective=objective, optimizer=partial(torch.optim.SGD, lr=0.1))

    straight, first, second = module(), module(), module()
    trainer(tmp_path, max_epochs=4, **options).fit(straight, Digits())
    runner = trainer(tmp_path, max_epochs=2, **options)
    runner.fit(first, Digits())
    runner.save_checkpoint(tmp_path / "half.ckpt")
    trainer(tmp_path, max_epochs=4, **options).fit(second, Digits(), ckpt_path=tmp_path / "half.ckpt")
    assert equal(state(straight), state(second)) and not equal(state(first), state(second))
    assert {"objective.times.losses", "objective.times.counts"} <= state(second).keys()
    assert int(second.objective.times.counts.sum()) == 4 * 10 * 128
    assert float(second.objective.times.probabilities().max()) > 0.21
