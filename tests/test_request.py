"""A sampling request: what it resolves to on a module, and that it does so once."""

import math
import textwrap
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import build, conditional
from safetensors.torch import load_file
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import ContinuousNegativeElbo, StratifiedTimes
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import GammaConditioning
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, InpaintingFactory, ReplacementSampler
from ddpm_lightning.sampling import Inpainting, SampleRequest
from ddpm_lightning.schedules import LearnedGamma, LinearChain, LogSNRGrid, Schedule, StridedGrid, TimeGrid
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore:.*infer the batch indices.*", "ignore:.*does not have many workers.*")


class CountedGrid(TimeGrid):
    """LogSNRGrid, which counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, schedule: Schedule, grid: Tensor, steps: int | None) -> Tensor:
        self.calls += 1
        return LogSNRGrid()(schedule, grid, steps)


def test_the_example_of_the_docstring() -> None:
    text = (SampleRequest.__doc__ or "").partition("::\n\n")[2].partition("\n\n")[0]
    names = {"SampleRequest": SampleRequest, "DDIMSampler": DDIMSampler}
    module = build(schedule=LinearChain(T=60, beta_start=0.02, beta_end=0.5))
    exec(textwrap.dedent(text), {**names, "module": module}, names)
    images = names["images"]
    assert isinstance(images, Tensor) and images.shape == (16, 1, 8, 8) and images.dtype == torch.uint8


def test_images_are_what_the_sampler_makes_of_the_draws_of_the_prior() -> None:
    module, request = conditional(label_dropout=0.1), SampleRequest(steps=4, seed=3, labels=[7, 2])
    generators = image_generators(3, [5, 0, 6])
    x_T = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in generators])
    grid = StridedGrid()(module.ema_model.schedule, module.ema_model.grid, 4)
    x0 = AncestralSampler()(module.ema_model, x_T, grid=grid, generators=generators, label=torch.tensor([2, 7, 7]))
    assert torch.equal(request.on(module)([5, 0, 6]), ((x0 + 1) * 8).round().to(torch.uint8))


def trainer(folder: Path) -> DiffusionTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return DiffusionTrainer(default_root_dir=folder, accelerator="cpu", **quiet)


def test_a_request_is_resolved_once_for_all_batches(tmp_path: Path) -> None:
    grid, module = CountedGrid(), build()
    draw = SampleRequest(DDIMSampler(), 5, grid).on(module)
    whole = draw(range(6))
    assert torch.equal(torch.cat([draw([0, 1, 2]), draw(torch.tensor([3, 4, 5]))]), whole)
    assert draw.steps == draw.description()["steps"] == 5 and grid.calls == 1
    torch.save({"state_dict": module.state_dict(), "global_step": 1}, tmp_path / "a.ckpt")
    trainer(tmp_path).sample(module, ckpt_path=str(tmp_path / "a.ckpt"), n=6, batch_size=2, steps=5, grid=grid)
    assert grid.calls == 2


def test_steps_of_a_learned_schedule_are_those_of_the_loaded_weights(tmp_path: Path) -> None:
    def learned() -> DiffusionModule:
        objective = ContinuousNegativeElbo(StratifiedTimes())
        return build(schedule=LearnedGamma(-9.0, 5.0, T=10), objective=objective, conditioning=GammaConditioning())

    trained, grid, generator = learned(), LogSNRGrid(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in trained.ema_model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    torch.save({"state_dict": trained.state_dict(), "global_step": 1}, tmp_path / "a.ckpt")
    request, other = SampleRequest(DDIMSampler(), 5, grid), learned()
    assert not torch.allclose(request.on(other).times, request.on(trained).times, atol=1e-3)
    options = {"ckpt_path": str(tmp_path / "a.ckpt"), "n": 2, "steps": 5}
    trainer(tmp_path).sample(other, sampler=DDIMSampler(), grid=grid, **options)
    assert torch.equal(load_file(tmp_path / "samples.safetensors")["images"], request.on(trained)(range(2)))


def test_a_cap_serves_short_chains() -> None:
    module = build()
    assert [SampleRequest(steps=steps, cap_steps=True).on(module).steps for steps in (50, 4, None)] == [10, 4, 10]
    with pytest.raises(InputError, match="steps = 50 must lie between 1 and the chain's T = 10"):
        SampleRequest(steps=50).on(module)


NUMBERS = np.linspace(0, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8)


@pytest.mark.parametrize("values", [[[math.nan]], [[math.inf]], [[1e300]], [[0.0], [math.nan]], [], [[]], [[0.0, 1.0]]])
def test_vectors_that_are_none(values: list[list[float]]) -> None:
    module = told("vector")
    assert SampleRequest(vectors=[[0.5]], steps=2).on(module)([0, 1]).shape == (2, 1, 8, 8)
    with pytest.raises(InputError, match=r"--vectors \[.*: give"):
        SampleRequest(vectors=values).on(module)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.where(NUMBERS == 1, np.nan, NUMBERS), "row 0: holds NaN or infinity"),
        (np.where(NUMBERS == 1, 1e300, NUMBERS.astype(float)), "row 0: holds a number that float32 cannot hold"),
        (NUMBERS[:0], r"has shape \[0, 1, 8, 8\]; give one field or more"),
        (NUMBERS[..., :4], r"has shape \[1, 1, 8, 4\]"),
        (np.float32(1), r"has shape \[\]"),
        (NUMBERS.astype(complex), "holds complex128 and no real numbers"),
        ({"a": NUMBERS, "b": NUMBERS}, "holds the arrays a, b: call the one that is meant fields"),
        (b"\x93NUMPY", "cannot be read"),
        (None, "cut short"),
    ],
)
def test_fields_that_are_none(values: Any, words: str, tmp_path: Path) -> None:
    module, path = told("field"), tmp_path / ("a.npz" if isinstance(values, dict) else "a.npy")
    for good in (NUMBERS, NUMBERS[0]):
        np.save(path.with_name("good.npy"), good)
        request = SampleRequest(fields=str(path.with_name("good.npy")), steps=2)
        assert request.on(module)([0, 1]).shape == (2, 1, 8, 8)
    if isinstance(values, dict):
        np.savez(path, **values)
    elif isinstance(values, bytes):
        path.write_bytes(values)
    else:
        np.save(path, NUMBERS if values is None else values)
    if values is None:
        path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(InputError, match=words) as error:
        SampleRequest(fields=str(path)).on(module)
    assert str(path) in str(error.value)


def told(name: str) -> DiffusionModule:
    """A module that is told a vector of one number, or a field of one channel."""
    size = {"vector": "vector_size", "field": "field_channels"}[name]
    network = UNet(1, width=8, multipliers=(1, 2), blocks=1, **{size: 1})  # type: ignore[arg-type]
    return build(network=network, **{f"{name}_conditional": True, size: 1})


def test_the_callback_sees_every_state() -> None:
    module, states = build(), list[tuple[Tensor, float]]()
    draw = SampleRequest(steps=4, seed=1).on(module)
    images = draw([2, 3], lambda x, t: states.append((x, float(t))))
    assert [t for _, t in states] == draw.times.flip(0).tolist() and len(states) == 5
    assert torch.equal(((states[-1][0] + 1) * 8).round().to(torch.uint8), images)
    assert torch.equal(states[0][0][0, 0], torch.randn(8, 8, generator=image_generators(1, [2])[0]))


def test_rows_between_two_seeds_keep_their_class() -> None:
    request = SampleRequest(DDIMSampler(), 2, labels=[4, 9], interpolate_to=1, interpolation_columns=3)
    draw = request.on(conditional())
    label = draw.label(torch.arange(9))
    assert label is not None and label.tolist() == [4, 4, 4, 9, 9, 9, 4, 4, 4]
    # columns count only between two seeds
    assert SampleRequest(interpolation_columns=1).on(build()).columns == 1


@pytest.mark.parametrize("factory", [ReplacementSampler, partial(ReplacementSampler, resamplings=3)])
def test_known_pixels_and_their_description(factory: InpaintingFactory) -> None:
    known = torch.full((1, 1, 8, 8), 5, dtype=torch.uint8)
    mask = torch.from_numpy(np.eye(8, dtype=bool))[None, None]
    draw = SampleRequest(steps=2, inpainting=Inpainting(known, mask, factory)).on(build())
    assert torch.equal(draw(range(3))[:, 0][:, mask[0, 0]], torch.full((3, 8), 5, dtype=torch.uint8))
    described = draw.description()["inpainting"]
    assert described["class_path"] == "ddpm_lightning.samplers.inpainting.ReplacementSampler"
    assert described["init_args"]["resamplings"] == (1 if factory is ReplacementSampler else 3)
