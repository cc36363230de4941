"""What is logged of a training beside its loss, and to which loggers: quantities by themselves, nothing of the training
changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from builders import build, equal, run_trainer, state
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger
from PIL import Image

from ddpm_lightning.callbacks import CostByTime, ForwardStrip, GradientNorm, LossByTime, RunOptions
from ddpm_lightning.callbacks.publishing import publish_options, publish_picture, publish_text
from ddpm_lightning.data import Digits
from ddpm_lightning.errors import InputError
from ddpm_lightning.figures import CostCurve, cost_curves, forward_strip
from ddpm_lightning.objectives import (
    ContinuousElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    NegativeElbo,
    StratifiedTimes,
    TrajectoryElbo,
)
from ddpm_lightning.process import ForwardProcess
from ddpm_lightning.schedules import CosineGamma, LinearChain


class Kept(Logger):
    """What it was given; pictures as Lightning's WandbLogger takes them."""

    name = version = "kept"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.pictures: list[tuple[str, int]] = []
        self.options: dict[str, Any] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step or 0, dict(metrics)))

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.options |= params

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:
        assert all(image.ndim == 3 and image.shape[2] == 3 and image.dtype == "uint8" for image in images)
        self.pictures.append((key, step or 0))

    def all(self, name: str) -> dict[int, float]:
        return {step: metrics[name] for step, metrics in self.metrics if name in metrics}


class Gradients(Callback):
    """The norm of each step's gradient, by another way."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        gradients = [p.grad.flatten() for p in pl_module.model.parameters() if p.grad is not None]
        self.norms.append(float(torch.cat(gradients).norm()))


def test_quantities_are_right_and_training_is_the_same(tmp_path: Path) -> None:
    """The gradient's norm is the one before clipping; the parts of the loss make up the loss."""
    runs = {}
    for name in ("with", "without"):
        logger, gradients = Kept(), Gradients()
        more = [GradientNorm(), LossByTime(), CostByTime(), RunOptions(), ForwardStrip(2)] if name == "with" else []
        options = {"max_steps": 4, "max_epochs": -1, "log_every_n_steps": 2, "gradient_clip_val": 0.01}
        trainer = run_trainer(tmp_path / name, *more, gradients, logger=logger, val_check_interval=2, **options)
        module = build()
        trainer.fit(module, datamodule=Digits(batch_size=32))
        runs[name] = module, logger, gradients
    assert equal(state(runs["with"][0]), state(runs["without"][0]))
    module, logger, gradients = runs["with"]
    assert logger.all("train/grad_norm") == pytest.approx({1: gradients.norms[1], 3: gradients.norms[3]}, rel=1e-5)
    parts = [logger.all(f"train/loss_at_t_{a}") for a in ("0.00-0.25", "0.25-0.50", "0.50-0.75", "0.75-1.00")]
    assert all(set(part) == {1, 3} for part in parts)
    position, loss = module.objective.by_time
    counts = (position * 4).long().bincount(minlength=4)
    mean = sum(float(count) * part[3] for count, part in zip(counts, parts, strict=True)) / 32
    assert mean == pytest.approx(float(loss.mean()), rel=1e-5)
    assert mean == pytest.approx(logger.all("train/loss")[3], rel=1e-5)
    assert logger.pictures == [("forward process", 0), ("val/cost by time", 2), ("val/cost by time", 4)]
    assert logger.options["model.schedule"] == "LinearChain" and logger.options["model.schedule.T"] == 10
    assert logger.options["trainer.gradient_clip_val"] == 0.01


def test_the_loss_by_time_of_objectives(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bins = 0"):
        LossByTime(0)
    objectives = {ContinuousNegativeElbo(StratifiedTimes()): True, NegativeElbo(DenoisingElbo(2)): False}
    for objective, logged in objectives.items():
        logger = Kept()
        trainer = run_trainer(tmp_path, LossByTime(2), logger=logger, max_steps=1, max_epochs=-1, log_every_n_steps=1)
        trainer.fit(build(objective=objective, schedule=CosineGamma(T=10)), datamodule=Digits(batch_size=32))
        assert bool(logger.all("train/loss_at_t_0.00-0.50")) is logged


def test_costs_of_the_steps_add_up_to_the_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every form whose steps have costs of their own, in its own chain, and in continuous time."""
    drawn: dict[str, CostCurve] = {}

    def keep(curves: dict[str, CostCurve]) -> torch.Tensor:
        drawn.update(curves)
        return cost_curves(curves)

    monkeypatch.setattr("ddpm_lightning.callbacks.diagnostics.cost_curves", keep)
    forms = [DenoisingElbo(T=7), TrajectoryElbo(), ContinuousElbo(5)]
    module = build(test_bounds=forms, schedule=CosineGamma(T=10))
    logger, data = Kept(), Digits(limit_test=60, eval_batch_size=40)
    run_trainer(tmp_path, CostByTime(), logger=logger).test(module, datamodule=data)
    assert set(drawn) == {"denoising", "continuous"} and logger.pictures == [("test/cost by time", 0)]
    for form, name in (("denoising", "denoising_matching"), ("continuous", "diffusion")):
        curve, score = drawn[form], module.bound_scores["test"][form][name]
        assert float(curve.costs.sum()) == pytest.approx(score.in_bits(module.dims).mean, rel=1e-6)
        assert len(curve.edges) == len(curve.costs) + 1 and float(curve.edges[-1]) == 1
    assert len(drawn["denoising"].costs) == 6 and len(drawn["continuous"].costs) == 5
    assert Image.open(tmp_path / "bound-test.png").size[0] > 600


def test_a_cost_curve_has_gaps_where_no_image_was() -> None:
    costs = torch.full((100,), 0.1, dtype=torch.float64)
    costs[::2] = torch.nan
    edges = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert cost_curves({"a": CostCurve(edges, costs)}).float().std() > 5
    assert cost_curves({"a": CostCurve(edges[:2], costs[:1])}).shape[0] == 3


@pytest.mark.parametrize("size", [8, 28, 64])
def test_a_forward_strip_is_labelled_below_its_columns(size: int) -> None:
    process, times = ForwardProcess(LinearChain(20)), torch.tensor([0.05, 0.5, 1.0], dtype=torch.float64)
    strip = forward_strip(process, torch.ones(2, 1, size, size), times, torch.Generator().manual_seed(0))
    cell = max(1, 32 // size) * size + 2
    pictures, labels = strip[:, : 2 * cell + 2, -(4 * cell + 2) :], strip[:, 2 * cell + 2 :]
    assert bool((pictures[:, 2 : size + 2, 2 : size + 2] == 255).all())
    assert labels.shape[1] > 16 and bool((labels == 255).any())
    for column in labels[..., -(4 * cell) :].split(cell, 2):
        assert int(column.min()) < 128  # a text
        assert bool((column[..., 0] == 255).all())  # that does not touch its neighbour's


# ---------------------------------------------------------------- loggers


class Client:
    """MLflow's, as far as it is needed."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def log_image(self, run_id: str, image: Any, artifact_file: str | None = None) -> None:
        assert image.shape[2] == 3
        self.files[str(artifact_file)] = run_id

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        self.files[artifact_file] = text


class Flow(MLFlowLogger):
    """Lightning's, with another client."""

    run_id = "7"

    def __init__(self) -> None:
        self.client = Client()

    @property
    def experiment(self) -> Client:  # type: ignore[override]
        return self.client

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.client.files["options"] = params


def test_each_logger_gets_what_it_takes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board, table = TensorBoardLogger(tmp_path, name="board", version=""), CSVLogger(tmp_path, name="csv", version="")
    kept, flow = Kept(), Flow()
    trainer = run_trainer(tmp_path, logger=[board, table, kept, flow])
    publish_picture(trainer, "a picture", torch.zeros(3, 4, 5, dtype=torch.uint8), "deep/a.png", step=9)
    publish_text(trainer, "configuration", "a: 1\n# b")
    publish_options(trainer, {"lr": 0.1, "model": "UNet", "multipliers": [1, 2]}, ["val/elbo", "test/elbo"])
    assert Image.open(tmp_path / "deep" / "a.png").size == (5, 4)
    assert kept.pictures == [("a picture", 9)] and kept.options["lr"] == table.experiment.hparams["lr"] == 0.1
    assert set(flow.client.files) == {"a picture/0000009.png", "configuration.txt", "options"}
    board.save()
    events = EventAccumulator(str(tmp_path / "board")).Reload()
    tags = events.Tags()
    assert tags["images"] == ["a picture"] and events.Images("a picture")[0].step == 9 and not tags["scalars"]
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text == "    a: 1\n    # b\n"
    assert any(name.startswith("_hparams_") for name in events.summary_metadata)


@pytest.mark.cli
def test_a_run_says_what_it_is_and_its_errors_have_cards_of_their_own(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventAccumulator(str(trained)).Reload()
    text = events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()
    shown = yaml.safe_load("\n".join(line[4:] for line in text.splitlines()))
    assert shown["model"]["schedule"]["init_args"]["T"] == 12
    content = {
        name.rpartition("/")[2]: HParamsPluginData.FromString(metadata.plugin_data.content)
        for name, metadata in events.summary_metadata.items()
        if name.startswith("_hparams_")
    }
    options = content["session_start_info"].session_start_info.hparams
    assert options["model.schedule"].string_value == "CosineChain"
    assert options["model.schedule.T"].number_value == 12 and "data.batch_size" in options
    metrics = {info.name.tag for info in content["experiment"].experiment.metric_infos}
    forms = ("denoising", "consistency", "trajectory")
    assert metrics == {"val/denoising/bits_per_dim", *(f"test/{form}/bits_per_dim" for form in forms)}
    assert (trained / "bound-val.png").is_file()
