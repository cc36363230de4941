"""Runs that stop at any moment and go on: bit for bit where the uninterrupted run would be, and no checkpoint lost."""

import os
import pickle
import resource
import shutil
import signal
import zipfile
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from builders import Evil, build, compared, differences, torn

from ddpm_lightning.callbacks import LastCheckpoint, StopOnNonFinite
from ddpm_lightning.checkpoints.files import (
    AtomicCheckpointIO,
    check_hyperparameters,
    last_good,
    read_checkpoint,
)
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.runs.lock import RunLock
from ddpm_lightning.trainer import DiffusionTrainer
from ddpm_lightning.training import DiffusionModule


def trainer(folder: Path, *callbacks: pl.Callback, **options: object) -> DiffusionTrainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return DiffusionTrainer(
        default_root_dir=folder, accelerator="cpu", callbacks=list(callbacks), **{**quiet, "max_epochs": 2, **options}
    )


# --- exact


class SaveEach(pl.Callback):
    """A checkpoint after every batch, between two accumulated ones, too, and after every validation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.paths = folder, []

    def _save(self, trainer: pl.Trainer, *_: object) -> None:
        self.paths.append(self.folder / f"{len(self.paths)}.ckpt")
        trainer.save_checkpoint(self.paths[-1])

    on_train_batch_end = on_validation_end = _save


@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 3, "val_check_interval": 5}, {"val_check_interval": 4}]
)
def test_resume_is_exact_from_every_moment(tmp_path: Path, options: dict) -> None:
    save = SaveEach(tmp_path)
    model = {"ema_decay": 0.5, "lr_scheduler": lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5)}
    data = {"limit_val": 8}
    trainer(tmp_path, save, enable_checkpointing=False, **options).fit(build(**model), Digits(**data))
    last = save.paths[-1]
    straight = compared(last)
    assert straight["global_step"] == (8 if "accumulate_grad_batches" in options else 20)
    torch.manual_seed(123)
    for path in save.paths[:-1:2]:
        end = tmp_path / "end.ckpt"
        again = trainer(tmp_path, enable_checkpointing=False, **options)
        again.fit(build(**model), Digits(**data), ckpt_path=path)
        again.save_checkpoint(end)
        assert differences(straight, compared(end)) == [], path.name


class Validations(pl.Callback):
    """Notes at which steps the validations are, and what ``last.ckpt`` a kill during each would leave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.steps = folder, list[int]()

    def on_validation_start(self, trainer: pl.Trainer, *_: object) -> None:
        self.steps.append(trainer.global_step)
        last = last_good(self.folder / "checkpoints")
        if last is not None:
            shutil.copy(last, self.folder / f"killed-{trainer.global_step}.ckpt")


def fit_until(folder: Path, step: int, ckpt_path: Path | None, **options: object) -> tuple[list[int], dict]:
    """Steps of the validations of a run of 10 steps an epoch, and its last checkpoint."""
    seen = Validations(folder)
    last = LastCheckpoint(every_n_train_steps=5)
    runner = trainer(folder, last, seen, max_epochs=-1, max_steps=step, **options)
    runner.fit(build(), Digits(limit_val=8), ckpt_path=ckpt_path)
    return seen.steps, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("every", [1, 2])
def test_epochs_are_counted_right_after_resumptions_at_their_ends(tmp_path: Path, every: int) -> None:
    options = {"check_val_every_n_epoch": every}
    steps, straight = fit_until(tmp_path / "straight", 40, None, **options)
    validated, last = [], None
    for end in (10, 20, 30, 40):
        seen, broken = fit_until(tmp_path / "broken", end, last, **options)
        validated += seen
        last = tmp_path / "broken" / "checkpoints" / "last.ckpt"
    assert straight["epoch"] == broken["epoch"] == 3 and straight["global_step"] == 40
    progress = [c["loops"]["fit_loop"]["epoch_progress"]["total"] for c in (straight, broken)]
    assert progress[0] == progress[1]
    assert validated == steps == list(range(10 * every, 41, 10 * every))
    assert differences(straight["state_dict"], broken["state_dict"]) == []


def test_a_validation_in_which_the_run_is_killed_is_done_again_and_no_other(tmp_path: Path) -> None:
    fit_until(tmp_path, 35, None)
    for killed_in, expected in ((20, [20, 30]), (30, [30])):
        seen, _ = fit_until(tmp_path / "again", 35, tmp_path / f"killed-{killed_in}.ckpt")
        assert seen == expected
        shutil.rmtree(tmp_path / "again")


class Raise(pl.Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_before_zero_grad(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.started == self.batch:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_signal_saves_after_the_step_and_ends_with_its_status(
    name: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    options = {"accumulate_grad_batches": 2, "limit_val_batches": 0}
    trainer(tmp_path / "a", LastCheckpoint(), **options).fit(build(), Digits())
    with pytest.raises(SystemExit) as stop:
        trainer(tmp_path / "b", LastCheckpoint(), Raise(number, 13), **options).fit(build(), Digits())
    last = tmp_path / "b/checkpoints/last.ckpt"
    assert stop.value.code == status
    assert capsys.readouterr().out == f"{name} at step 6: {last} saved, go on with --ckpt_path last\n"
    assert signal.getsignal(number) == before
    trainer(tmp_path / "b", LastCheckpoint(), **options).fit(build(), Digits(), ckpt_path=last)
    assert differences(compared(tmp_path / "a/checkpoints/last.ckpt"), compared(last)) == []


# --- whole


def checkpoint(step: int) -> dict:
    return {"state_dict": {"w": torch.full((64, 64), float(step))}, "global_step": step}


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """A folder to which three checkpoints were saved."""
    for step in (1, 2, 3):
        AtomicCheckpointIO().save_checkpoint(checkpoint(step), tmp_path / "last.ckpt")
    return tmp_path


def test_the_checkpoint_before_is_kept(three: Path) -> None:
    assert sorted(path.name for path in three.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert [read_checkpoint(three / f"{name}.ckpt")["global_step"] for name in ("last", "previous")] == [3, 2]
    AtomicCheckpointIO().save_checkpoint(checkpoint(9), three / "best.ckpt")
    assert read_checkpoint(three / "previous.ckpt")["global_step"] == 2


def test_at_every_system_call_of_a_save_a_whole_checkpoint_is_there(
    three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a kill would leave is what is there before and after each call that changes the folder."""
    seen: list[int] = []

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            seen.append(read_checkpoint(last_good(three))["global_step"])
            assert (three / "last.ckpt").is_file()
            done = real(*arguments)
            seen.append(read_checkpoint(last_good(three))["global_step"])
            return done

        monkeypatch.setattr(os, name, call)

    for name in ("fsync", "link", "replace"):
        watched(name)
    AtomicCheckpointIO().save_checkpoint(checkpoint(4), three / "last.ckpt")
    assert seen == [3] * 7 + [4] * 3
    monkeypatch.undo()
    assert read_checkpoint(three / "previous.ckpt")["global_step"] == 3


def test_without_hard_links(three: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    AtomicCheckpointIO().save_checkpoint(checkpoint(4), three / "last.ckpt")
    assert [read_checkpoint(three / f"{name}.ckpt")["global_step"] for name in ("last", "previous")] == [4, 3]


def flipped(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        tensor = max(archive.infolist(), key=lambda entry: entry.file_size)
    data = bytearray(path.read_bytes())
    data[tensor.header_offset + 4096] ^= 255
    path.write_bytes(data)


DAMAGES = {
    "is empty": lambda path: path.write_bytes(b""),
    "is torn, or no checkpoint": torn,
    "does not exist": lambda path: path.unlink(),
    "is damaged": flipped,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_checkpoint_is_replaced_by_the_one_before(
    damage: str, three: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last, previous = three / "last.ckpt", three / "previous.ckpt"
    DAMAGES[damage](last)
    assert AtomicCheckpointIO().load_checkpoint(last)["global_step"] == 2
    output = capsys.readouterr().out
    assert output.startswith(f"{last} {damage}") and f"{previous} of step 2" in output and output.count("\n") == 1
    # the damaged one must not push out the good one
    if damage != "is damaged":
        AtomicCheckpointIO().save_checkpoint(checkpoint(4), last)
        assert [read_checkpoint(path)["global_step"] for path in (last, previous)] == [4, 2]
        DAMAGES[damage](last)
    DAMAGES[damage](previous)
    with pytest.raises(InputError, match=f"last.ckpt {damage}"):
        read_checkpoint(last)


def test_no_space_left_keeps_the_last_good_checkpoint(three: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limit[1]))
    try:
        with pytest.raises(
            RunError, match=r"last\.ckpt cannot be saved \(File too large\); the last good .*last\.ckpt:"
        ):
            AtomicCheckpointIO().save_checkpoint(checkpoint(4), three / "last.ckpt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert sorted(path.name for path in three.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert read_checkpoint(three / "last.ckpt")["global_step"] == 3
    with pytest.raises(RunError, match="the last good checkpoint is none"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(1), Path("/proc/nowhere/last.ckpt"))


# --- safe


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_checkpoint_that_would_run_code_is_refused(
    save: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path, proof = tmp_path / "evil.ckpt", tmp_path / "proof"
    save({"state_dict": {}, "global_step": 0, "evil": Evil(f"touch {proof}")}, path)
    for load in (
        DiffusionModule.load_from_checkpoint,
        AtomicCheckpointIO().load_checkpoint,
        lambda p: trainer(tmp_path).test(build(), Digits(), ckpt_path=p),
        lambda p: trainer(tmp_path).sample(build(), ckpt_path=str(p)),
    ):
        with pytest.raises(InputError, match=r"evil\.ckpt is (refused: it holds (posix|os)\.system|torn, or no)"):
            load(path)
    assert not proof.exists()


FOREIGN = {
    "class": {"network": {"class_path": "evil_part.Net", "init_args": {}}},
    "word": {"network": "evil_part.Net"},
    "argument": {"network": {"class_path": "ddpm_lightning.networks.UNet", "init_args": {"x": ["evil_part.f"]}}},
    "yaml": {"network": '{"class_path": "evil_part.Net"}'},
    "escaped": {"network": '{"class_path": "evil\\x5fpart.Net"}'},
    "list": {"validation_bounds": "- evil_part.Net"},
    "key": {"evil_part.Net": {}},
    "prefix": {"network": {"class_path": "torch.nnevil_part.Net"}},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_checkpoint_that_names_a_foreign_class_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil_part.py").write_text(f"open({str(tmp_path / 'proof')!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    hyper = {"_instantiator": "lightning.pytorch.cli.instantiate_module", **FOREIGN[name]}
    torch.save({"state_dict": {}, "hyper_parameters": hyper}, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match=r"evil(_|\\\\x5f)part.*which is refused"):
        DiffusionModule.load_from_checkpoint(tmp_path / "foreign.ckpt")
    assert not (tmp_path / "proof").exists()


def test_hyperparameters_that_name_a_file_are_refused_and_trusted_packages_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "net").write_text("class_path: evil_part.Net")
    with pytest.raises(InputError, match="is refused"):
        check_hyperparameters({"hyper_parameters": {"network": str(tmp_path / "net")}})
    foreign = {"hyper_parameters": {"network": {"class_path": "my_package.nets.Net"}}}
    with pytest.raises(InputError, match=r"name my_package\.nets\.Net, .*DDPM_TRUSTED=my_package"):
        check_hyperparameters(foreign)
    monkeypatch.setenv("DDPM_TRUSTED", "other,my_package")
    check_hyperparameters(foreign)
    check_hyperparameters({"hyper_parameters": {"lr": 1e-3, "name": "a-word", "version": "2.14", "none": None}})


# --- finite


class Spoil(pl.Callback):
    """Makes the weights no numbers in the middle of training."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, module: DiffusionModule, *_: object) -> None:
        if trainer.global_step == self.step:
            with torch.no_grad():
                next(module.model.network.parameters()).fill_(float("nan"))


@pytest.mark.parametrize("every", [50, 2])
def test_a_loss_that_is_no_number_stops_training_and_spoils_no_checkpoint(every: int, tmp_path: Path) -> None:
    """Whether it is the next look at the losses that finds it, or the next checkpoint."""
    callbacks = [StopOnNonFinite(), Spoil(8), LastCheckpoint(every_n_train_steps=4)]
    last = tmp_path / "checkpoints/last.ckpt"
    words = rf"the loss is nan at step 9, for times from 0\.\d+ to 0\.\d+ of 1; the last good checkpoint is {last}"
    with pytest.raises(RunError, match=words):
        trainer(tmp_path, *callbacks, log_every_n_steps=every, limit_val_batches=0).fit(build(), Digits())
    state = torch.load(last, weights_only=True)
    assert state["global_step"] == 8 and all(bool(v.isfinite().all()) for v in state["state_dict"].values())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    class SpoilLate(Spoil):
        def on_train_batch_start(self, *_: object) -> None: ...

        def on_train_batch_end(self, trainer: pl.Trainer, module: DiffusionModule, *_: object) -> None:
            super().on_train_batch_start(trainer, module)

    callbacks = [StopOnNonFinite(), SpoilLate(4), LastCheckpoint(every_n_train_steps=2)]
    with pytest.raises(
        RunError, match=r"left model\.\S+ not finite by step 4; the last good checkpoint is .*last\.ckpt"
    ):
        trainer(tmp_path, *callbacks, limit_val_batches=0).fit(build(), Digits())
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


# --- one at a time


def test_one_training_at_a_time_in_a_folder(tmp_path: Path) -> None:
    words = rf"is being trained in by another process \(process {os.getpid()} on \S+\)"
    with RunLock(tmp_path), pytest.raises(InputError, match=words):
        RunLock(tmp_path)
    with RunLock(tmp_path):
        pass
    if (child := os.fork()) == 0:
        with RunLock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with RunLock(tmp_path):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
