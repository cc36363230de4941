"""The command line, end to end, on the embedded digits."""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from builders import BuiltOnly, losses, own_data, refused, weights
from conftest import ROOT, run_ddpm, run_ddpm_pair, run_ddpm_process
from mnist_files import DATA_DIR, real_mnist
from PIL import Image
from safetensors.torch import load_file

from ddpm_lightning.cli import main
from ddpm_lightning.configuration import read
from ddpm_lightning.words import of_a_run

pytestmark = pytest.mark.cli
# what a configuration leaves to the user
OVERLAYS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml") if path.name != "base.yaml")


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_config_is_parsed_and_instantiated(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cli = BuiltOnly(["fit", "-c", f"configs/{name}", f"--run_dir={tmp_path}/run", *own_data(name, tmp_path)])
    assert cli.model.shape == cli.datamodule.shape
    assert cli.model.ema_model.decoder.levels == cli.datamodule.levels
    assert cli.config.fit.run_dir == str(tmp_path / "run")


def test_lecture_config_is_the_lectures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    cli = BuiltOnly(["fit", "-c", "configs/lecture.yaml", f"--run_dir={tmp_path}"])
    schedule = cli.model.model.schedule
    assert (schedule.T, schedule.beta_start, schedule.beta_end) == (300, 1e-4, 0.02)
    assert type(cli.model.model.network).__name__ == "SimpleUNet"
    optimizer = cli.model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam) and optimizer.defaults["lr"] == 2e-4
    assert cli.datamodule.batch_size == 128 and cli.trainer.max_epochs == 5


def test_a_weighted_objective_is_put_together_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    options = {
        "": "WeightedMSE",
        ".times": "ImportanceTimes",
        ".times.bins": "7",
        ".target": "VParameterization",
        ".weighting": "MinSNRWeighting",
        ".weighting.clip": "3",
        ".continuous": "true",
    }
    arguments = [f"--model.objective{name}={value}" for name, value in options.items()]
    objective = BuiltOnly(["fit", "-c", "configs/digits.yaml", f"--run_dir={tmp_path}", *arguments]).model.objective
    assert (objective.times.bins, objective.weighting.clip, objective.continuous, objective.T) == (7, 3.0, True, None)
    assert type(objective.target).__name__ == "VParameterization"


def test_a_part_of_another_class_drops_the_arguments_of_the_base(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("a: {class_path: A, init_args: {x: 1}}\nb: {class_path: B, init_args: {y: 1}}")
    overlay = "extends: base.yaml\na: {class_path: C}\nb: {class_path: B, init_args: {z: 2}}"
    (tmp_path / "overlay.yaml").write_text(overlay)
    assert read(tmp_path / "overlay.yaml") == {
        "a": {"class_path": "C"},
        "b": {"class_path": "B", "init_args": {"y": 1, "z": 2}},
    }


def test_fit_writes_checkpoints_pictures_logs_and_its_configuration(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert {path.name for path in (trained / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert (trained / "schedule.png").is_file() and (trained / "forward.png").is_file()
    assert len(list((trained / "samples").glob("*.png"))) == 2
    config = yaml.safe_load((trained / "config.yaml").read_text())
    assert config["model"]["schedule"]["init_args"]["T"] == 12 and "extends" not in config
    events = EventAccumulator(str(trained)).Reload()
    scalars = set(events.Tags()["scalars"])
    assert {"train/loss", "lr-AdamW", "train/images_per_second", "train/grad_norm"} <= scalars
    assert {"val/denoising/reconstruction", "val/denoising/prior_matching", "val/denoising/elbo"} <= scalars
    assert "standard_error/val/denoising/bits_per_dim" in scalars and not any(name.endswith("_se") for name in scalars)
    assert set(events.Tags()["images"]) == {"samples", "forward process", "schedule", "val/cost by time"}


def test_off_a_terminal_fit_prints_one_line_an_epoch_and_no_noise(trained: Path) -> None:
    lines = (trained / "stdout.txt").read_text().splitlines()
    assert len(lines) == 3, lines
    assert lines[0].startswith("UNet with ") and str(trained) in lines[0]
    for epoch, line in enumerate(lines[1:]):
        assert re.match(rf"epoch {epoch} \| step {10 * (epoch + 1)} \| loss [\d.]+ \| val/denoising [\d.]+ \+- ", line)


def test_test_reproduces_itself_and_reports_each_image_once(trained: Path, tmp_path: Path) -> None:
    records = []
    for folder, extra in ((tmp_path / "a", []), (tmp_path / "b", ["--data.eval_batch_size=50"])):
        common = ["-c", f"{trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt"]
        output = run_ddpm("test", *common, f"--run_dir={folder}", *extra)
        assert "denoising_matching" in output and "warn" not in output.lower()
        records.append(json.loads((folder / "bound-test.json").read_text()))
        assert (folder / "bound-test.txt").read_text().strip() in output
    assert records[0]["images"] == 297
    told = {
        "stage": "test", "dims": 64, "levels": 17, "T": 12, "weights": "averaged", "ema_decay": 0.999,
        "steps_trained": 20, "clip_x0": True, "variance": "FixedLargeVariance", "decoder": "DiscretizedGaussian",
        "density": False, "class_conditional": False, "eval_seed": 0, "precision": "32-true",
    }  # fmt: skip
    assert {name: records[0][name] for name in told} == told
    assert records[0]["versions"]["torch"] == torch.__version__
    assert records[0]["bounds"]["trajectory"] == {
        "T": 12,
        "steps_evaluated": 11,
        "steps_chosen": "all",
        "draws": 1,
    }
    text = (tmp_path / "a/bound-test.txt").read_text()
    for words in ("after 20 steps", "denoising: all 11,", "from eval_seed 0", "32-true", f"torch {torch.__version__}"):
        assert words in text, words
    first, second = (record["figures"] for record in records)
    for form, terms in first.items():
        for name, figure in terms.items():
            assert figure["mean"] == pytest.approx(second[form][name]["mean"], rel=1e-5, abs=1e-5)
    elbos = {form: (terms["elbo"]["mean"], terms["elbo"]["se"]) for form, terms in first.items()}
    (a, se_a), (b, se_b), (c, se_c) = (elbos[form] for form in ("denoising", "consistency", "trajectory"))
    assert abs(a - b) < 4 * (se_a + se_b) and abs(b - c) < 4 * (se_b + se_c)


def test_fit_keeps_its_configuration_when_test_runs_in_its_folder(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    before = (folder / "config.yaml").read_text()
    run_ddpm("validate", "-c", f"{folder}/config.yaml", f"--run_dir={folder}", "--ckpt_path=best")
    assert (folder / "config.yaml").read_text() == before
    assert (folder / "config-validate.yaml").is_file() and (folder / "bound-val.txt").is_file()


def test_command_line_beats_what_the_checkpoint_remembers(trained: Path, tmp_path: Path) -> None:
    run_ddpm(
        "test", "-c", f"{trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--run_dir={tmp_path}",
        "--model.variance=FixedSmallVariance",
    )  # fmt: skip
    assert "FixedSmallVariance" in (tmp_path / "bound-test.txt").read_text()


def test_predict_writes_the_terms_of_every_image(trained: Path, tmp_path: Path) -> None:
    common = ["-c", f"{trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--run_dir={tmp_path}"]
    assert "warn" not in run_ddpm("predict", *common).lower()
    run_ddpm("test", *common)
    rows = list(csv.DictReader((tmp_path / "image_terms.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(297))
    figures = json.loads((tmp_path / "bound-test.json").read_text())["figures"]
    mean = sum(float(row["consistency/elbo"]) for row in rows) / len(rows)
    assert mean == pytest.approx(figures["consistency"]["elbo"]["mean"], rel=1e-9)


def test_image_k_of_a_seed_is_the_same_in_any_batch(trained: Path, tmp_path: Path) -> None:
    common = ["-c", f"{trained}/config.yaml", f"--run_dir={trained}", "--ckpt_path=last", "--seed=3"]
    run_ddpm("sample", *common, "--n=9", f"--out={tmp_path}/a")
    output = run_ddpm("sample", *common, "--n=5", "--batch_size=2", f"--out={tmp_path}/b")
    assert f"{tmp_path}/b/samples.png" in output
    a, b = (load_file(tmp_path / name / "samples.safetensors")["images"] for name in "ab")
    assert a.shape == (9, 1, 8, 8) and a.dtype == torch.uint8 and int(a.max()) <= 16
    assert torch.equal(a[:5], b)
    with Image.open(tmp_path / "a" / "samples.png") as picture:
        assert picture.size == (3 * 34 + 2, 3 * 34 + 2)
    run_ddpm("sample", *common, "--n=5", "--sampler=DDIMSampler", "--steps=4", f"--out={tmp_path}/c")
    assert not torch.equal(load_file(tmp_path / "c" / "samples.safetensors")["images"], b)


def test_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_does(tiny: list[str], tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    tiny = [*tiny, "--data.batch_size=16", "--trainer.limit_train_batches=10", "--data.limit_val=20"]
    run_ddpm("fit", *tiny, f"--run_dir={straight}", "--trainer.max_epochs=3")
    # 13 steps stop in the middle of the second epoch
    run_ddpm("fit", *tiny, f"--run_dir={broken}", "--trainer.max_epochs=3", "--trainer.max_steps=13")
    assert torch.load(broken / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 13
    resumed = ["--trainer.max_epochs=3", "--ckpt_path=last", "--seed_everything=7"]
    run_ddpm("fit", *tiny, f"--run_dir={broken}", *resumed)
    a, b = weights(straight / "checkpoints/last.ckpt"), weights(broken / "checkpoints/last.ckpt")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], a[name.replace("ema_model", "model")]) for name in a if "ema_model" in name)


def test_a_finished_run_resumed_changes_nothing(trained: Path, tiny: list[str], tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "run")
    before = weights(folder / "checkpoints/last.ckpt")
    run_ddpm("fit", *tiny, f"--run_dir={folder}", "--trainer.max_epochs=2", "--ckpt_path=last")
    after = weights(folder / "checkpoints/last.ckpt")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_two_processes_give_the_bound_and_the_samples_of_one(trained: Path, tmp_path: Path) -> None:
    common = ["-c", f"{trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt"]
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    few = "[{class_path: DenoisingElbo, init_args: {steps: 3}}, ConsistencyElbo]"
    figures = []
    for folder, run, extra in ((tmp_path / "one", run_ddpm, []), (tmp_path / "two", run_ddpm_pair, two)):
        run("test", *common, f"--run_dir={folder}", f"--model.test_bounds={few}", *extra)
        run("predict", *common, f"--run_dir={folder}", *extra)
        run("sample", *common, f"--run_dir={folder}", "--n=7", *extra)
        figures.append(json.loads((folder / "bound-test.json").read_text()))
    one, two_ = figures
    assert one["images"] == two_["images"] == 297
    assert one["bounds"]["denoising"]["steps_chosen"] == "by typical cost"
    for form, terms in one["figures"].items():
        for name, figure in terms.items():
            assert two_["figures"][form][name]["mean"] == pytest.approx(figure["mean"], rel=1e-5, abs=1e-5)
            assert two_["figures"][form][name]["se"] == pytest.approx(figure["se"], rel=1e-5, abs=1e-5)
    a, b = (load_file(tmp_path / name / "samples.safetensors")["images"] for name in ("one", "two"))
    assert torch.equal(a, b)
    rows = list(csv.DictReader((tmp_path / "two/image_terms.csv").open()))
    assert [int(row["index"]) for row in rows] == list(range(297))


def test_a_run_without_a_logger(tiny: list[str], tmp_path: Path) -> None:
    run_ddpm("fit", *tiny, f"--run_dir={tmp_path}", "--trainer.logger=false", "--trainer.max_steps=2")
    assert (tmp_path / "checkpoints" / "last.ckpt").is_file() and not list(tmp_path.glob("events*"))


def test_fast_dev_run_leaves_no_checkpoint(tiny: list[str], tmp_path: Path) -> None:
    run_ddpm("fit", *tiny, f"--run_dir={tmp_path}", "--trainer.fast_dev_run=2", "--trainer.log_every_n_steps=0")
    assert not list(tmp_path.rglob("*.ckpt"))


LEARNED_SCHEDULE = [
    "--model.schedule=LearnedGamma",
    "--model.decoder=CategoricalDecoder",
    "--model.objective=ContinuousNegativeElbo",
    "--model.objective.times=EquispacedTimes",
]
EXPLODING = [
    "--model.schedule=VarianceExploding",
    "--model.schedule.schedule=LinearGamma",
    "--model.schedule.schedule.T=12",
    "--model.objective=WeightedMSE",
    "--model.objective.times=ImportanceTimes",
    "--model.objective.weighting=EDMWeighting",
]


@pytest.mark.parametrize("parts", [[], LEARNED_SCHEDULE, EXPLODING], ids=["chain", "learned", "exploding"])
def test_two_processes_train_as_one_does(
    parts: list[str], tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    common = [*parts, "--trainer.max_epochs=1", "--trainer.log_every_n_steps=1", "--data.limit_val=60"]
    if "VarianceExploding" in "".join(parts):
        tiny = [option for option in tiny if "schedule" not in option]
    # one of them with the processes that Lightning starts
    run = run_ddpm_pair if parts else run_ddpm_process
    output = run("fit", *tiny, f"--run_dir={tmp_path}/two", *common, *two)
    # the batch of 128 is shared, so an epoch has the steps that it has on one process
    assert output.count("epoch 0 | step 10 ") == 1
    monkeypatch.chdir(ROOT)
    main(["fit", *tiny, f"--run_dir={tmp_path}/one", *common, "--trainer.accelerator=cpu"])
    one, two_ = (losses(tmp_path / name) for name in ("one", "two"))
    # sums in another order are all that differs
    assert len(one) == 10 and one == pytest.approx(two_, rel=1e-4)
    a, b = (weights(tmp_path / name / "checkpoints/last.ckpt") for name in ("one", "two"))
    for name in (name for name in a if name.startswith(("model.", "profiles."))):
        assert torch.allclose(a[name], b[name], rtol=0, atol=1e-3), name
    assert float(a["profiles.denoising.cost"].max()) == 1


@pytest.mark.mnist
@real_mnist
@pytest.mark.parametrize("config", ["mnist", "lecture", "mnist_likelihood"])
def test_mnist_trains_and_is_tested(config: str, tmp_path: Path) -> None:
    common = [f"--data.root={DATA_DIR}", f"--run_dir={tmp_path}", "--data.limit_val=4", "--data.limit_test=6"]
    # half precision is slow on a CPU without instructions for it
    small = ["--data.batch_size=4", "--trainer.limit_train_batches=2", "--trainer.max_epochs=1"]
    small += ["--trainer.precision=32-true"]
    sampled = "--trainer.callbacks=[ddpm_lightning.callbacks.LastCheckpoint]"
    run_ddpm("fit", "-c", f"configs/{config}.yaml", *common, *small, sampled)
    bounds = "[{class_path: DenoisingElbo, init_args: {steps: 2}}]"
    run_ddpm("test", "-c", f"{tmp_path}/config.yaml", *common, "--ckpt_path=last", f"--model.test_bounds={bounds}")
    record = json.loads((tmp_path / "bound-test.json").read_text())
    assert record["images"] == 6 and record["dims"] == 784


class TestBadInput:
    """Each mistake has a message that names the option and says what to do, and loses nothing."""

    @pytest.fixture(autouse=True)
    def in_the_project(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(ROOT)

    def test_missing_mnist(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        message = refused(
            capsys, "fit", "-c", "configs/mnist.yaml", f"--data.root={tmp_path}/nowhere", "--data.download=false",
            f"--run_dir={tmp_path}/run",
        )  # fmt: skip
        assert "train-images-idx3-ubyte" in message and "--data.root" in message and "configs/digits.yaml" in message

    def test_misspelt_option(self, capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
        message = refused(capsys, "fit", *tiny, "--trainer.max_epoch=3")
        assert "--trainer.max_epoch" in message and len(message.splitlines()) < 6

    def test_misspelt_key(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        config = tmp_path / "bad.yaml"
        config.write_text(f"extends: {ROOT}/configs/digits.yaml\nmodel:\n  ema_decoy: 0.9\n")
        assert "ema_decoy" in refused(capsys, "fit", "-c", str(config))

    def test_misspelt_argument_of_a_part(self, capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
        assert "widht" in refused(capsys, "fit", *tiny, "--model.network.init_args.widht=8")

    def test_unknown_class(self, capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
        assert "QuadraticChain" in refused(capsys, "fit", *tiny, "--model.schedule=QuadraticChain")

    def test_missing_base(self, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
        config = tmp_path / "bad.yaml"
        config.write_text("extends: nothing.yaml\n")
        assert f"{tmp_path}/nothing.yaml" in refused(capsys, "fit", "-c", str(config))

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--model.schedule.init_args.T=0"], ["--model.schedule.T = 0 must be 1 or more"]),
            (
                ["--model.schedule=LinearChain", "--model.schedule.beta_end=1.5"],
                ["--model.schedule.beta_end = 1.5 must lie strictly between 0 and 1"],
            ),
            (["--model.network.init_args.multipliers=[1,1,1,1,1]"], ["UNet", "[1, 8, 8]", "16"]),
            (["--model.network.init_args.channels=3"], ["UNet", "[1, 8, 8]"]),
            (["--model.ema_decay=1.5"], ["--model.ema_decay"]),
            (
                ["--model.objective.times=ImportanceTimes", "--model.objective.times.bins=0"],
                ["--model.objective.times.bins = 0 must"],
            ),
            (
                ["--model.test_bounds=[{class_path: DenoisingElbo, init_args: {T: 0}}]"],
                ["--model.test_bounds", "T = 0"],
            ),
            (["--model.test_bounds=[{class_path: DenoisingElbo, init_args: {steps: 0}}]"], ["steps = 0 must be 1"]),
            (
                [
                    "--model.schedule=VarianceExploding",
                    "--model.schedule.schedule=CosineChain",
                    "--model.schedule.schedule.max_beta=2",
                ],
                ["--model.schedule.schedule.max_beta = 2 must lie"],
            ),
            (["--model.schedule=LearnedGamma"], ["learned through the bound", "ContinuousNegativeElbo"]),
            (
                ["--model.schedule=LinearGamma", "--model.schedule.gamma_min=6"],
                ["--model.schedule.gamma_min = 6 must be below gamma_max = 5"],
            ),
            (
                ["--model.variance=LearnedRangeVariance", "--model.network.out_channels=1"],
                ["[2, 8, 8]", "out_channels 2"],
            ),
            (["--model.objective=HybridObjective"], ["nothing to learn", "LearnedRangeVariance"]),
            (["--data.batch_size=5000"], ["--data.batch_size"]),
            (["--data.batch_size=0"], ["--data.batch_size"]),
            (["--ckpt_path=nowhere.ckpt"], ["nowhere.ckpt does not exist"]),
            (["--ckpt_path=best"], ["best.ckpt does not exist"]),
            (["--model.network.width=0"], ["--model.network.width = 0 must be 1 or more\n"]),
            (["--model.optimizer.lr=nan"], ["--model.optimizer.lr nan cannot be read as float or torch.Tensor\n"]),
            (
                ["--model.optimizer=MuonAdamW", "--model.optimizer.lr=nan"],
                ["--model.optimizer.lr nan cannot be read as float\n"],
            ),
            (
                ["--trainer.precision=fp8"],
                ["--trainer.precision fp8 cannot be read as auto or 32-true or ", "16 or bf16"],
            ),
            (["--model.optimizer=Adaam"], ["--model.optimizer Adaam: there is no such class: did you mean Adam?"]),
            (["--model.optimizer=adamw"], ["did you mean AdamW?"]),
            (["--model.optimizer=MuonAdamWW"], ["did you mean MuonAdamW?"]),
            (["--model.network=MuonAdamW"], ["--model.network MuonAdamW: MuonAdamW is no class for this option"]),
            (["--dry_run=yes"], ["--dry_run takes no value\n"]),
        ],
    )
    def test_arguments(
        self, capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path, options: list[str], words: list[str]
    ) -> None:
        message = refused(capsys, "fit", *tiny, f"--run_dir={tmp_path}", "--trainer.max_epochs=1", *options)
        assert message.startswith("ddpm: error: ") and len(message.splitlines()) < 4
        assert all(word in message for word in words), message

    def test_decoder_for_other_levels(self, capsys: pytest.CaptureFixture[str], tiny: list[str]) -> None:
        assert "levels" in refused(capsys, "fit", *tiny, "--model.decoder.init_args.levels=256")

    def test_checkpoint_of_another_architecture(
        self, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
    ) -> None:
        for command in ("test", "sample"):
            message = refused(
                capsys, command, "-c", f"{trained}/config.yaml", "--model.network.init_args.width=16",
                f"--ckpt_path={trained}/checkpoints/last.ckpt", f"--run_dir={tmp_path}",
            )  # fmt: skip
            assert "--model.network.width 16: the checkpoint was trained with 8" in message

    def test_unwritable_folder(self, capsys: pytest.CaptureFixture[str], tiny: list[str], tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        message = refused(capsys, "fit", *tiny, f"--run_dir={tmp_path}/file/run")
        assert "--run_dir" in message and "cannot be written" in message

    def test_a_folder_that_holds_a_run_is_not_overwritten(
        self, capsys: pytest.CaptureFixture[str], tiny: list[str], trained: Path
    ) -> None:
        message = refused(capsys, "fit", *tiny, f"--run_dir={trained}")
        assert "already holds a run" in message and "--ckpt_path last" in message and "--run_dir" in message

    @pytest.mark.parametrize(
        ("options", "word"),
        [
            (["--steps=0"], "--steps 0"),
            (["--steps=13"], "--steps 13"),
            (["--n=0"], "--n 0"),
            (["--batch_size=0"], "--batch_size 0"),
            (["--labels=[3]"], "--labels [3]"),
            (["--guidance_scale=2"], "needs a class-conditional model"),
        ],
    )
    def test_sampling(
        self, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path, options: list[str], word: str
    ) -> None:
        common = ["-c", f"{trained}/config.yaml", f"--run_dir={tmp_path}"]
        assert word in refused(capsys, "sample", *common, f"--ckpt_path={trained}/checkpoints/last.ckpt", *options)

    def test_sampling_without_a_checkpoint(
        self, capsys: pytest.CaptureFixture[str], trained: Path, tmp_path: Path
    ) -> None:
        assert "--ckpt_path" in refused(capsys, "sample", "-c", f"{trained}/config.yaml", f"--run_dir={tmp_path}")


def test_a_run_is_the_one_that_is_named(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever run_dir the configurations behind it name."""
    words = of_a_run(["fit", str(trained), "-c", "configs/digits.yaml", "--trainer.max_steps=9"], ["fit"])
    assert words[-2:] == ["--run_dir", str(trained)] and words.count("--run_dir") == 1
    assert of_a_run(["test", str(trained), "--run_dir", "elsewhere"], ["test"])[-2:] == ["--run_dir", "elsewhere"]
    assert "write the command first: ddpm fit -c a.yaml" in refused(capsys, "-c", "a.yaml", "fit")
