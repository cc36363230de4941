"""A sampling request: what it resolves to on a module, and that it does so once."""

import math
import textwrap
from dataclasses import replace
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
from ddpm_lightning.process import Denoiser, DiscretizedGaussian, GammaConditioning, Prediction, ScoreParameterization
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, InpaintingFactory, ReplacementSampler
from ddpm_lightning.sampling import Inpainting, SampleRequest
from ddpm_lightning.schedules import LearnedGamma, LinearChain, LinearGamma, LogSNRGrid, Schedule, StridedGrid, TimeGrid
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


# --- a guide


def saved(module: DiffusionModule, path: Path, seed: int = 0) -> DiffusionModule:
    """The module with random weights, and its checkpoint."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in module.ema_model.parameters():
            weight.normal_(std=0.2, generator=generator)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": module.state_dict(), "global_step": 1, "hyper_parameters": dict(module.hparams)}, path)
    return module


def small(**changes: Any) -> DiffusionModule:
    return build(network=UNet(1, width=4, multipliers=(1,), blocks=1, num_classes=10), **changes)


@pytest.mark.parametrize("classes", [False, True])
def test_images_away_from_a_guide(classes: bool, tmp_path: Path) -> None:
    """A run's folder, and a checkpoint of it, give what a sampler makes of the two denoisers."""
    options: dict[str, Any] = {"class_conditional": True, "num_classes": 10} if classes else {}
    module = saved(conditional() if classes else build(), tmp_path / "model.ckpt")
    guide = saved(small(**options), tmp_path / "weak" / "checkpoints" / "last.ckpt", 1).ema_model

    class Both(Denoiser):
        def __init__(self, denoiser: Denoiser) -> None:
            self.denoiser, self.schedule = denoiser, denoiser.schedule

        def __call__(self, x_t: Tensor, t: Tensor, **cond: Any) -> Prediction:
            strong, weak = (model.denoiser(x_t, t, **cond) for model in (module.ema_model, guide))
            x0, eps = (2.5 * getattr(strong, key) - 1.5 * getattr(weak, key) for key in ("x0", "eps"))
            return replace(strong, x0=x0, eps=eps)

    x_T = torch.stack([torch.randn(1, 8, 8, generator=generator) for generator in image_generators(0, [0, 1, 2])])
    label = {"label": torch.tensor([3, 3, 3])} if classes else {}
    x0 = DDIMSampler()(module.ema_model.with_denoiser(Both), x_T, **label)
    images = []
    for path in (tmp_path / "weak", tmp_path / "weak" / "checkpoints" / "last.ckpt"):
        labels = [3] if classes else None
        draw = SampleRequest(DDIMSampler(), guide=str(path), guidance_scale=2.5, labels=labels).on(module)
        assert draw.guide is not None and draw.description()["guide"] == str(path)
        images.append(draw(range(3)))
    assert torch.equal(*images)
    torch.testing.assert_close(images[0].float(), ((x0 + 1) * 8).round(), rtol=0, atol=1)
    plain = SampleRequest(DDIMSampler(), labels=[3] if classes else None).on(module)(range(3))
    assert (images[0] != plain).float().mean() > 0.1


def test_a_guide_of_another_schedule(tmp_path: Path) -> None:
    gamma = {"conditioning": GammaConditioning()}
    module = build(**gamma)
    saved(small(schedule=LinearGamma(-9.0, 5.0, T=6), **gamma), tmp_path / "gamma.ckpt")
    request = SampleRequest(DDIMSampler(), 4, guide=str(tmp_path / "gamma.ckpt"), guidance_scale=2.0)
    assert request.on(module)([0]).shape == (1, 1, 8, 8)


GUIDES: dict[str, tuple[dict[str, Any], str]] = {
    "levels": ({"levels": 9, "decoder": DiscretizedGaussian(9)}, "its levels is 9 and the model's is 17"),
    "shape": ({"shape": (1, 4, 4)}, r"its shape is \[1, 4, 4\] and the model's is \[1, 8, 8\]"),
    "classes": ({"class_conditional": True, "num_classes": 10}, "its class_conditional is True"),
    "time": (
        {"schedule": LinearGamma(-9.0, 9.0, T=10)},
        "LinearGamma of T = 10 and the model's LinearChain of T = 10, and TimeConditioning ties",
    ),
    "score": (
        {"schedule": LinearGamma(), "conditioning": GammaConditioning(), "parameterization": ScoreParameterization()},
        "ScoreParameterization ties",
    ),
    "noise": (
        {"schedule": LinearGamma(-1.0, 1.0), "conditioning": GammaConditioning()},
        "trained at gamma from -1 to 1 and would be asked from -3.89 to 3.19",
    ),
}


@pytest.mark.parametrize("name", GUIDES)
def test_guides_that_do_not_fit(name: str, tmp_path: Path) -> None:
    options, words = GUIDES[name]
    saved(small(**options), tmp_path / "a.ckpt")
    with pytest.raises(InputError, match=rf"--guide .*a\.ckpt: .*{words}"):
        SampleRequest(guide=str(tmp_path / "a.ckpt"), guidance_scale=2.0).on(build())


def test_guides_that_are_none(tmp_path: Path) -> None:
    saved(build(), tmp_path / "a.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for name, scale, words in (
        ("nowhere", 2.0, "--guide .*nowhere does not exist"),
        ("text.ckpt", 2.0, "--guide .*text.ckpt: .* is torn, or no checkpoint"),
        ("a.ckpt", 1.0, "--guidance_scale 1 is the model itself"),
        (".", 2.0, "--guide .*: the checkpoint .* does not exist"),
    ):
        with pytest.raises(InputError, match=words):
            SampleRequest(guide=str(tmp_path / name), guidance_scale=scale).on(build())
    saved(small(class_conditional=True, num_classes=10), tmp_path / "always.ckpt")
    request = SampleRequest(guide=str(tmp_path / "always.ckpt"), guidance_scale=2.0, labels=[10])
    with pytest.raises(InputError, match="never saw an image without its class, and --labels asks for 10"):
        request.on(conditional(label_dropout=0.1))
