"""The user's own code: modules of the current folder, data, networks, optimisers and schedules."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from builders import build, compared, conditional, differences, run_trainer, trainer
from PIL import Image
from processes import ROOT, run_ddpm
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from ddpm_lightning.data import Batch, ImageDataModule, Split, levels_to_model
from ddpm_lightning.data.own import OwnBatches
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import tile
from ddpm_lightning.networks import AdaptedNetwork
from ddpm_lightning.own_code import is_installed
from ddpm_lightning.runs import Run
from ddpm_lightning.training.optimizers import MuonAdamW

pytestmark = pytest.mark.cli

TINY = f"""
extends: {ROOT}/configs/digits.yaml
run_dir: run
trainer:
  {{max_epochs: 1, check_val_every_n_epoch: 1, limit_train_batches: 2, limit_val_batches: 1, accelerator: cpu,
   limit_test_batches: 1}}
model:
  network: {{class_path: ddpm_lightning.networks.UNet, init_args: {{width: 4, multipliers: [1, 2], blocks: 1}}}}
  schedule: {{class_path: ddpm_lightning.schedules.CosineChain, init_args: {{T: 4}}}}
"""
SOURCES = {
    "own_broken": "import no_such_library\n",
    "own_syntax": "import torch\n\nclass Net(torch.nn.Module)\n    pass\n",
    "own_typo": "import torch\n\nclass Net(torch.nn.Modul):\n    pass\n",
    "own_nets": """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
    def forward(self, x, t, label=None):
        return self.conv(x)

class Constructor(Net):
    def __init__(self):
        raise KeyError("width")
class Forward(Net):
    def forward(self, x, t, label=None):
        return self.convolution(x)
class Pair(Net):
    def forward(self, x, t, label=None):
        return self.conv(x), t
class NoTime(Net):
    def forward(self, x):
        return self.conv(x)
class Twice(Net):
    def forward(self, x, t, label=None):
        return self.conv(x).repeat(1, 2, 1, 1)
class Nothing(nn.Module):
    def forward(self, x, t, label=None):
        return x
""",
    "own_schedules": """
from torch.optim import Optimizer, SGD
from torch.optim.lr_scheduler import LambdaLR

def warmup(optimizer, steps=10):
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
def annotated(optimizer: Optimizer, steps: int = 10) -> LambdaLR:
    return warmup(optimizer, steps)
def descent(weights, lr=0.1):
    return SGD(weights, lr)
def wrong(optimizer):
    return 3
""",
    "own_data": """
import torch
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

class Pictures(LightningDataModule):
    levels, num_classes = 256, 3
    def __init__(self, channels: int = 2, height: int = 8, scale: float = 1.0, labels: bool = True):
        super().__init__()
        self.shape, self.scale, self.labels = (channels, height, 12), scale, labels
    def loader(self):
        images = torch.arange(6 * self.shape[0] * self.shape[1] * 12).reshape(6, *self.shape).to(torch.uint8)
        images = images if self.scale == 1 else images * self.scale
        labels = [torch.arange(6) % 3] if self.labels else []
        return DataLoader(TensorDataset(images, *labels), batch_size=3)
    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = loader

class Shapeless(Pictures):
    def __init__(self):
        super().__init__()
        self.shape = None
class Levelless(Pictures):
    levels = None
""",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with modules of a user's, which is the current one."""
    for name, source in SOURCES.items():
        (tmp_path / f"{name}.py").write_text(source)
    (tmp_path / "tiny.yaml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    # here a process goes on with another folder, which a user's does not
    sys.path_importer_cache.pop(str(tmp_path), None)
    yield tmp_path
    for name in SOURCES:
        sys.modules.pop(name, None)


def fit(folder: Path, *options: str, expect: int = 0) -> str:
    printed = run_ddpm("fit", "-c", "tiny.yaml", *options, expect=expect, cwd=folder)
    if expect:
        assert not (folder / "run" / "config.yaml").exists() and "Traceback" not in printed
    return printed


# --- modules


def test_modules_are_found_in_the_current_folder(folder: Path) -> None:
    assert "Net with 10 parameters" in fit(folder, "--model.network", "own_nets.Net")


@pytest.mark.parametrize(
    ("network", "words"),
    [
        ("own_broken.Net", "own_broken.py, line 1: ModuleNotFoundError: No module named 'no_such_library'"),
        ("own_syntax.Net", "own_syntax.py, line 3: SyntaxError: expected ':'"),
        ("own_typo.Net", "own_typo.py, line 3: AttributeError: module 'torch.nn' has no attribute 'Modul'"),
        ("own_nets.Constructor", "own_nets.py, line 14: KeyError: 'width'"),
        ("own_nets.Forward", "own_nets.py, line 17: AttributeError: 'Forward' object has no attribute 'convolution'"),
        ("own_nets.Absent", "module 'own_nets' has no attribute 'Absent'"),
        ("own_nets.Pair", "Pair returns a tuple and no tensor: the call is network(x, c, label=None)"),
        ("own_nets.NoTime", "takes 2 positional arguments but 3 were given: the call is network(x, c, label=None)"),
        ("own_nets.Twice", "must return [1, 8, 8]; set --model.network.init_args.out_channels 1 where it has that"),
        ("own_nets.Nothing", "--model.optimizer cannot be made: optimizer got an empty parameter list"),
    ],
)
def test_failures_of_own_code_are_named(folder: Path, network: str, words: str) -> None:
    assert words in fit(folder, "--model.network", network, expect=2)


def test_a_library_is_one_wherever_pip_put_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``pip install --target`` does; a project of one's own lies there without the list of its files."""
    for name in ("libs", "project"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "parts.py").write_text("")
        monkeypatch.syspath_prepend(tmp_path / name)
    (tmp_path / "libs" / "parts-1.0.dist-info").mkdir()
    assert is_installed(tmp_path / "libs" / "parts.py") and not is_installed(tmp_path / "project" / "parts.py")


def test_a_library_is_not_hidden_by_an_own_module(folder: Path) -> None:
    (folder / "yaml.py").write_text("class Net: pass\n")
    printed = fit(folder, "--model.network", "yaml.Net", expect=2)
    assert f"{folder}/yaml.py is hidden by a library of the same name" in printed


# --- networks of other libraries


class Foreign(nn.Module):
    def __init__(self, output: str) -> None:
        super().__init__()
        self.output = output

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None) -> object:
        self.seen = timestep, class_labels
        return {"tensor": sample, "tuple": (sample, 1), "object": SimpleNamespace(sample=sample)}[self.output]


@pytest.mark.parametrize("output", ["tensor", "tuple", "object"])
def test_a_network_of_another_library_is_adapted(output: str) -> None:
    x, t, label = torch.ones(2, 1, 4, 4), torch.tensor([0.1, 0.5]), torch.tensor([3, 4])
    network = AdaptedNetwork(foreign := Foreign(output))
    assert torch.equal(network(x, t, label=label), x)
    assert torch.equal(foreign.seen[0], 1000 * t) and foreign.seen[1] is label
    network(x, t)
    assert foreign.seen[1] is None
    AdaptedNetwork(foreign, time_scale=1.0, num_classes=10)(x, t)
    assert torch.equal(foreign.seen[0], t) and foreign.seen[1].tolist() == [10, 10]


def test_a_network_of_diffusers_trains_with_classes(folder: Path) -> None:
    (folder / "net.yaml").write_text("""
model:
  class_conditional: true
  label_dropout: 0.1
  network:
    class_path: AdaptedNetwork
    init_args:
      network:
        class_path: diffusers.UNet2DModel
        init_args: {in_channels: 1, out_channels: 1, block_out_channels: [8, 8], layers_per_block: 1,
          norm_num_groups: 2, down_block_types: [DownBlock2D, DownBlock2D], up_block_types: [UpBlock2D, UpBlock2D],
          num_class_embeds: 11}
""")
    fit(folder, "-c", "net.yaml")
    run_ddpm("sample", "run", "--n", "2", "--steps", "2", "--guidance_scale", "2", cwd=folder)
    assert Run("run").config["model"]["network"]["init_args"]["num_classes"] == 10


def test_what_the_network_is_not_told_follows_the_data(folder: Path) -> None:
    learned = ("--model.variance", "LearnedRangeVariance", "--model.objective", "HybridObjective")
    fit(folder, "--data", "own_data.Pictures", "--model.class_conditional", "true", *learned)
    arguments = Run("run").config["model"]["network"]["init_args"]
    assert [arguments[name] for name in ("channels", "out_channels", "num_classes")] == [2, 4, 3]
    assert "nothing left to train" in run_ddpm("fit", "run", cwd=folder)
    assert Run("run").load()[0].model.network.channels == 2
    given = ("fit", "-c", "tiny.yaml", "--run_dir", "other", "--model.network.channels", "3")
    assert "expected x of shape [B, 3, H, W]" in run_ddpm(*given, expect=2, cwd=folder)


# --- data


def test_the_template_of_a_data_module_runs_as_printed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docstring = ImageDataModule.__doc__
    assert docstring is not None
    code = re.search(r"loads them::\n\n(.*?)\n    Then", docstring, flags=re.DOTALL)
    assert code is not None
    smaller = {"45_000": "40", "5_000": "8", "10_000": "8"}
    source = re.sub(r"\d+_000", lambda match: smaller[match[0]], re.sub("^ {8}", "", code[1], flags=re.MULTILINE))
    (folder / "photos.py").write_text(source)
    for split, count in (("train", 40), ("val", 8)):
        images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
        torch.save((images, torch.zeros(count, dtype=torch.int64)), folder / f"{split}.pt")
    options = ("--data", "photos.Photos", "--data.root", ".", "--data.batch_size", "8")
    assert "on Photos (40 training images)" in fit(folder, *options)
    sys.modules.pop("photos")


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
def test_images_of_any_number_of_channels_are_trained_sampled_and_shown(folder: Path, channels: int) -> None:
    fit(folder, "--data", "own_data.Pictures", "--data.channels", str(channels))
    run_ddpm("sample", "run", "--n", "2", "--steps", "2", "--gif", "true", cwd=folder)
    width = 2 * 24 * (1 if channels in (1, 3) else channels) + 6
    with Image.open(folder / "run/samples.png") as picture:
        assert picture.mode == "RGB" and picture.size == (width, 20)


def test_channels_side_by_side() -> None:
    images = torch.arange(5, dtype=torch.uint8).view(1, 5, 1, 1).expand(1, 5, 32, 32) * 10
    picture = tile(images, 256)
    assert [int(picture[0, 10, 2 + 32 * i]) for i in range(5)] == [0, 10, 20, 30, 40]
    assert torch.equal(picture[0], picture[1]) and torch.equal(picture[0], picture[2])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["own_data.Shapeless"], "Shapeless.shape is None: give the class an attribute shape = (channels, height"),
        (["own_data.Levelless"], "Levelless.levels is None: give the class an attribute levels = 256"),
        (["own_data.Pictures", "--data.scale", "0.5"], "images float32 from 0 to 127.5: give uint8 grey levels 0..255"),
        (["own_data.Pictures", "--data.height", "7"], "size 7 x 12 is not divisible by 2"),
        (
            ["own_data.Pictures", "--data.labels", "false", "--model.class_conditional", "true"],
            "has no labels, and the model needs classes",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused_before_training(folder: Path, options: list[str], words: str) -> None:
    assert words in fit(folder, "--data", *options, expect=2)


def test_plain_data_are_tested_and_predicted_by_their_place(folder: Path) -> None:
    fit(folder, "--data", "own_data.Pictures", "--data.labels", "false")
    run_ddpm("test", "run", "--trainer.limit_test_batches", "2", cwd=folder)
    run_ddpm("predict", "run", cwd=folder)
    rows = (folder / "run/image_terms.csv").read_text().splitlines()[1:]
    assert [row.partition(",")[0] for row in rows] == list("012345")
    printed = run_ddpm("evaluate", "forms", "run", expect=2, cwd=folder)
    assert "Pictures gives its images in batches only" in printed


IMAGES = torch.randint(0, 17, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
LABELS = torch.arange(12) % 10


@pytest.mark.parametrize("form", ["tuple", "dict", "image"])
def test_plain_loaders_train_as_batches_do(tmp_path: Path, form: str) -> None:
    def loader(form: str) -> DataLoader:
        if form == "dict":
            return DataLoader([{"image": x, "label": y} for x, y in zip(IMAGES, LABELS, strict=True)], batch_size=4)
        return DataLoader(TensorDataset(IMAGES, LABELS) if form == "tuple" else TensorDataset(IMAGES), batch_size=4)

    def batches() -> DataLoader:
        return DataLoader([Batch(IMAGES[r], LABELS[r], r) for r in torch.arange(12).split(4)], batch_size=None)

    make = build if form == "image" else conditional
    losses = []
    for data in (loader(form), batches()):
        torch.manual_seed(0)  # the network's weights
        module = make()
        trainer(tmp_path, max_epochs=2).fit(module, data, data)
        losses.append({form: scores["elbo"].mean for form, scores in module.bound_scores["val"].items()})
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"img": IMAGES, "label": LABELS}, "is a dict with img, label: let it be"),
        ((IMAGES, LABELS, LABELS), "is a tuple of 3: let it be"),
        ("images", "is a str: let it be"),
        ((IMAGES.long(), LABELS), "images int64 from 0 to 16: give uint8 grey levels 0..16"),
        ((IMAGES + 1, LABELS), "grey levels up to 17: they must lie in 0..16"),
        ((IMAGES[:, 0], LABELS), "images of shape [12, 8, 8]: the model takes [B, C, H, W] = [B, 1, 8, 8]"),
        ((IMAGES, LABELS[:3]), "labels torch.int64 [3] for 12 images"),
        ((IMAGES, LABELS.float()), "labels torch.float32 [12] for 12 images"),
        ((IMAGES, LABELS + 1), "labels from 1 to 10: the model's classes are 0..9"),
    ],
)
def test_batches_of_another_form_are_refused(given: object, words: str) -> None:
    with pytest.raises(InputError, match=re.escape(words)):
        OwnBatches((1, 8, 8), 17)(given, 10, SimpleNamespace(training=True))  # type: ignore[arg-type]


def test_processes_share_a_split_and_leave_out_what_is_padded() -> None:
    data = TensorDataset(IMAGES[:5])
    seen: list[int] = []
    for rank in range(2):
        loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 2, rank, shuffle=False))
        process = SimpleNamespace(
            training=False, val_dataloaders=loader, test_dataloaders=None, predict_dataloaders=None, global_rank=rank,
            world_size=2, state=SimpleNamespace(stage=SimpleNamespace(value="validate")),
        )  # fmt: skip
        own = OwnBatches((1, 8, 8), 17)
        for given in loader:
            batch = own(given, None, process)  # type: ignore[arg-type]
            assert torch.equal(batch.image, IMAGES[batch.index])
            seen += batch.index.tolist()
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_float_images_are_refused_and_left_alone() -> None:
    images = torch.rand(2, 1, 4, 4)
    before = images.clone()
    with pytest.raises(InputError, match="PILToTensor instead of ToTensor"):
        levels_to_model(images, 256)
    assert torch.equal(images, before)


def test_a_split_is_what_load_returns() -> None:
    class Wrong(ImageDataModule):
        shape, levels, num_classes = (1, 8, 8), 17, 10

        def load(self, split: str) -> Split:
            return {"float": Split(IMAGES / 16, LABELS), "tuple": (IMAGES, LABELS)}[self.kind]  # type: ignore[return-value]

    for kind, words in (
        ("float", "images float32 from 0 to 1: give uint8"),
        ("tuple", "returned a tuple: return Split"),
    ):
        data = Wrong({"train": 12})
        data.kind = kind
        with pytest.raises(InputError, match=words):
            data.split("train")


# --- optimisers and schedules


@pytest.mark.parametrize("function", ["warmup", "annotated"])
def test_a_schedule_is_a_function(folder: Path, function: str) -> None:
    (folder / "own.yaml").write_text(
        f"model: {{lr_scheduler: {{class_path: own_schedules.{function}, init_args: {{steps: 4}}}}}}\n"
    )
    fit(folder, "-c", "own.yaml", "--model.optimizer", "own_schedules.descent")
    saved = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 0.1 * 3 / 4
    printed = run_ddpm("fit", "run", "--trainer.max_epochs", "2", cwd=folder)
    assert "epoch 1 | step 4" in printed


def test_functions_are_kept_as_they_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(folder, "--model.lr_scheduler", "own_schedules.warmup", "--model.network", "own_nets.Net")
    assert Run("run").config["model"]["lr_scheduler"]["class_path"] == "own_schedules.warmup"
    with pytest.raises(InputError, match="if you trust it: DDPM_TRUSTED="):
        Run("run").load_module()
    monkeypatch.setenv("DDPM_TRUSTED", "own_nets,own_schedules")
    monkeypatch.syspath_prepend(str(folder))
    assert Run("run").load_module().configure_optimizers()[1][0]["interval"] == "step"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model.optimizer", "torch.optim.Muon"], "--model.optimizer cannot be made: Muon only supports 2D"),
        (["--model.optimizer", "torch.optim.Muon"], "training.optimizers.MuonAdamW takes all weights"),
        (["--model.optimizer", "torch.optim.LBFGS"], "--model.optimizer LBFGS evaluates the loss several times"),
        (["--model.optimizer", "torch.optim.SparseAdam"], "--model.optimizer SparseAdam takes sparse gradients only"),
        (
            ["--model.lr_scheduler", "torch.optim.lr_scheduler.OneCycleLR", "--model.lr_scheduler.max_lr", "1"],
            "--model.lr_scheduler cannot be made: You must define either total_steps",
        ),
        (["--model.lr_scheduler", "own_schedules.wrong"], "--model.lr_scheduler makes a int"),
        (
            ["--model.lr_scheduler={class_path: own_schedules.warmup, init_args: {step: 3}}"],
            "--model.lr_scheduler.step: warmup has no such argument: did you mean steps?",
        ),
        (
            ["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "--model.lr_scheduler.mode", "max"],
            "bits/dim get better by getting smaller",
        ),
        (
            ["--model.lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau", "--trainer.limit_val_batches", "0"],
            "follows a bound on the validation images, and none is measured",
        ),
    ],
)
def test_optimisers_and_schedules_that_cannot_train_are_refused(folder: Path, options: list[str], words: str) -> None:
    assert words in fit(folder, *options, expect=2)


def test_a_plateau_is_followed_and_resumed_bit_for_bit(folder: Path) -> None:
    (folder / "plateau.yaml").write_text(
        "model: {optimizer: {class_path: MuonAdamW, init_args: {lr: 0.01}}, lr_scheduler: {class_path: "
        "torch.optim.lr_scheduler.ReduceLROnPlateau, init_args: {patience: 0, threshold: 0.9, factor: 0.5}}}\n"
        "trainer: {check_val_every_n_epoch: 2}\n"
    )
    fit(folder, "-c", "plateau.yaml", "--trainer.max_epochs", "6")
    fit(folder, "-c", "plateau.yaml", "--trainer.max_epochs", "3", "--run_dir", "cut")
    run_ddpm("fit", "cut", "--trainer.max_epochs", "6", cwd=folder)
    whole, cut = (compared(folder / name / "checkpoints/last.ckpt") for name in ("run", "cut"))
    assert differences(whole, cut) == []
    # three validations in six epochs, of which the first is the best so far
    state = torch.load(folder / "run/checkpoints/last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01 * 0.5**2
    printed = run_ddpm("fit", "cut", "--trainer.max_epochs", "7", "--model.lr_scheduler.patience", "5", cwd=folder)
    assert "lr_scheduler.patience 0 -> 5" in printed
    state = torch.load(folder / "cut/checkpoints/last.ckpt", weights_only=True)
    assert state["optimizer_states"][0]["param_groups"][0]["lr"] == 0.01 * 0.5**2


def test_muon_takes_orthogonal_steps_of_matrices_and_adams_of_the_rest() -> None:
    torch.manual_seed(0)
    kernel, bias = nn.Parameter(torch.randn(8, 4, 3, 3)), nn.Parameter(torch.randn(8))
    reference = nn.Parameter(bias.detach().clone())
    before = kernel.detach().clone()
    optimizer, adam = MuonAdamW([kernel, bias], lr=0.1), torch.optim.AdamW([reference], lr=0.1, weight_decay=0)
    for _ in range(3):
        before = kernel.detach().clone()
        kernel.grad, bias.grad = torch.randn(8, 4, 3, 3), torch.randn(8)
        reference.grad = bias.grad.clone()
        optimizer.step()
        adam.step()
    torch.testing.assert_close(bias, reference)
    step = (before - kernel.detach()).flatten(1) / 0.1 / (0.2 * 36**0.5)
    singular = torch.linalg.svdvals(step)
    assert bool(((singular > 0.6) & (singular < 1.3)).all())
    with pytest.raises(ValueError, match="momentum = 1"):
        MuonAdamW([kernel], momentum=1.0)


def test_muon_trains_with_clipping_and_accumulation(tmp_path: Path) -> None:
    module = build(optimizer=MuonAdamW)
    data = DataLoader(TensorDataset(IMAGES), batch_size=4)
    run_trainer(tmp_path, gradient_clip_val=0.5, accumulate_grad_batches=2).fit(module, data)
    assert all(weight.isfinite().all() for weight in module.parameters())
