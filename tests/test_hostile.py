"""Checkpoints that were damaged or made to do harm: refused in one sentence, and nothing of theirs runs."""

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import build, checkpoint, differences
from builders import run_trainer as trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from ddpm_lightning.callbacks import LastCheckpoint
from ddpm_lightning.checkpoints.descriptions import instantiate_arguments
from ddpm_lightning.checkpoints.files import AtomicCheckpointIO, last_good, read_checkpoint
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.training import DiffusionModule
from ddpm_lightning.training.training_state import check_training_state

# --- classes

FOREIGN_NAMES = """
os.system posix.system subprocess.Popen builtins.eval builtins.exec builtins.open builtins.print io.open shutil.rmtree
pickle.loads runpy.run_path ctypes.CDLL socket.socket urllib.request.urlopen evil_part.Net evil_part
torch.nnevil_part.Net
ddpm_lightning.training.checkpoint_io.os.system ddpm_lightning.checkpoints.files.os.system ddpm_lightning.cli.main
ddpm_lightning.checkpoints.files.AtomicCheckpointIO ddpm_lightning.cli.DiffusionCLI ddpm_lightning.__main__.main
ddpm_lightning.__main__ ddpm_lightning.trainer.DiffusionTrainer ddpm_lightning.data.MNIST ddpm_lightning.data.Digits
ddpm_lightning.runs.run.Run ddpm_lightning.runs.lock.hold ddpm_lightning.networks.unet.math.sqrt
ddpm_lightning.networks.unet.torch.load ddpm_lightning.networks.unet.nn.Identity ddpm_lightning.networks.__init__.UNet
ddpm_lightning.networks.unet.UNet.__init__ ddpm_lightning.networks.evil_part ddpm_lightning.networks
ddpm_lightning.networks.unet.Sequence ddpm_lightning.process.model.InputError ddpm_lightning.process.model.Any
ddpm_lightning.schedules.chain_grid ddpm_lightning.ops.rand ddpm_lightning ddpm_lightning.metrics.BoundMeans
torch.load torch.save torch.hub.load torch.jit.load torch.classes.load_library torch.ops.load_library torch.nn
torch.utils.cpp_extension.load torch.nn.modules.module.os.system torch.nn.modules.module.warnings.warn
torch.nn.parallel.DistributedDataParallel torch.nn.DataParallel torch.nn.functional.relu torch.nn.init.zeros_
torch.nn.modules.module.OrderedDict torch.nn.modules.module.Any torch.nn.Parameter torch.nn.parameter.Buffer
torch.optim.optimizer.torch.load torch.optim.swa_utils.deepcopy torch.optim.optimizer.defaultdict
torch.optim.lr_scheduler.partial torch.optim.lr_scheduler.Counter torch.distributed.init_process_group
lightning.pytorch.cli.LightningCLI lightning.pytorch.cli.instantiate_module lightning.pytorch.Trainer
lightning.pytorch.loggers.TensorBoardLogger lightning.pytorch.profilers.SimpleProfiler jsonargparse.ArgumentParser
__main__.Net __import__ sys.exit . .. torch.nn. .torch.nn.Identity a..b torch.nn.Identity; torch.nn/Identity
../evil_part.Net
"""
FOREIGN = FOREIGN_NAMES.split()
PLACES = [
    *("network", "schedule", "parameterization", "conditioning", "variance", "decoder", "objective", "optimizer"),
    *("objective.init_args.times", "validation_bounds.0", "lr_scheduler"),
]


@functools.cache
def _hyper() -> dict[str, Any]:
    return dict(build().hparams)


def small() -> dict[str, Any]:
    """Hyper-parameters of a small module."""
    return copy.deepcopy(_hyper())


def put(values: Any, place: str, value: Any) -> Any:
    *path, last = (int(step) if step.isdigit() else step for step in place.split("."))
    inner = values
    for step in path:
        inner = inner[step]
    inner[last] = value
    return values


def refused(load: Callable[[], object]) -> str:
    """The one sentence, of a refusal."""
    with pytest.raises(InputError) as refusal:
        load()
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 1000
    return str(refusal.value)


def made(hyper: Any, name: Any = None) -> Callable[[], dict[str, Any]]:
    """Makes the arguments of a module that are described, or only that of a name."""
    described = {key: value for key, value in hyper.items() if key != "_instantiator" and name in (None, key)}
    given = dict.fromkeys(hyper.keys() - described.keys() - {"_instantiator"})
    return lambda: instantiate_arguments(DiffusionModule, described, "hyper_parameters", given)


@pytest.fixture
def trap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file that the tricks here would make, and a module that makes it when it is imported."""
    proof = tmp_path / "proof"
    (tmp_path / "evil_part.py").write_text(f"open({str(proof)!r}, 'w')\nclass Net: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield proof
    assert not proof.exists() and "evil_part" not in sys.modules


@pytest.mark.parametrize("place", PLACES)
def test_no_class_but_those_that_belong_there(place: str, trap: Path) -> None:
    wrong = [*FOREIGN, "ddpm_lightning.process.ForwardProcess", "torch.optim.Optimizer.step", "", "x" * 10**5, "é.ü"]
    wrong += ["torch.nn.Identity"] if place != "network" else []
    wrong += ["torch.optim.Adam"] if place != "optimizer" else []
    for class_path in [*wrong, 3, None, ["os.system"]]:
        for init_args in ({"command": f"touch {trap}"}, {}):
            part = {"class_path": class_path, "init_args": init_args}
            assert "refused" in refused(made(put(small(), place, part), place.partition(".")[0])), class_path


def test_the_command_of_a_checkpoint_is_not_run(trap: Path, tmp_path: Path) -> None:
    state = build().state_dict()
    for class_path in ("ddpm_lightning.training.checkpoint_io.os.system", "ddpm_lightning.checkpoints.files.os.system"):
        part = {"class_path": class_path, "init_args": {"command": f"touch {trap}"}}
        torch.save({"state_dict": state, "hyper_parameters": {**small(), "optimizer": part}}, tmp_path / "a.ckpt")
        assert "os.system, which is refused" in refused(
            lambda: DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt")
        )


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


VALUES = [
    *(
        "network",
        "evil_part.Net",
        "- evil_part.Net",
        '{"class_path": "evil_part.Net"}',
        "/etc/passwd",
        "\x00",
        "é" * 1000,
    ),
    *(0, -1, 0.5, True, 10**30, float("nan"), [], [[]], [1, 2], {}, {"class_path": None}, {"init_args": {}}),
    *({"class_path": "torch.nn.Identity", "command": "id"}, {"class_path": "torch.nn.Identity", "init_args": [1]}),
    *({"class_path": "torch.nn.Identity", "dict_kwargs": {"x": 1}}, {1: 2}, {None: None}, {"a": {"b": {}}}),
    *(b"bytes", {1, 2}, 1j, torch.zeros(2), torch.float32, torch.device("cpu"), nested(40), nested(5000)),
]
ARGUMENTS = [
    *({"width": value} for value in ("8", 8.0, True, None, 10**9, 10**30, [8], {}, {"class_path": "os.system"})),
    *({"multipliers": value} for value in (3, "12", [1, "2"], [[1]], [1.5], [10**9], None, {1, 2}, torch.ones(2))),
    *({"dropout": value} for value in ("0", None, [], True, 10**400, {}, 1j)),
    *({name: 1} for name in ("x", "self", "__class__", "forward", "", "width ", "args", "kwargs", "command")),
    *({"blocks": value} for value in ([[1]], {"a": 1}, "2", 0.5)),
    {1: 2},
]


@pytest.mark.parametrize("place", ["network", "schedule", "objective", "decoder", "optimizer", "validation_bounds.0"])
def test_values_that_are_no_part(place: str, trap: Path) -> None:
    for value in VALUES:
        refused(made(put(small(), place, value), place.partition(".")[0]))


def test_arguments_that_do_not_fit(trap: Path) -> None:
    for arguments in ARGUMENTS:
        hyper = small()
        hyper["network"]["init_args"].update(arguments)
        refused(made(hyper, "network"))
    for name in ("shape", "levels", "ema_decay", "clip_x0", "channels_last", "validation_bounds"):
        for value in ("x", None, {}, {"class_path": "os.system"}, 1j, [[]], torch.zeros(3)):
            if (name, value) != ("levels", None):  # fields have none
                refused(made({**small(), name: value}, name))
    for name in ("x", "command", "self", "", "__init__", 1):
        assert "has no argument" in refused(made({**small(), name: 1}, name))


@pytest.mark.parametrize(
    "size", [{"width": 10**7}, {"width": 2**20}, {"blocks": 10**6}, {"channels": 10**6}, {"multipliers": [10**6] * 4}]
)
def test_sizes_that_would_fill_the_memory(size: dict, tmp_path: Path) -> None:
    module = build()
    hyper = copy.deepcopy(dict(module.hparams))
    hyper["network"]["init_args"].update(size)
    torch.save({"state_dict": module.state_dict(), "hyper_parameters": hyper}, tmp_path / "a.ckpt")
    refused(lambda: DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt"))


def test_what_is_trusted_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an alias, too, and of a package of one's own, but not what that package has imported from elsewhere."""
    (tmp_path / "own_part.py").write_text(
        "from os import system\nfrom subprocess import Popen\nfrom torch import nn\n"
        "class Net(nn.Identity):\n    def __init__(self, size: int = 3, **kw):\n"
        "        super().__init__()\n        self.size = size\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    hyper = small()
    for class_path in ("ddpm_lightning.networks.UNet", "ddpm_lightning.networks.unet.UNet"):
        hyper["network"]["class_path"] = class_path
        made(hyper)()
    own = {**small(), "network": {"class_path": "own_part.Net", "init_args": {"size": 4}}}
    assert "DDPM_TRUSTED=own_part" in refused(made(own))
    monkeypatch.setenv("DDPM_TRUSTED", "other, own_part")
    parts = made(own)()
    assert parts["network"].size == 4 and parts["optimizer"].keywords == {"lr": 1e-3} and parts["shape"] == (1, 8, 8)
    for name in ("system", "Popen", "nn", "nn.Identity", "Gone"):
        refused(made({**own, "network": {"class_path": f"own_part.{name}"}}))


# --- files


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, bytes, dict]:
    path = tmp_path / "a.ckpt"
    content = {"state_dict": {"w": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}, "global_step": 7}
    torch.save(content, path)
    return path, path.read_bytes(), content


def damaged(data: bytes) -> Iterator[bytes]:
    for bit in range(0, 8 * len(data), 11):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    yield from (data[:end] for end in range(0, len(data), 13))
    yield from (data[start:] for start in range(1, len(data), 97))
    yield from (data[:i] + bytes(32) + data[i + 32 :] for i in range(0, len(data) - 32, 32))
    yield from (data[:i] + b"\xff" * 8 + data[i + 8 :] for i in range(0, len(data) - 8, 24))
    yield from (data + tail for tail in (b"\0", b"x" * 100, bytes(70000), data, data[-22:]))
    yield from (b"x" * 50 + data, data[::-1], bytes(len(data)), b"PK\5\6" + bytes(18), data[:100] + data[-100:])


def test_damage_is_found_or_does_no_harm(good: tuple[Path, bytes, dict]) -> None:
    path, data, content = good
    tried = unchanged = 0
    for spoilt in damaged(data):
        path.write_bytes(spoilt)
        tried += 1
        try:
            assert differences(read_checkpoint(path), content) == []
            unchanged += 1
        except InputError as error:
            assert "\n" not in str(error)
    print(f"damaged files: {tried} tried, {tried - unchanged} refused, {unchanged} with all values right")
    assert tried > 1000 and tried - unchanged > 500
    # the mark of a folder, in the archive's directory
    at = data.index(b"a/data/0", data.index(b"PK\1\2")) - 8
    path.write_bytes(data[:at] + b"\x10" + data[at + 1 :])
    assert "is a folder" in refused(lambda: read_checkpoint(path))


def record(path: Path, change: Callable[[bytes], bytes], tmp: Path) -> Path:
    """The checkpoint with another data.pkl, all sums right."""
    import zipfile

    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp, "w") as new:
        for entry in old.infolist():
            data = old.read(entry.filename)
            new.writestr(entry.filename, change(data) if entry.filename.endswith("data.pkl") else data)
    return tmp


def test_storages_larger_than_their_records_are_not_read(good: tuple[Path, bytes, dict], tmp_path: Path) -> None:
    path, _, content = good
    assert differences(read_checkpoint(record(path, lambda data: data, tmp_path / "b.ckpt")), content) == []
    for old, new in ((b"K\x06t", b"J\x00\x00\x00\x10t"), (b"K\x06t", b"K\x07t"), (b"FloatStorage", b"DoubleStorage")):
        spoilt = record(path, lambda data, old=old, new=new: data.replace(old, new), tmp_path / "c.ckpt")
        assert "data/0 is not of the size" in refused(lambda spoilt=spoilt: read_checkpoint(spoilt))
    for junk in (b"", b".", b"\x80\x02}q\x00.", b"\x80\x02r\xff\xff\xff\xff.", b"\x80\x02(((((", b"cos\nsystem\n."):
        refused(lambda junk=junk: read_checkpoint(record(path, lambda _: junk, tmp_path / "d.ckpt")))


def test_archives_that_claim_more_than_they_hold(good: tuple[Path, bytes, dict], tmp_path: Path) -> None:
    import zipfile

    bomb = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    assert "damaged" in refused(lambda: read_checkpoint(bomb))
    twice = tmp_path / "twice.ckpt"
    with zipfile.ZipFile(good[0]) as old, zipfile.ZipFile(twice, "w") as new, pytest.warns(UserWarning):
        for entry in [*old.infolist(), old.infolist()[0]]:
            new.writestr(entry.filename, old.read(entry.filename))
    assert "one name" in refused(lambda: read_checkpoint(twice))
    content = torch.zeros(1).expand(10**9, 10**9)
    torch.save({"state_dict": dict.fromkeys(build().state_dict(), content), "hyper_parameters": small()}, bomb)
    refused(lambda: DiffusionModule.load_from_checkpoint(bomb))


def things(path: Path) -> Iterator[str]:
    """Whatever may have a file's name, made at ``path``, and taken away by the next."""
    victim = path.parent.parent / "victim"
    victim.write_text("precious")
    path.mkdir()
    yield "folder"
    if path.is_dir():
        path.rmdir()
    os.mkfifo(path)
    yield "pipe"
    path.unlink(missing_ok=True)
    path.symlink_to(victim)
    yield "link"
    path.unlink(missing_ok=True)
    os.link(victim, path)
    yield "hard link"
    path.unlink(missing_ok=True)
    path.symlink_to(path)
    yield "loop"
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/full")
    yield "device"
    path.unlink(missing_ok=True)


@pytest.mark.parametrize("name", ["last.ckpt", "last.ckpt.part", "previous.ckpt", "previous.ckpt.part"])
def test_nothing_is_written_through_what_is_in_the_way(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for _ in things(folder / name):
        for step in (1, 2):
            AtomicCheckpointIO().save_checkpoint(checkpoint(step), folder / "last.ckpt")
        assert read_checkpoint(folder / "last.ckpt")["global_step"] == 2
        assert (tmp_path / "victim").read_text() == "precious"
        for file in folder.iterdir():
            file.unlink() if not file.is_dir() else file.rmdir()
    (folder / name).mkdir()
    (folder / name / "precious").touch()
    if name != "previous.ckpt.part":
        with pytest.raises(RunError, match=rf"{name} is a folder: Directory not empty"):
            AtomicCheckpointIO().save_checkpoint(checkpoint(1), folder / "last.ckpt")
    assert (folder / name / "precious").exists()


def test_only_files_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for _ in things(folder / "last.ckpt"):
        refused(lambda: read_checkpoint(folder / "last.ckpt"))
        torch.save(checkpoint(1), folder / "previous.ckpt")
        assert read_checkpoint(folder / "last.ckpt")["global_step"] == 1
        (folder / "previous.ckpt").unlink()
    (folder / "last.ckpt").mkdir()
    assert last_good(folder) is None
    torch.save(checkpoint(3), tmp_path / "a.ckpt")
    (tmp_path / "link.ckpt").symlink_to("a.ckpt")
    assert read_checkpoint(tmp_path / "link.ckpt")["global_step"] == 3


# --- training that goes on


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, dict]:
    """A trainer about to go on with a checkpoint, its module and the checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    model = {
        "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
    }
    options = {"limit_val_batches": 0, "max_epochs": -1, "max_steps": 3}
    trainer(folder, LastCheckpoint(), ModelCheckpoint(), **options).fit(build(**model), Digits())
    path = folder / "checkpoints/last.ckpt"
    module, runner = build(**model), trainer(folder, LastCheckpoint(), ModelCheckpoint(), **options)
    runner.strategy.connect(module)
    module._trainer, runner.state.fn, runner.training = runner, TrainerFn.FITTING, True
    return module, runner, read_checkpoint(path)


def paths(value: Any, path: str = "") -> Iterator[str]:
    if path:
        yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from paths(item, f"{path}/{key}" if path else str(key))


def spoil(value: Any, path: str, new: Any) -> Any:
    """A copy with another value at the path; None takes it away."""
    step, _, rest = path.partition("/")
    key = int(step) if step.isdigit() else step
    value = copy.copy(value)
    if rest or new is not None:
        value[key] = spoil(value[key], rest, new) if rest else new
    else:
        del value[key]
    return value


# None in a fresh optimiser, or what torch itself fills in
HARMLESS = "foreach fused amsgrad maximize capturable differentiable decoupled_weight_decay".split()  # noqa: SIM905
HARMLESS += ["_get_lr_called_within_step", "_is_initial"]


def test_a_training_state_that_does_not_fit_is_refused_before_it_is_restored(stopped: tuple[Any, Any, dict]) -> None:
    module, runner, whole = stopped
    check_training_state(module, runner, whole)
    state = {key: whole[key] for key in ("loops", "optimizer_states", "lr_schedulers", "global_step", "epoch")}
    tried, through = 0, list[tuple[str, object]]()
    for path in paths(state):
        later = path.startswith("optimizer_states/0/state/") and not path.startswith("optimizer_states/0/state/1/")
        others = path.startswith("loops/") and not path.startswith("loops/fit_loop")
        if later or others or path.endswith("combined_loader/0") or "/params/" in path:
            continue
        if path.rpartition("/")[2] in HARMLESS:
            continue
        optional = (
            path.endswith(("/state_dict", ".state_dict", "/combined_loader", "_batches_that_stepped"))
            or path == "optimizer_states/0/state/0"
        )
        for new in ("x",) if optional else (None, "x", {"a": 1}, float("nan")):
            spoilt = spoil(whole, path, new)
            try:
                check_training_state(module, runner, spoilt)
            except InputError as error:
                assert "\n" not in str(error)
            else:
                through.append((path, new))
            tried += 1
    print(f"training states: {tried} tried, {tried - len(through)} refused")
    assert not through, f"let through: {through}"
    assert tried > 200


STATES = {
    "shape": lambda s: s.update(exp_avg=torch.zeros(3)),
    "expanded": lambda s: s.update(exp_avg=torch.zeros(1).expand(10**9, 10**9)),
    "scalar": lambda s: s.update(exp_avg=torch.tensor(0.0)),
    "dtype": lambda s: s.update(exp_avg_sq=s["exp_avg_sq"].long()),
    "complex": lambda s: s.update(exp_avg=s["exp_avg"] + 1j),
    "NaN": lambda s: s["exp_avg_sq"].fill_(float("nan")),
    "infinite": lambda s: s["exp_avg"].fill_(float("inf")),
    "meta": lambda s: s.update(exp_avg=s["exp_avg"].to("meta")),
    "sparse": lambda s: s.update(exp_avg=s["exp_avg"].to_sparse()),
    "number": lambda s: s.update(exp_avg=0.0),
    "no step": lambda s: s.pop("step"),
    "no exp_avg": lambda s: s.pop("exp_avg"),
    "steps": lambda s: s.update(step=torch.zeros(2)),
    "empty": lambda s: s.clear(),
}


@pytest.mark.parametrize("name", STATES)
def test_an_optimiser_state_that_would_crash_the_step_is_refused(name: str, stopped: tuple[Any, Any, dict]) -> None:
    module, runner, whole = stopped
    spoilt = copy.deepcopy(whole)
    STATES[name](spoilt["optimizer_states"][0]["state"][2])
    assert "training cannot go on" in refused(lambda: check_training_state(module, runner, spoilt))


@pytest.mark.parametrize("missing", ["loops", "optimizer_states", "lr_schedulers", "global_step", "epoch"])
def test_what_training_lacks_evaluation_does_not_need(missing: str, stopped: tuple[Any, Any, dict]) -> None:
    module, _, whole = stopped
    spoilt = {key: value for key, value in whole.items() if key != missing}
    assert f"lacks {missing}: it can be evaluated" in refused(lambda: module.on_load_checkpoint(dict(spoilt)))
    build().on_load_checkpoint(dict(spoilt))


def test_no_checkpoint_names_a_file_that_training_would_delete(stopped: tuple[Any, Any, dict]) -> None:
    module, runner, whole = stopped
    key = next(iter(whole["callbacks"]))
    for name in ("best_model_path", "last_model_path", "kth_best_model_path"):
        for path in ("local:///home/thesis.pdf", f"{whole['callbacks'][key]['dirpath']}/../../thesis.pdf"):
            spoilt = copy.deepcopy(whole)
            spoilt["callbacks"][key][name] = path
            assert "names the file" in refused(lambda spoilt=spoilt: check_training_state(module, runner, spoilt))


def test_weights_that_do_not_fit_or_are_not_finite(stopped: tuple[Any, Any, dict], tmp_path: Path) -> None:
    _, _, whole = stopped
    name = "ema_model.network.out_conv.bias"

    def load(value: Any, **options: Any) -> DiffusionModule:
        state = {**whole["state_dict"], name: value}
        if value is None:
            del state[name]
        torch.save({**whole, "state_dict": state}, tmp_path / "a.ckpt")
        return DiffusionModule.load_from_checkpoint(tmp_path / "a.ckpt", optimizer=None, lr_scheduler=None, **options)

    bias = whole["state_dict"][name]
    for value in (bias * float("nan"), bias / 0, bias.long(), bias + 1j, torch.zeros(7), bias.to_sparse(), "x", 3):
        refused(lambda value=value: load(value))
    refused(lambda: load(bias.expand(10**12)))
    assert f"it lacks {name}" in refused(lambda: load(None))
    assert load(None, strict=False).model.T == 10
    assert "is [7] there and [1] here" in refused(lambda: load(torch.zeros(7), strict=False))
    assert torch.equal(load(bias).state_dict()[name], bias)
