"""What keeps a training step fast: no waiting for the device, the layout of the weights, compilation in place."""

from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from builders import build, equal, state, trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm_lightning.data import Batch, Digits, Fields
from ddpm_lightning.data.batches import Split
from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import SimpleUNet, UNet
from ddpm_lightning.objectives import (
    ContinuousElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    EquispacedTimes,
    HybridObjective,
    ImportanceTimes,
    MinSNRWeighting,
    NegativeElbo,
    NoiseMSE,
    Objective,
    StratifiedTimes,
    UniformTimes,
    WeightedMSE,
)
from ddpm_lightning.process import CategoricalDecoder, GammaConditioning, LearnedRangeVariance, VParameterization
from ddpm_lightning.schedules import LearnedGamma, LinearGamma
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.memory_format import set_memory_format, state_like_parameters, wants_channels_last

ADAMW = partial(torch.optim.AdamW, lr=1e-2, fused=True)


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device: a value read, a result of unknown size, a copy between them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "unique_dim", "_unique2"):
            raise AssertionError(f"{func} waits for the device")
        if name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1]):
            raise AssertionError(f"{func} by a mask waits for the device")
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], result) if name == "_to_copy" else (args[1], args[0])
            if source.device.type != target.device.type:
                raise AssertionError(f"{func} from {source.device} to {target.device} waits for the device")
        return result


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.sum().item(),
        lambda x: float(x[0]),
        lambda x: bool((x > 0).all()),
        lambda x: x[x > 0],
        lambda x: x.to("meta"),
    ],
)
def test_waiting_is_noticed(act: Any) -> None:
    x = torch.ones(3)
    act(x)
    with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
        act(x)


@pytest.mark.parametrize("every", [1, 100])
def test_a_training_step_does_not_wait_for_the_device(tmp_path: Path, every: int) -> None:
    """With and without a log entry, in the default configuration; the average's update too."""
    steps = []

    class Watched(DiffusionModule):
        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            with NoWaiting():
                loss = super().training_step(batch, batch_idx)
                torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
                assert self._average is not None
                self._average.update(1.0)
            steps.append(batch_idx)
            return loss

    module = build(objective=NoiseMSE(StratifiedTimes()))
    module.__class__ = Watched
    runner = trainer(tmp_path, enable_checkpointing=False, limit_val_batches=0, log_every_n_steps=every)
    runner.fit(module, Digits())
    assert len(steps) == 10


LEARNED = {"schedule": LearnedGamma(-9.0, 5.0, T=6, units=4), "decoder": CategoricalDecoder(17)}
RANGE = {
    "network": UNet(1, width=8, multipliers=(1, 2), blocks=1, out_channels=2),
    "variance": LearnedRangeVariance(),
}
CLASSES = {
    "network": UNet(1, width=8, multipliers=(1, 2), blocks=1, num_classes=10),
    "class_conditional": True,
    "num_classes": 10,
    "label_dropout": 0.1,
}


@pytest.mark.parametrize(
    ("objective", "parts"),
    [
        (NoiseMSE(StratifiedTimes()), {}),
        (NoiseMSE(UniformTimes()), {"network": SimpleUNet()}),
        (NoiseMSE(ImportanceTimes()), CLASSES),
        (WeightedMSE(EquispacedTimes(), VParameterization(), MinSNRWeighting(), continuous=True), {}),
        (WeightedMSE(UniformTimes()), {"schedule": LinearGamma(T=6), "conditioning": GammaConditioning()}),
        (HybridObjective(UniformTimes()), RANGE),
        (NegativeElbo(DenoisingElbo(steps=1)), {}),
        (NegativeElbo(ContinuousElbo(steps=1)), {"schedule": LinearGamma(T=6), "decoder": CategoricalDecoder(17)}),
        (ContinuousNegativeElbo(UniformTimes()), LEARNED),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Objective) else "",
)
def test_no_step_copies_to_a_gpu_or_waits_for_it(objective: Objective, parts: dict[str, Any]) -> None:
    """On a GPU that computes shapes only. The first step may copy: tables and the grid go to the device once."""
    module = build(**{**parts, "objective": deepcopy(objective)})
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        for part in (module.model, module.objective):
            for child in part.modules():
                for tensors in (child._parameters, child._buffers):
                    for name, value in tensors.items():
                        if value is not None:
                            there = fake.from_tensor(value.detach()).to("cuda")
                            is_parameter = isinstance(value, nn.Parameter)
                            tensors[name] = nn.Parameter(there) if is_parameter else there
        x0 = torch.zeros(4, 1, 8, 8, device="cuda")
        cond = {"label": torch.zeros(4, dtype=torch.int64, device="cuda")} if "class_conditional" in parts else {}

        def step() -> None:
            loss = module.objective(module.model, x0, None, **cond)
            assert loss.device.type == "cuda" and loss.shape == (4,)

        step()
        with NoWaiting():
            step()


# --- layout of the weights


@pytest.mark.parametrize(
    ("option", "precision", "device", "without_norm", "with_norm"),
    [
        ("auto", "bf16-mixed", "cpu", True, False),
        ("auto", "16-mixed", "cuda", True, False),
        ("auto", "bf16-true", "mps", False, False),
        ("auto", "32-true", "cpu", True, True),
        ("auto", "32-true", "cuda", False, False),
        ("auto", "64-true", "cpu", False, False),
        (True, "32-true", "cpu", True, True),
        (False, "bf16-mixed", "cpu", False, False),
    ],
)
def test_what_auto_means(option: Any, precision: str, device: str, without_norm: bool, with_norm: bool) -> None:
    for network, expected in ((SimpleUNet(), without_norm), (UNet(width=8), with_norm)):
        assert wants_channels_last(option, network, precision, torch.device(device)) is expected


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_three_dimensional_convolutions_keep_their_layout(dims: int) -> None:
    """torch has channels_last for tensors of four dimensions only."""
    network, cpu = UNet(width=8, dims=dims), torch.device("cpu")
    assert wants_channels_last("auto", network, "32-true", cpu) is (dims != 3)
    set_memory_format(network, wants_channels_last("auto", network, "32-true", cpu))
    assert not wants_channels_last(False, network, "32-true", cpu)
    if dims == 3:
        with pytest.raises(InputError, match=r"--model\.channels_last true is for images"):
            wants_channels_last(True, network, "32-true", cpu)


def is_channels_last(module: nn.Module) -> set[bool]:
    """Over the weights whose layout shows: of more than one channel and pixel."""
    weights = [p for p in module.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    return {not p.is_contiguous() and p.is_contiguous(memory_format=torch.channels_last) for p in weights}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("option", ["auto", True, False])
def test_both_models_and_the_optimiser_have_the_layout_of_the_option(
    tmp_path: Path, option: Any, precision: Any
) -> None:
    expected = option is not False
    module, seen = build(channels_last=option, optimizer=ADAMW, network=SimpleUNet()), []
    module.model.network.encoder.register_forward_hook(lambda m, i, output: seen.append(output.stride(1) == 1))
    runner = trainer(tmp_path, enable_checkpointing=False, precision=precision, limit_val_batches=0, max_steps=2)
    runner.fit(module, Digits())
    assert is_channels_last(module.model) == is_channels_last(module.ema_model) == {expected}
    states = [(p, state["exp_avg"]) for p, state in runner.optimizers[0].state.items()]
    assert states and all(average.stride() == p.stride() for p, average in states)
    assert set(seen) == {expected}
    assert {a.data_ptr() for a in module.model.parameters()}.isdisjoint(
        a.data_ptr() for a in module.ema_model.parameters()
    )


def test_samples_are_drawn_in_the_layout_of_the_option(tmp_path: Path) -> None:
    """Where the Trainer's own module is the sampling of the model that has the option."""
    module = build(channels_last=False, optimizer=ADAMW, network=SimpleUNet())
    runner = trainer(tmp_path, enable_checkpointing=False, max_steps=1, limit_val_batches=0)
    runner.fit(module, Digits())
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert is_channels_last(module.ema_model) == {False}
    for option in (True, False):
        sampled = build(channels_last=option, network=SimpleUNet())
        sampler = DiffusionTrainer(default_root_dir=tmp_path, accelerator="cpu", logger=False)
        sampler.sample(sampled, ckpt_path=str(tmp_path / "a.ckpt"), n=1, steps=2)
        assert is_channels_last(sampled.ema_model) == {option}


@pytest.mark.parametrize("before", [True, False])
def test_a_run_goes_on_in_another_layout(tmp_path: Path, before: bool) -> None:
    """Fused AdamW goes through the memory of weights and averages side by side, so both have to be laid out anew."""

    def fit(name: str, channels_last: bool, steps: int, **options: Any) -> dict[str, Tensor]:
        module = build(channels_last=channels_last, optimizer=ADAMW)
        runner = trainer(tmp_path, enable_checkpointing=False, max_epochs=-1, max_steps=steps, limit_val_batches=0)
        runner.fit(module, Digits(), **options)
        runner.save_checkpoint(tmp_path / name)
        return state(module)

    fit("half.ckpt", before, 5)
    whole = fit("whole.ckpt", before, 7)
    resumed = fit("resumed.ckpt", not before, 7, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    again = fit("again.ckpt", before, 7, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert equal(again, whole)
    # Adam's steps are of size lr = 0.01: another weight's average would show
    assert all(torch.allclose(resumed[name], value, atol=2e-4) for name, value in whole.items())


def test_state_of_another_layout_is_copied_value_by_value() -> None:
    weight = nn.Parameter(torch.randn(4, 3, 3, 3).to(memory_format=torch.channels_last))
    optimizer = torch.optim.AdamW([weight], fused=True)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    values = {name: value.clone() for name, value in optimizer.state[weight].items()}
    for name in ("exp_avg", "exp_avg_sq"):
        optimizer.state[weight][name] = values[name].contiguous()
    state_like_parameters(optimizer)
    for name, value in optimizer.state[weight].items():
        assert torch.equal(value, values[name]) and value.stride() == values[name].stride()


# --- compilation


def test_compilation_is_in_place_and_leaves_the_average_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def eager(module: nn.Module) -> None:
        compiled.append(module)
        monkeypatch.setattr(module, "_compiled_call_impl", torch.compile(module._call_impl, backend="eager"))

    monkeypatch.setattr(UNet, "compile", eager)
    module, plain = build(compile=True), build()
    for each in (module, plain):
        runner = trainer(tmp_path, enable_checkpointing=False, max_epochs=1, limit_val_batches=1)
        runner.fit(each, Digits(limit_val=8))
        runner.test(each, Digits(limit_test=8), verbose=False)
    assert compiled == [module.model.network]  # once, and not the average
    assert module.ema_model.network._compiled_call_impl is None
    runner.save_checkpoint(tmp_path / "a.ckpt")
    assert not any("_orig_mod" in name for name in module.state_dict())
    # without fusion the operations are the same
    assert equal(state(module), state(plain))


# --- where the images are


class Elsewhere(Digits):
    """Under a Trainer on another device."""

    def __init__(self, device: str, **options: Any) -> None:
        super().__init__(**options)
        self.trainer = SimpleNamespace(
            strategy=SimpleNamespace(root_device=torch.device(device)), global_rank=0, world_size=1
        )

    def _batches_done(self) -> int:
        return 0


def first(batches: Iterable[Batch]) -> Batch:
    return next(iter(batches))


def test_batches_are_picked_on_the_device_of_the_images() -> None:
    for on_device in (True, "auto"):
        data = Elsewhere("meta", on_device=on_device)
        for batches in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
            assert {column.device.type for column in first(batches)[:3]} == {"meta"}
        assert data.split("train").images.device.type == "cpu"  # whoever looks at the split finds it where it was
    assert first(Elsewhere("meta", on_device=False).train_dataloader()).image.device.type == "cpu"
    on_cpu = Elsewhere("cpu")
    assert on_cpu.train_dataloader().split is on_cpu.split("train")  # no copy


@pytest.mark.parametrize(("free", "device", "pinned"), [(10**9, "cuda", False), (100_000, "cpu", True)])
def test_auto_looks_at_the_free_memory(monkeypatch: pytest.MonkeyPatch, free: int, device: str, pinned: bool) -> None:
    moved: list[str] = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**10))
    monkeypatch.setattr(Split, "to", lambda split, device: moved.append(device.type) or split)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: moved.append("pinned") or self)
    data = Elsewhere("cuda")  # 1,300 images of 64 bytes, and their labels
    batches = data.train_dataloader()
    assert batches.split.pinned is pinned and moved == ([] if pinned else ["cuda"])
    batch, plain = first(batches), first(Digits().train_dataloader())
    assert moved == (["pinned"] * 3 if pinned else ["cuda"])
    assert isinstance(batch, Batch) and all(torch.equal(a, b) for a, b in zip(batch[:3], plain[:3], strict=True))
    moved.clear()
    Elsewhere("cuda", on_device=True).train_dataloader()
    assert moved == ["cuda"]


def test_auto_leaves_in_their_file_what_is_read_row_by_row(tmp_path: Path) -> None:
    np.save(tmp_path / "fields.npy", np.random.default_rng(0).normal(size=(40, 1, 4, 4)).astype(np.float32))
    for memory_gb, place in ((0.0, "cpu"), (1.0, "meta")):
        data = Fields(path=str(tmp_path / "fields.npy"), batch_size=4, memory_gb=memory_gb)
        data.trainer = Elsewhere("meta").trainer
        split = data.val_dataloader().split
        assert split.in_memory is (memory_gb > 0) and split.images.device.type == place
