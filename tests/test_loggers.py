"""Pictures, tables and options in the files of real loggers, read back as their own tools read them."""

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import build, refused, run_trainer
from conftest import run_ddpm
from jsonargparse import Namespace
from lightning.pytorch.loggers.logger import DummyLogger, Logger
from PIL import Image

from ddpm_lightning.callbacks import SampleGrid
from ddpm_lightning.callbacks.publishing import publish_picture, publish_text
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.loggers import in_run

FEW = ["--data.limit_val=20", "--data.eval_batch_size=20"]


def _fitted(tiny: list[str], folder: Path, loggers: str) -> Path:
    """The run of a training of two steps, validated: a picture of samples, and the table of the bound."""
    run = folder / "run"
    run_ddpm("fit", *tiny, *FEW, f"--run_dir={run}", "--trainer.max_steps=2", f"--trainer.logger={loggers}")
    run_ddpm("validate", str(run))
    return run


def _same(picture: Any, run: Path) -> bool:
    """Whether a picture that a logger has kept is the run's own."""
    return np.array_equal(np.asarray(picture.convert("RGB")), np.asarray(Image.open(run / "samples/step_0000002.png")))


@pytest.mark.cli
def test_tensorboard_and_csv_at_once(tiny: list[str], tmp_path: Path) -> None:
    from io import BytesIO

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = tmp_path / "board", tmp_path / "table"
    loggers = [
        {"class_path": "TensorBoardLogger", "init_args": {"save_dir": str(board), "name": "", "version": ""}},
        {"class_path": "CSVLogger", "init_args": {"save_dir": str(table), "name": "", "version": ""}},
    ]
    run = _fitted(tiny, tmp_path, json.dumps(loggers))
    events = EventAccumulator(str(board)).Reload()
    assert _same(Image.open(BytesIO(events.Images("samples")[0].encoded_image_string)), run)
    text = events.Tensors("val/bound/text_summary")[0].tensor_proto.string_val[0].decode()
    assert [line[4:] for line in text.splitlines()] == (run / "bound-val.txt").read_text().splitlines()
    # CSVLogger has numbers and options, and the pictures and tables are files of the run
    assert "val/denoising/bits_per_dim" in (table / "metrics.csv").read_text()
    assert {"schedule.png", "forward.png", "bound-val.png", "bound-val.txt"} <= {path.name for path in run.iterdir()}


@pytest.mark.cli
def test_weights_and_biases_offline(tiny: list[str], tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'ddpm-lightning[loggers]'")
    run = _fitted(tiny, tmp_path, '{"class_path": "WandbLogger", "init_args": {"offline": true}}')
    files = {path.name: path for path in (run / "wandb").glob("offline-run-*/files/media/**/*.*")}
    samples = [path for name, path in files.items() if name.startswith("samples_")]
    assert len(samples) == 1 and _same(Image.open(samples[0]), run)
    tables = [json.loads(path.read_text()) for path in files.values() if path.name.endswith(".table.json")]
    assert [(run / "bound-val.txt").read_text().rstrip("\n")] in [row for table in tables for row in table["data"]]


@pytest.mark.cli
def test_mlflow_in_sqlite(tiny: list[str], tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'ddpm-lightning[loggers]'")
    run = _fitted(tiny, tmp_path, "MLFlowLogger")
    client = mlflow.MlflowClient(f"sqlite:///{run}/mlflow.db")
    experiment = client.get_experiment_by_name("lightning_logs")
    validated, fitted = client.search_runs([experiment.experiment_id])  # the newest first
    assert fitted.data.params["model.schedule"] == "CosineChain" and "train/loss" not in validated.data.metrics
    assert _same(mlflow.artifacts.load_image(f"{fitted.info.artifact_uri}/samples/0000002.png"), run)
    text = mlflow.artifacts.load_text(f"{validated.info.artifact_uri}/val/bound.txt")
    assert text == (run / "bound-val.txt").read_text().rstrip("\n")


class Unknown(DummyLogger):
    """Nobody knows it: it has methods of other signatures, or none."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


class Failing(Unknown):
    def log_image(self, name: str) -> None:
        raise AssertionError("never called with one name")


@pytest.mark.parametrize(("logger", "words"), [(Unknown(), "has no log_image"), (Failing(), "TypeError")])
def test_a_logger_nobody_knows_is_one_warning_and_training_goes_on(logger: Logger, words: str, tmp_path: Path) -> None:
    trainer = run_trainer(tmp_path, SampleGrid(n=1, steps=2), logger=logger, max_steps=2)
    with pytest.warns(UserWarning) as warned:
        trainer.fit(build(), Digits(batch_size=16, eval_batch_size=20, limit_val=20))
        publish_picture(trainer, "again", torch.zeros(3, 4, 4, dtype=torch.uint8), "again.png")
        publish_text(trainer, "text", "a table")
    named = [str(each.message) for each in warned if type(logger).__name__ in str(each.message)]
    assert len(named) == 1 and words in named[0] and str(tmp_path) in named[0]
    assert trainer.global_step == 2 and (tmp_path / "samples/step_0000002.png").is_file()


def _part(name: str, **arguments: Any) -> Namespace:
    return Namespace(class_path=f"lightning.pytorch.loggers.{name}", init_args=Namespace(**arguments))


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_files_are_in_the_run_where_nothing_else_is_said(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lightning.loggers.find_spec", lambda name: name)
    flow = {"tracking_uri": None, "save_dir": "./mlruns", "artifact_location": None}
    here = _part("WandbLogger", save_dir=".", dir=None) if package == "wandb" else _part("MLFlowLogger", **flow)
    there = _part("WandbLogger", save_dir="mine", dir=None)
    before = here.clone(), there.clone()
    trainer = Namespace(logger=[here, there, None], fast_dev_run=False)
    with in_run(trainer, tmp_path):
        assert str(tmp_path) in str(here) and there == before[1]
    assert (here, there) == before
    trainer.fast_dev_run = True
    with in_run(trainer, tmp_path):
        assert trainer.logger is None
    assert trainer.logger == [here, there, None]
    monkeypatch.setattr("ddpm_lightning.loggers.find_spec", lambda name: None)
    with (
        pytest.raises(InputError, match=rf"package {package}: pip install 'ddpm-lightning\[loggers\]'"),
        in_run(trainer, tmp_path),
    ):
        pass


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_package_is_one_sentence(tiny: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = refused(capsys, "fit", *tiny, f"--run_dir={tmp_path}/run", "--trainer.logger=WandbLogger")
    assert message.count("\n") == 1 and "--trainer.logger WandbLogger needs the package wandb: pip install" in message
