"""Runs that stop at any moment and go on: bit for bit where the uninterrupted run would be, and no checkpoint lost."""

import os
import pickle
import resource
import shutil
import signal
import zipfile
from contextlib import nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from shutil import copytree

import lightning.pytorch as pl
import pytest
import torch
from builders import Evil, build, checkpoint, compared, differences, torn
from builders import run_trainer as trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
)
from lightning.pytorch.loggers.logger import Logger
from torch import nn

from ddpm_lightning.callbacks import LastCheckpoint, StopOnNonFinite
from ddpm_lightning.checkpoints.files import (
    AtomicCheckpointIO,
    last_good,
    read_checkpoint,
)
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError, RunError
from ddpm_lightning.objectives import ImportanceTimes, NoiseMSE
from ddpm_lightning.runs import Run
from ddpm_lightning.training import DiffusionModule

BOUND = "val/denoising/bits_per_dim"


# --- exact


class Net(nn.Module):
    """A tiny network with statistics that each forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(self.first(x) + t.view(-1, 1, 1, 1)).relu())


def tiny(**changes: object) -> DiffusionModule:
    """A module that trains in no time, with all that a run may have to remember."""
    torch.manual_seed(0)
    arguments: dict = {
        "network": Net(),
        "objective": NoiseMSE(ImportanceTimes(bins=4, history=4)),
        "ema_decay": 0.5,
        "optimizer": partial(torch.optim.Adam, lr=0.005),
        "lr_scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=3, gamma=0.5),
    }
    return build(**{**arguments, **changes})


def five_batches() -> Digits:
    """An epoch of five batches."""
    return Digits(batch_size=256, limit_val=8)


def best(monitor: str = BOUND) -> ModelCheckpoint:
    return ModelCheckpoint(filename="best", monitor=monitor, enable_version_counter=False)


class Points(Logger):
    """What a logger is given."""

    name = version = None

    def __init__(self) -> None:
        super().__init__()
        self.points: list[tuple[str, int, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.points += [(name, step, value) for name, value in metrics.items()]

    def log_hyperparams(self, *_: object) -> None: ...


class SaveEach(Checkpoint):
    """A checkpoint before and after every batch, between accumulated ones, too, and after every validation."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.saved = folder, list[tuple[Path, int]]()

    def _save(self, trainer: pl.Trainer, *_: object) -> None:
        path = self.folder / f"{len(self.saved)}.ckpt"
        trainer.save_checkpoint(path)
        self.saved.append((path, len(trainer.logger.points)))

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = _save

    def on_validation_end(self, trainer: pl.Trainer, *_: object) -> None:
        if not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def all_logged(self) -> list[tuple[Path, int]]:
        """With the numbers of points that were logged after a batch counted to it."""
        following = [number for _, number in self.saved[1:]] + [self.saved[-1][1]]
        return [(path, number) for (path, _), number in zip(self.saved, following, strict=True)]


def everything(path: Path) -> dict[str, object]:
    """A checkpoint without what Lightning does not restore and nothing reads."""
    content = torch.load(path, weights_only=True)
    fit = content["loops"]["fit_loop"]
    for state in content["callbacks"].values():
        state.pop("current_score", None)
    return {**content, "loops": {key: fit[key] for key in fit if not key.startswith("epoch_loop.val_loop")}}


MOMENTS = {
    "accumulated": {"accumulate_grad_batches": 3, "val_check_interval": 2},
    "more_of_them_from_the_second_epoch_on": {"scheduling": {1: 3}, "val_check_interval": 2},
    "validated_at_the_end_of_the_epoch": {},
    "validated_at_the_end_of_the_second_epoch": {"check_val_every_n_epoch": 2},
    "stopped_by_steps_within_an_epoch": {"max_epochs": -1, "max_steps": 8},
}


@pytest.mark.parametrize("name", MOMENTS)
def test_resume_is_exact_from_every_moment(name: str, tmp_path: Path) -> None:
    """Weights, averages, optimiser, counts, states of callbacks and what is logged, to the bit."""
    options = {**MOMENTS[name]}
    scheduling = options.pop("scheduling", None)

    def run(*extra: pl.Callback, ckpt_path: Path | None = None) -> tuple[dict[str, object], list[tuple]]:
        points = Points()
        early = EarlyStopping(BOUND, patience=99)
        callbacks = [early, LearningRateMonitor("step"), best(), *extra]
        callbacks += [GradientAccumulationScheduler({**scheduling})] if scheduling else []
        runner = trainer(tmp_path, *callbacks, logger=points, log_every_n_steps=2, **options)
        runner.fit(tiny(), five_batches(), ckpt_path=ckpt_path)
        runner.save_checkpoint(tmp_path / "end.ckpt")
        return everything(tmp_path / "end.ckpt"), points.points

    save = SaveEach(tmp_path)
    straight, points = run(save)
    assert straight["global_step"] == {"accumulated": 4, "more_of_them_from_the_second_epoch_on": 7}.get(
        name, options.get("max_steps", 10)
    )
    for path, before in save.all_logged()[::3]:
        saved = everything(path)
        if saved["global_step"] == straight["global_step"] and not saved["resume"]["validation_due"]:
            continue  # nothing is left to do
        again, after = run(ckpt_path=path)
        assert differences(straight, again) == [], path.name
        assert {*points[:before], *after} == {*points}, path.name


def test_the_last_checkpoint_knows_the_best_one_whatever_the_order(tmp_path: Path) -> None:
    """And where the run is killed between the two, the validation is done again."""

    class Score(pl.Callback):
        """Each validation is better than the one before, but for the last."""

        def on_validation_epoch_end(self, trainer: pl.Trainer, module: DiffusionModule) -> None:
            module.log("score", float(-trainer.global_step % 20))

    class Killed(LastCheckpoint):
        def on_train_epoch_end(self, trainer: pl.Trainer, *arguments: object) -> None:
            if trainer.current_epoch == 2:
                raise KeyError("killed")
            super().on_train_epoch_end(trainer, *arguments)

    def run(name: str, last: LastCheckpoint, ckpt_path: Path | None = None) -> None:
        runner = trainer(tmp_path / name, last, Score(), best("score"), max_epochs=5)
        runner.fit(tiny(), five_batches(), ckpt_path=ckpt_path)
        assert runner.callbacks[-1] is last

    run("a", LastCheckpoint())
    with pytest.raises(KeyError):
        run("b", Killed())
    last = tmp_path / "b/checkpoints/last.ckpt"
    assert everything(last)["global_step"] == 10 and everything(last.with_name("best.ckpt"))["global_step"] == 15
    run("b", LastCheckpoint(), last)
    for name, step in (("last", 25), ("best", 20)):
        a, b = (without_paths(tmp_path / run / f"checkpoints/{name}.ckpt") for run in "ab")
        assert differences(a, b) == [] and a["global_step"] == step


def without_paths(path: Path) -> dict[str, object]:
    content = everything(path)
    states = [state for key, state in content.pop("callbacks").items() if key.startswith("ModelCheckpoint")]
    return {**content, "scores": [(state["best_model_score"], state["kth_value"]) for state in states]}


def test_a_run_that_is_moved_knows_its_best_score(tmp_path: Path) -> None:
    """As long as the best checkpoint is there, too; a new run that starts from the checkpoint has a best of its own."""
    before = tmp_path / "before"
    first = best()
    trainer(before, LastCheckpoint(), first).fit(tiny(), five_batches())
    score = first.best_model_score
    copytree(before, tmp_path / "copied")
    (tmp_path / "alone/checkpoints").mkdir(parents=True)
    shutil.copy(before / "checkpoints/last.ckpt", tmp_path / "alone/checkpoints/last.ckpt")
    before.rename(tmp_path / "moved")
    for name in ("copied", "moved", "alone"):
        again, folder = best(), tmp_path / name / "checkpoints"
        runner = trainer(tmp_path / name, again, LastCheckpoint(), max_epochs=2)
        runner.fit(tiny(), five_batches(), ckpt_path=folder / "last.ckpt")
        assert again.best_model_score == (None if name == "alone" else score)
        if name != "alone":
            path = str(folder / "best.ckpt")
            assert again.best_k_models == {path: score} and again.kth_best_model_path == path
            assert again.dirpath == str(folder) and again.best_model_path == path


def test_the_best_checkpoint_is_never_newer_than_the_last_one(tmp_path: Path) -> None:
    """However seldom the last one is asked for besides."""
    callbacks = [LastCheckpoint(every_n_train_steps=1000), best()]
    trainer(tmp_path, *callbacks, max_epochs=1).fit(tiny(), five_batches())
    last = tmp_path / "checkpoints/last.ckpt"
    seen: list[tuple[int, int]] = []

    class Look(pl.Callback):
        def on_train_batch_start(self, *_: object) -> None:
            steps = [everything(last.with_name(f"{name}.ckpt"))["global_step"] for name in ("best", "last")]
            seen.append((steps[0], steps[1]))

    again = trainer(tmp_path, Look(), *callbacks, max_epochs=4, val_check_interval=2)
    again.fit(tiny(), five_batches(), ckpt_path=last)
    assert len(seen) == 15 and all(best_step <= last_step for best_step, last_step in seen)
    assert seen[-1][1] == 19


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
    runner.fit(tiny(), Digits(limit_val=8), ckpt_path=ckpt_path)
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
    assert straight["epoch"] == broken["epoch"] == 4 and straight["global_step"] == 40
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


@pytest.mark.parametrize("batch", [5, 7])
def test_a_validation_that_a_signal_comes_before_is_done_on_resuming(batch: int, tmp_path: Path) -> None:
    """The signal comes in the last step before a validation: of the epoch, and within it."""
    options = {"max_epochs": 3, "val_check_interval": 2 if batch == 7 else 1.0}
    for name, signals in (("a", []), ("b", [Raise(signal.SIGTERM, batch)])):
        runner = trainer(tmp_path / name, *signals, LastCheckpoint(), best(), **options)
        with nullcontext() if name == "a" else pytest.raises(SystemExit):
            runner.fit(tiny(), five_batches())
    last = tmp_path / "b/checkpoints/last.ckpt"
    assert everything(last)["global_step"] == batch
    seen = Validations(tmp_path)
    runner = trainer(tmp_path / "b", seen, LastCheckpoint(), best(), **options)
    runner.fit(tiny(), five_batches(), ckpt_path=last)
    assert seen.steps[0] == batch
    for name in ("last", "best"):
        a, b = (without_paths(tmp_path / run / f"checkpoints/{name}.ckpt") for run in "ab")
        assert differences(a, b) == []


# --- the end of training


def test_a_schedule_that_is_shorter_than_training_is_refused_or_ends_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = {"lr_scheduler": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=7)}
    words = (
        r"--model.lr_scheduler.total_steps 7 is less than the 10 steps of training: make it 10, "
        r"or set --trainer.max_steps 7"
    )
    for steps in ({"max_epochs": 2}, {"max_epochs": -1, "max_steps": 10}):
        with pytest.raises(InputError, match=words):
            trainer(tmp_path, LastCheckpoint(), **steps).fit(tiny(**module), five_batches())
    trainer(tmp_path / "fits", LastCheckpoint(), max_epochs=-1, max_steps=7).fit(tiny(**module), five_batches())
    last = tmp_path / "open/checkpoints/last.ckpt"
    assert capsys.readouterr().out == ""
    trainer(tmp_path / "short", LastCheckpoint(), max_epochs=-1, max_steps=5).fit(tiny(**module), five_batches())
    assert "training has 5 steps, and --model.lr_scheduler.total_steps is 7" in capsys.readouterr().out
    for ckpt_path in (None, last):
        runner = trainer(tmp_path / "open", LastCheckpoint(), max_epochs=None, max_time="00:01:00:00")
        runner.fit(tiny(**module), five_batches(), ckpt_path=ckpt_path)
        assert capsys.readouterr().out == "training ends at step 7, with --model.lr_scheduler.total_steps\n"
        assert everything(last)["global_step"] == 7


def test_a_run_with_nothing_left_to_train_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    last = tmp_path / "checkpoints/last.ckpt"
    trainer(tmp_path, LastCheckpoint(), max_epochs=1).fit(tiny(), five_batches())
    content = last.read_bytes()
    capsys.readouterr()
    for limit, line in (
        ({"max_epochs": 1}, "epoch 1 of 1, step 5"),
        ({"max_epochs": -1, "max_steps": 5}, "step 5 of 5"),
        ({"max_epochs": -1, "max_steps": 3}, "step 5 of 3"),
    ):
        trainer(tmp_path, LastCheckpoint(), **limit).fit(tiny(), five_batches(), ckpt_path=last)
        assert capsys.readouterr().out == f"nothing left to train: {line}\n"
    assert last.read_bytes() == content


def test_a_time_that_is_used_up_is_an_error_on_resuming(tmp_path: Path) -> None:
    """Steps and epochs without a limit."""
    last = tmp_path / "checkpoints/last.ckpt"
    options = {"max_epochs": None, "limit_val_batches": 0}
    trainer(tmp_path, LastCheckpoint(), max_time=timedelta(seconds=0.5), **options).fit(tiny(), five_batches())
    step = everything(last)["global_step"]
    again = trainer(tmp_path, LastCheckpoint(), max_time=timedelta(seconds=0.5), **options)
    words = r"--trainer\.max_time 0:00:00\.5\d* is used up \(0:00:\d\d trained\): give a longer one"
    with pytest.raises(InputError, match=words):
        again.fit(tiny(), five_batches(), ckpt_path=last)
    assert everything(last)["global_step"] == step > 0


# --- whole


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
    with pytest.raises(InputError, match=r"hyper_parameters.* refused"):
        DiffusionModule.load_from_checkpoint(tmp_path / "foreign.ckpt")
    assert not (tmp_path / "proof").exists()


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
    callbacks = [StopOnNonFinite(), Spoil(9), LastCheckpoint(every_n_train_steps=4)]
    last = tmp_path / "checkpoints/last.ckpt"
    words = rf"the loss is nan at step 10, for times from 0\.\d+ to 0\.\d+ of 1; the last good checkpoint is {last}"
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
    run = Run(tmp_path)
    with run.lock(), pytest.raises(InputError, match=words), run.lock():
        pass
    with run.lock():
        pass
    if (child := os.fork()) == 0:
        with run.lock():
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with run.lock():
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()
