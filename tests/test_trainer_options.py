"""Options of Lightning's Trainer, on the command line."""

import io
from pathlib import Path

import pytest
from builders import BuiltOnly, build, own_data, run_trainer
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar
from mnist_files import write_mnist
from processes import ROOT, run_ddpm

from ddpm_lightning.callbacks import LatticeObservables, SampleGrid
from ddpm_lightning.data import Batch, Digits
from ddpm_lightning.trainer import DiffusionTrainer

TQDM = "--trainer.callbacks+=lightning.pytorch.callbacks.TQDMProgressBar"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _bars(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, terminal: bool, *options: str) -> list[type]:
    if terminal:
        monkeypatch.setattr("sys.stdout", _Terminal())
    cli = BuiltOnly(["fit", "-c", "configs/digits.yaml", f"--run_dir={tmp_path}", *options])
    return [type(callback) for callback in cli.trainer.callbacks if isinstance(callback, ProgressBar)]


def test_a_whole_number_of_batches_may_be_written_as_a_float(tmp_path: Path) -> None:
    options = {"limit_train_batches": 2.0, "limit_val_batches": 0.5, "limit_test_batches": 1.0}
    trainer = DiffusionTrainer(default_root_dir=tmp_path, logger=False, accelerator="cpu", **options)
    assert [getattr(trainer, name) for name in options] == [2, 0.5, 1.0] and type(trainer.limit_train_batches) is int


@pytest.mark.parametrize(
    ("terminal", "options", "bars"),
    [
        (True, [], [RichProgressBar]),
        (True, ["--trainer.enable_progress_bar=false"], []),
        (True, [TQDM], [TQDMProgressBar]),
        (True, [TQDM, "--trainer.enable_progress_bar=false"], []),
        (True, ["--trainer.barebones=true"], []),
        (False, [], []),
        (False, [TQDM], [TQDMProgressBar]),
        (False, ["--trainer.enable_progress_bar=true"], [TQDMProgressBar]),
    ],
)
def test_progress_bars_are_those_that_are_asked_for(
    terminal: bool, options: list[str], bars: list[type], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert _bars(monkeypatch, tmp_path, terminal, *options) == bars


OPTIONS = {
    "nothing is kept": "enable_checkpointing=false logger=false enable_model_summary=true precision=64-true",
    "barebones": "barebones=true",
    "parts of epochs": "limit_train_batches=0.2 limit_val_batches=0.5 min_steps=3 min_epochs=1 num_sanity_val_steps=2",
    "overfitting": "overfit_batches=0.5 profiler=simple num_sanity_val_steps=-1 benchmark=true",
    "checks": "detect_anomaly=true deterministic=true inference_mode=false profiler=advanced sync_batchnorm=true",
    "loaders": "reload_dataloaders_every_n_epochs=1 use_distributed_sampler=false max_time=00:00:10:00 benchmark=true",
    "within epochs": "accumulate_grad_batches=3 val_check_interval=2 gradient_clip_val=1 log_every_n_steps=1",
    "no validation": "limit_val_batches=0 limit_train_batches=2 enable_autolog_hparams=false precision=bf16-true",
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_options_of_the_trainer(options: str, tiny: list[str], tmp_path: Path) -> None:
    output = run_ddpm(
        "fit", *tiny, f"--run_dir={tmp_path}/run", "--trainer.max_steps=4", "--data.limit_val=20",
        "--data.eval_batch_size=5", "--data.batch_size=64", *(f"--trainer.{option}" for option in options.split()),
    )  # fmt: skip
    assert "Traceback" not in output and "UserWarning" not in output, output
    assert (tmp_path / "run" / "config.yaml").is_file()
    saves = "barebones" not in options and "enable_checkpointing" not in options
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file() == saves


class _Seen(Callback):
    def __init__(self) -> None:
        self.rows: list[list[int]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        self.rows.append(batch.index.tolist())


@pytest.mark.parametrize("batches", [1, 3])
def test_overfit_batches_trains_on_the_same_batches_in_each_epoch(batches: int, tmp_path: Path) -> None:
    seen = _Seen()
    run_trainer(tmp_path, seen, overfit_batches=batches, max_epochs=3, enable_checkpointing=False).fit(
        build(), Digits(batch_size=16, eval_batch_size=5, limit_val=20)
    )
    assert seen.rows == seen.rows[:batches] * 3
    assert len({tuple(rows) for rows in seen.rows}) == batches


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("command", ["fit", "validate", "test", "predict"])
def test_fast_dev_run_writes_nothing_into_a_finished_run(command: str, trained: Path) -> None:
    before = _contents(trained)
    start = ["-c", f"{trained}/config.yaml", f"--run_dir={trained}"] if command == "fit" else [str(trained)]
    output = run_ddpm(command, *start, "--trainer.fast_dev_run=true")
    assert _contents(trained) == before
    assert command != "fit" or "fast_dev_run keeps nothing" in output


def _events(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return [(event.step, event.value) for event in EventAccumulator(str(run_dir)).Reload().Scalars(tag)]


@pytest.mark.parametrize(("command", "tag"), [("test", "test/denoising/elbo"), ("validate", "val/denoising/elbo")])
def test_an_evaluation_is_logged_at_the_step_of_its_checkpoint(
    command: str, tag: str, trained: Path, tmp_path: Path
) -> None:
    common = ["-c", f"{trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--run_dir={tmp_path}"]
    run_ddpm(command, *common)
    assert [step for step, _ in _events(tmp_path, tag)] == [20]
    assert _events(tmp_path, "epoch") == [(20, 2.0)]


def test_lines_repeat_no_bound_and_are_few(tiny: list[str], tmp_path: Path) -> None:
    output = run_ddpm(
        "fit", *tiny, f"--run_dir={tmp_path}", "--trainer.max_epochs=12", "--trainer.check_val_every_n_epoch=5",
        "--data.batch_size=16", "--trainer.limit_train_batches=2", "--data.limit_val=20",
        "--trainer.log_every_n_steps=100", "--trainer.num_sanity_val_steps=1",
    )  # fmt: skip
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert [line.split(" | ")[0] for line in lines] == ["epoch 4", "epoch 9", "epoch 11"]
    assert ["val/denoising" in line for line in lines] == [True, True, False]


def test_a_validation_within_an_epoch_has_its_line(tiny: list[str], tmp_path: Path) -> None:
    output = run_ddpm(
        "fit", *tiny, f"--run_dir={tmp_path}", "--trainer.max_epochs=1", "--trainer.val_check_interval=5",
        "--data.limit_val=20",
    )  # fmt: skip
    lines = [line for line in output.splitlines() if line.startswith("epoch ")]
    assert [line.split(" | ")[1] for line in lines] == ["step 5", "step 10"]
    assert all("val/denoising" in line for line in lines)


# base.yaml is no configuration of a run; the others are images.yaml and mnist.yaml with other data
LEFT_OUT = {"base", "cifar10", "fashion_mnist"}
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml") if path.stem not in LEFT_OUT)
NOT_A_UNET = {"hvae_digits", "hvae_mnist", "lecture"}
FEW_STEPS = ["--model.schedule.T=50"]  # of a callback that samples with all steps
SMALLER = {
    **dict.fromkeys(("free_field", "ising", "lecture", "phi4"), FEW_STEPS),
    "mnist_levels": ["--model.network.blocks=[1]", "--model.network.rank=3"],
}
BRIEFLY = {
    "clip early_stopping profiler power_averages": [],
    "batch_size": ["--trainer.callbacks.init_val=2", "--trainer.callbacks.max_trials=2"],
    "lr_find": ["--trainer.callbacks.num_training_steps=3"],
}
# these two end before training: on one configuration of each kind of model and of data
KINDS = ["digits", "hvae_mnist", "images", "mnist_levels", "phi4"]


@pytest.fixture(scope="module")
def mnist_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mnist")
    write_mnist(root)
    return root


@pytest.mark.parametrize(
    ("overlays", "config"), [(name, config) for name in BRIEFLY for config in (KINDS if BRIEFLY[name] else CONFIGS)]
)
def test_every_overlay_runs_on_every_config(
    overlays: str, config: str, mnist_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for callback in (SampleGrid, LatticeObservables):  # whatever the configuration says
        monkeypatch.setattr(callback, "n", property(lambda _: 4, lambda _, n: None), raising=False)
    brief, embedded = BRIEFLY[overlays], "digits" in config or config == "quickstart"
    small = [*SMALLER.get(config, []), *([] if config in NOT_A_UNET else ["--model.network.width=8"])]
    output = run_ddpm(
        "fit", "-c", f"configs/{config}.yaml", *(f"--config=configs/overlays/{name}.yaml" for name in overlays.split()),
        f"--run_dir={tmp_path}", *small, *brief, "--trainer.max_steps=2", "--trainer.limit_train_batches=2",
        "--trainer.check_val_every_n_epoch=1", "--data.batch_size=8", "--data.limit_val=2",
        *(own_data(f"{config}.yaml", tmp_path) or ([] if embedded else [f"--data.root={mnist_root}"])),
    )  # fmt: skip
    assert "warn" not in output.lower(), output
