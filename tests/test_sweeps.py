"""Sweeps: what is refused before anything is trained, and one sweep from end to end."""

import csv
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import refused, weights
from conftest import run_ddpm
from PIL import Image

from ddpm_lightning.cli import main
from ddpm_lightning.errors import InputError
from ddpm_lightning.sweeps.command import split_words
from ddpm_lightning.sweeps.definition import Definition
from ddpm_lightning.sweeps.space import Range, Values
from ddpm_lightning.sweeps.trial import Target

TINY = """
extends: digits.yaml
trainer:
  max_steps: 4
  val_check_interval: 2
  check_val_every_n_epoch: 1
  callbacks:
    - class_path: ddpm_lightning.callbacks.LastCheckpoint
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {filename: best, monitor: val/denoising/bits_per_dim, enable_version_counter: false}
data: {init_args: {batch_size: 16, limit_val: 16}}
model:
  network: {class_path: ddpm_lightning.networks.UNet, init_args: {width: 8, multipliers: [1], blocks: 1}}
  schedule: {class_path: ddpm_lightning.schedules.CosineChain, init_args: {T: 5}}
"""
SPACE = "{model.optimizer.lr: {low: 1.0e-4, high: 1.0e-1, log: true}, model.schedule: [CosineChain, LinearChain]}"


def _file(folder: Path, text: str, name: str = "lr.yaml") -> Path:
    (folder / "tiny.yaml").write_text(TINY)
    (folder / name).write_text(text)
    return folder / name


def _sweep(folder: Path, space: str = SPACE, **more: Any) -> Path:
    lines = "".join(f"{key}: {value}\n" for key, value in more.items())
    return _file(folder, f"config: tiny.yaml\nrun_dir: {folder}/sweep\n{lines}space: {space}\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("space: {a: [1]}", "it has no config"),
        ("config: tiny.yaml", "space must map options to values"),
        ("config: tiny.yaml\nspace: {}", "space must map options to values"),
        ("config: tiny.yaml\nspace: [a]", "space must map options to values"),
        ("config: tiny.yaml\nspase: {a: [1]}", "a sweep has no key spase: did you mean space?"),
        ("config: nowhere.yaml\nspace: {a: [1]}", "nowhere.yaml cannot be read"),
        ("config: 3\nspace: {a: [1]}", "config must name files"),
        ("config: tiny.yaml\nspace: {a: 3}", "a must be a list of values or a range"),
        ("config: tiny.yaml\nspace: {a: []}", "a has no values"),
        ("config: tiny.yaml\nspace: {a: [1, 1]}", "a: a value is there twice"),
        ("config: tiny.yaml\nspace: {a: [.nan]}", "a: nan must be a finite number"),
        ("config: tiny.yaml\nspace: {--a: [1]}", "write the name of an option without dashes"),
        ("config: tiny.yaml\nspace: {run_dir: [a]}", "run_dir is the sweep's own affair"),
        ("config: tiny.yaml\noptions: --dry_run\nspace: {a: [1]}", "dry_run is the sweep's own affair"),
        ("config: tiny.yaml\noptions: --ckpt_path last\nspace: {a: [1]}", "ckpt_path is the sweep's own affair"),
        ("config: tiny.yaml\nspace: {m.n.k: [1], m.n.init_args.k: [2]}", "m.n.init_args.k is there twice"),
        ("config: tiny.yaml\nspace: {a: {low: 1}}", "a: a range needs high"),
        ("config: tiny.yaml\nspace: {a: {low: 1, hihg: 2}}", "not hihg: did you mean high?"),
        ("config: tiny.yaml\nspace: {a: {low: 2, high: 1}}", "a: low = 2 must be below high = 1"),
        ("config: tiny.yaml\nspace: {a: {low: x, high: 1}}", "a: low must be a finite number, not 'x'"),
        ("config: tiny.yaml\nspace: {a: {low: 0, high: 1, log: true}}", "a: low = 0 must be positive"),
        ("config: tiny.yaml\nspace: {a: {low: 1, high: 2, log: maybe}}", "a: log must be true or false"),
        ("config: tiny.yaml\nspace: {a: {low: 1, high: 2, step: 0}}", "a: step = 0 must be positive"),
        ("config: tiny.yaml\nspace: {a: {low: 1, high: 4, step: 2}}", "a whole number of steps of 2"),
        ("config: tiny.yaml\nspace: {a: {low: 1, high: 4, step: 1, log: true}}", "step = 1 goes with no log"),
        ("config: tiny.yaml\nsampler: best\nspace: {a: [1]}", "sampler: best must be one of tpe, random, grid"),
        (
            "config: tiny.yaml\nsampler: grid\nspace: {a: {low: 0, high: 2000000000}}",
            "2,000,000,001 points is too large",
        ),
        (
            "config: tiny.yaml\noptions: --a.init_args.b 1\nspace: {a.b: [1, 2]}",
            "--a.init_args.b is given for all trials",
        ),
        ("config: tiny.yaml\nsampler: grid\nspace: {a: {low: 1.0, high: 2.0}}", "a: a grid needs a list of values"),
        ("config: tiny.yaml\ntrials: many\nspace: {a: [1]}", "trials: many must be a whole number, 1 or more"),
        ("config: tiny.yaml\nprune_after: 0\nspace: {a: [1]}", "prune_after: 0 must be a whole number"),
    ],
)
def test_a_bad_file_is_one_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(sentence)) as said:
        Definition.read(_file(tmp_path, text), [])
    assert "\n" not in str(said.value)


def test_a_file_is_kept_as_it_is_read(tmp_path: Path) -> None:
    space = (
        "{m.s.T: {low: 1, high: 9, step: 2}, m.s: [A, b c], m.x: [null, true, 1.5, [1, 2]], m.lr: {low: 1, high: 2.5}}"
    )
    file = _file(tmp_path, f"config: tiny.yaml\noptions: --trainer.max_steps 20\nspace: {space}\n")
    asked = Definition.read(file, ["-c", str(tmp_path / "tiny.yaml"), "--data.seed=3"], tmp_path / "new")
    # a class comes before its arguments, and a list is text
    assert [*asked.space][-1] == "m.s.T" and asked.space["m.s.T"] == Range(1, 9, False, 2)
    assert asked.space["m.x"] == Values((None, True, 1.5, "[1, 2]")) and asked.space["m.lr"] == Range(1.0, 2.5)
    assert asked.options == ("--trainer.max_steps", "20", "--data.seed=3") and len(asked.configs) == 2
    asked.save()
    kept = Definition.read(tmp_path / "new/definition.yaml", [], tmp_path / "new")
    assert kept == asked and kept.differs(asked) is None
    other = Definition.read(file, [], tmp_path / "new")
    assert other.differs(asked) == "configs"
    words = asked.command({"m.s": "b c", "m.x": None, "m.lr": 0.5}, "runs/best", "F")
    assert words[:5] == ["fit", "-c", "F/base.yaml", "-c", "F/base1.yaml"]
    assert words[-8:] == ["--m.s", "b c", "--m.x", "null", "--m.lr", "0.5", "--run_dir", "runs/best"]


def test_words_of_a_sweep_and_of_fit() -> None:
    words = ["s.yaml", "--data.seed", "3", "--workers", "2", "-c", "a.yaml", "--trials=4"]
    assert split_words(words) == (["s.yaml", "--workers", "2", "--trials=4"], ["--data.seed", "3", "-c", "a.yaml"])
    assert split_words(["--workers", "2"]) == (["--workers", "2"], [])


def test_min_and_max() -> None:
    low, high = Target("a", "min"), Target("a", "max")
    assert low.better(1, 2) and not high.better(1, 2) and low.better(1, None) and high.direction == "maximize"


optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install 'ddpm-lightning[sweep]'")


def _rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "trials.csv").open()))


@pytest.mark.cli
def test_a_sweep_from_end_to_end(tmp_path: Path) -> None:
    """A worker dies in the middle of a trial, another goes on with it, and the best one can be trained again."""
    from ddpm_lightning.sweeps.study import Trials, folder_of

    file, folder = _sweep(tmp_path, trials=2), tmp_path / "sweep"
    output = run_ddpm("sweep", str(file), "--trials=1")
    assert "1 complete" in output and [row["state"] for row in _rows(folder)] == ["complete"]
    # what a worker leaves that was killed in the middle of a trial: a run, values, and no lock
    definition = Definition.read(folder / "definition.yaml", [], folder)
    dead = Trials(definition).claim(2)
    assert dead is not None and dead.number == 1 and Trials(definition).claim(2) is None  # it is locked
    run_ddpm(*definition.trial(dead.values, folder_of(folder, 1), folder), "--trainer.max_steps=2")
    dead.trial.report(9.0, 1)
    dead.trial.set_user_attr("steps", {"1": 2})
    dead.trial.set_user_attr("best", 9.0)
    dead.lock.close()
    output = run_ddpm("sweep", str(file))
    assert "trial 1 goes on" in output and "2 complete" in output
    refusal = run_ddpm("fit", "-c", str(tmp_path / "tiny.yaml"), "--run_dir", str(folder), expect=2)
    assert "is the folder of a sweep: give another one to a run" in refusal
    rows = _rows(folder)
    assert [(row["trial"], row["state"], row["validations"], row["step"]) for row in rows] == [
        ("0", "complete", "2", "4"),
        ("1", "complete", "2", "4"),
    ]
    values = [float(row["val/denoising/bits_per_dim"]) for row in rows]
    assert all(0 < value < 9 for value in values) and Image.open(folder / "trials.png").size[0] > 600
    # HPARAMS, read back
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    for row, value in zip(rows, values, strict=True):
        events = EventAccumulator(str(folder / "hparams" / row["folder"])).Reload()
        content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
        options = HParamsPluginData.FromString(content).session_start_info.hparams
        assert options["model.schedule"].string_value == row["model.schedule"]
        assert options["model.optimizer.lr"].number_value == float(row["model.optimizer.lr"])
        assert events.Scalars("val/denoising/bits_per_dim")[0].value == pytest.approx(value)
    # the command line that is shown trains the best trial again, to the bit
    best = min(range(2), key=values.__getitem__)
    shown = shlex.split(output.splitlines()[-1].replace("runs/best", str(tmp_path / "best")))
    run_ddpm(*shown[1:])
    again, trial = (weights(each / "checkpoints/last.ckpt") for each in (tmp_path / "best", folder_of(folder, best)))
    assert all(torch.equal(again[name], trial[name]) for name in trial)
    # nothing is done twice, and another sweep does not get in
    assert "trial 1" not in run_ddpm("sweep", str(folder)).partition("complete;")[0].replace("best: ", "")
    file.write_text(file.read_text().replace("1.0e-1", "1.0e-2"))
    assert "already holds a sweep whose space is another" in run_ddpm("sweep", str(file), expect=2)
    assert "keeps its options" in run_ddpm("sweep", str(folder), "--data.seed=3", expect=2)


@pytest.mark.cli
@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ("{model.optimzer.lr: [1.0e-3]}", "there is no option --model.optimzer.lr"),
        ("{model.schedule: [CosineChain, LinearGama]}", "--model.schedule LinearGama: there is no such class"),
        ("{model.network.width: {low: 0, high: 8}}", "tried: --model.network.width 0"),
        ("{model.optimizer.lr: {low: -1.0, high: 1.0}}", "--model.optimizer cannot be made"),
    ],
)
def test_an_option_that_does_not_fit_is_refused_before_any_trial(
    space: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = refused(capsys, "sweep", str(_sweep(tmp_path, space)))
    assert sentence in message and "Traceback" not in message and not (tmp_path / "sweep").exists()


@pytest.mark.cli
def test_trials_that_fail_are_named_and_stop_the_sweep_if_all_do(tmp_path: Path) -> None:
    file = _sweep(tmp_path, "{model.optimizer.lr: {low: 1.0e+30, high: 3.0e+30, step: 1.0e+30}}", sampler="grid")
    output = run_ddpm("sweep", str(file), expect=1)
    assert (
        output.count("failed: val/denoising/bits_per_dim is nan at step 2") == 3
        and "all 3 trials failed in the same way" in output
    )
    assert [row["state"] for row in _rows(tmp_path / "sweep")] == ["failed"] * 3
    assert len({row["model.optimizer.lr"] for row in _rows(tmp_path / "sweep")}) == 3


def test_a_trial_that_kills_its_worker_again_and_again_fails(tmp_path: Path) -> None:
    from ddpm_lightning.sweeps.study import Trials

    definition = Definition.read(_sweep(tmp_path, "{a: [1, 2]}"), [])
    definition.run_dir.mkdir()
    trials = Trials(definition, "minimize")
    for k in range(5):
        claim = trials.claim(2)
        assert claim is not None and (claim.number, claim.is_new) == ((0, k == 0) if k < 4 else (1, True))
        claim.lock.close()
    assert [each.state.name for each in trials.all()] == ["FAIL", "RUNNING"]
    assert "killed 4 times" in trials.all()[0].user_attrs["reason"]


def test_a_trial_without_prospects_is_pruned_but_not_at_its_end(tmp_path: Path) -> None:
    """By real trainings: the fourth is made worse than the median of three."""
    from builders import build, run_trainer

    from ddpm_lightning.data import Digits
    from ddpm_lightning.sweeps.study import Trials
    from ddpm_lightning.sweeps.trial import Watch

    definition = Definition.read(_sweep(tmp_path, "{a: {low: 0.0, high: 1.0}}", prune_after=3), [])
    definition.run_dir.mkdir()
    trials = Trials(definition, "minimize")
    for value in (1.0, 2.0, 3.0):
        claim = trials.claim(9)
        assert claim is not None
        claim.trial.report(value, 1)
        trials.study.tell(claim.trial, value)
    for steps, pruned in ((4, True), (2, False)):  # with two steps, the first validation is the end
        claim = trials.claim(9)
        assert claim is not None
        watch = Watch(claim.trial, Target("val/denoising/bits_per_dim", "min"), print)
        options = {"max_steps": steps, "val_check_interval": 2, "enable_checkpointing": False}
        trainer = run_trainer(tmp_path / "run", watch, **options)
        trainer.fit(build(), Digits(batch_size=16, eval_batch_size=20, limit_val=20))
        assert (watch.pruned, trainer.global_step) == (pruned, 2) and watch.best is not None and watch.best > 2


def test_workers_share_cores_and_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddpm_lightning.sweeps.worker import _environment

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    shares = [_environment(number, 3) for number in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in shares] == ["3", "5", "3"]
    assert {each["OMP_NUM_THREADS"] for each in shares} == {"2"}


def test_help_is_of_the_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "--workers" in text and "trial_007" in text
