"""Half precision, and fused optimisers, against the same in float32 or float64."""

from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from builders import build, equal, run_trainer, state, weights
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from ddpm_lightning.data import Digits
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.ema import decay_at


class _Exact(pl.Callback):
    """The average of the weights as they are after each step, in float64."""

    def __init__(self, start: nn.Module) -> None:
        self.values = [p.detach().double() for p in start.parameters()]

    def on_before_zero_grad(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: object) -> None:
        assert isinstance(pl_module, DiffusionModule)
        if trainer.global_step:
            share = 1 - decay_at(trainer.global_step, pl_module.ema_decay)
            for value, weight in zip(self.values, pl_module.model.parameters(), strict=True):
                value.lerp_(weight.detach().double(), share)


def _error(module: DiffusionModule, exact: _Exact) -> float:
    """Distance of the average from the exact one, as a share of the way that the exact one went."""
    start = build(ema_decay=module.ema_decay).model.parameters()
    mine = list(module.ema_model.parameters())
    wrong = sum(float((a.double() - e).square().sum()) for a, e in zip(mine, exact.values, strict=True))
    way = sum(float((s.detach().double() - e).square().sum()) for s, e in zip(start, exact.values, strict=True))
    return (wrong / way) ** 0.5


Half = tuple[Path, DiffusionModule, float]


@pytest.fixture(scope="module", params=["bf16-true", "16-true"])
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Half:
    """The checkpoint of 20 steps in half precision, its module, and the error of its average."""
    folder = tmp_path_factory.mktemp("half")
    module = build(optimizer=partial(torch.optim.SGD, lr=1e-2), ema_decay=0.999)
    exact = _Exact(module.model)
    trainer = run_trainer(folder, exact, precision=request.param, max_steps=20)
    trainer.fit(module, Digits(batch_size=16, limit_val=50))
    exact.on_before_zero_grad(trainer, module, None)  # the last step
    trainer.save_checkpoint(folder / "end.ckpt")
    return folder / "end.ckpt", module, _error(module, exact)


def test_the_average_of_weights_in_half_precision_is_kept_in_float32(half: Half) -> None:
    path, module, error = half
    assert {p.dtype for p in module.model.parameters()} == {module.dtype} != {torch.float32}
    kept = {name: value for name, value in weights(path).items() if value.is_floating_point()}
    assert {value.dtype for name, value in kept.items() if name.startswith("ema_model.")} == {torch.float32}
    assert error < 1e-4


def _bounds(folder: Path, path: Path, precision: str) -> list[float]:
    trainer = run_trainer(folder, precision=precision)
    trainer.test(build(), Digits(batch_size=16, limit_test=50), ckpt_path=path, verbose=False, weights_only=True)
    return [float(value) for value in trainer.callback_metrics.values()]


def test_the_average_is_evaluated_as_in_float32(half: Half, tmp_path: Path) -> None:
    path, module, _ = half
    precision = "bf16-true" if module.dtype == torch.bfloat16 else "16-true"
    assert _bounds(tmp_path, path, precision) == pytest.approx(_bounds(tmp_path, path, "32-true"), rel=1e-5)


def test_training_in_half_precision_goes_on_exactly(half: Half, tmp_path: Path) -> None:
    path, module, _ = half
    precision = "bf16-true" if module.dtype == torch.bfloat16 else "16-true"
    data = {"batch_size": 16, "limit_val": 50}

    def go_on(start: Path | None, steps: int) -> Path:
        resumed = build(optimizer=partial(torch.optim.SGD, lr=1e-2), ema_decay=0.999)
        trainer = run_trainer(tmp_path, precision=precision, max_steps=steps)
        trainer.fit(resumed, Digits(**data), ckpt_path=start, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        return tmp_path / f"{steps}.ckpt"

    half_way = go_on(None, 10)
    assert equal(weights(go_on(half_way, 20)), weights(path))


def test_a_checkpoint_whose_average_is_in_half_precision_goes_on(half: Half, tmp_path: Path) -> None:
    path, module, _ = half
    old = torch.load(path, weights_only=True)
    old["state_dict"] = {k: v.to(module.dtype) if v.is_floating_point() else v for k, v in old["state_dict"].items()}
    torch.save(old, tmp_path / "old.ckpt")
    resumed = build(optimizer=partial(torch.optim.SGD, lr=1e-2))
    trainer = run_trainer(tmp_path, precision="bf16-true", max_steps=21)
    trainer.fit(resumed, Digits(batch_size=16, limit_val=50), ckpt_path=tmp_path / "old.ckpt", weights_only=True)
    assert {p.dtype for p in resumed.ema_model.parameters()} == {torch.float32}


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_with_a_fused_optimiser_as_with_another(algorithm: str, tmp_path: Path) -> None:
    def train(fused: bool, **options: object) -> dict[str, torch.Tensor]:
        module = build(optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-3, fused=fused))
        trainer = run_trainer(tmp_path, precision="bf16-mixed", max_steps=3, **options)
        trainer.fit(module, Digits(batch_size=16, limit_val=50))
        return state(module)

    clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
    fused, other, without = train(True, **clip), train(False, **clip), train(True)
    for name, value in other.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-6)
    assert any(not torch.allclose(fused[name], value, rtol=1e-4, atol=1e-5) for name, value in without.items())


class _Scaled(MixedPrecision):
    """16-mixed, whose scaler needs no GPU."""

    def __init__(self) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_scaled_gradients_are_clipped_as_if_they_were_not(algorithm: str, tmp_path: Path) -> None:
    def train(fused: bool) -> dict[str, torch.Tensor]:
        module = build(optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-3, fused=fused))
        clip = {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": algorithm}
        run_trainer(tmp_path, plugins=[_Scaled()], max_steps=3, **clip).fit(module, Digits(batch_size=16, limit_val=50))
        return state(module)

    fused, other = train(True), train(False)
    for name, value in other.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-6)
