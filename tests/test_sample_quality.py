"""Quality of samples, measured in training, by the test command and by scripts."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import lightning.pytorch as pl
import pytest
import torch
from builders import build, conditional, equal, state, trainer
from conftest import ROOT, run_ddpm_pair

from ddpm_lightning.callbacks import SampleQuality
from ddpm_lightning.cli import main
from ddpm_lightning.data import MNIST, Digits, FashionMNIST, levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.evaluation.quality import Comparison, named_classifier, neighbours_of, points_of
from ddpm_lightning.figures import nearest_neighbours, tile
from ddpm_lightning.metrics import ClassifierFeatures, FrechetDistance, QualityMetrics, load_classifier
from ddpm_lightning.networks import UNet
from ddpm_lightning.process import DiscretizedGaussian
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training import DiffusionModule


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / f"scripts/{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- the callback


class Logged(pl.Callback):
    """Keeps what each validation logged."""

    def __init__(self) -> None:
        self.frechet: list[float | None] = []

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get("val/frechet")
        self.frechet.append(None if value is None else float(value))


def fitted(folder: Path, *callbacks: pl.Callback, **options: object) -> DiffusionModule:
    torch.manual_seed(0)
    module = build(network=UNet(1, width=8, multipliers=(1, 2), blocks=1, dropout=0.1), validation_bounds=[])
    runner = trainer(folder, callbacks=list(callbacks), enable_checkpointing=False, **options)
    runner.fit(module, Digits(limit_val=20))
    return module


def frechet_of(module: DiffusionModule, images: torch.Tensor, real: torch.Tensor) -> float:
    metric = FrechetDistance(ClassifierFeatures(load_classifier("digits")))
    metric.update(levels_to_model(real, 17), real=True)
    metric.update(levels_to_model(images, 17), real=False)
    return float(metric.compute())


def test_training_is_the_same_with_it_and_the_figure_is_that_of_the_samples(tmp_path: Path) -> None:
    logged = Logged()
    quality = SampleQuality(n=30, steps=4, batch_size=7, sampler=AncestralSampler(), every_n_epochs=2)
    module = fitted(tmp_path, quality, logged, max_epochs=4)
    assert equal(state(module), state(fitted(tmp_path, max_epochs=4)))
    assert [value is None for value in logged.frechet] == [True, False, False, False]
    assert logged.frechet[1] == logged.frechet[2] != logged.frechet[3]
    real = Digits().split("val").chosen(30, 0).image
    images = SampleRequest(steps=4).on(module)(range(30))
    assert logged.frechet[3] == pytest.approx(frechet_of(module, images, real), rel=1e-4)


def test_the_test_command_reports_samples_beside_the_floor(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = conditional(test_bounds=[], label_dropout=0.1)
    quality = SampleQuality(n=400, steps=None, guidance_scale=2.0, seed=3)
    runner = trainer(tmp_path, callbacks=[quality])
    runner.test(module, Digits(limit_test=8), verbose=False)
    train, test = (Digits().split(name).chosen(400, 3) for name in ("train", "test"))
    assert len(test.image) == 297
    label = torch.arange(400) % 10
    images = SampleRequest(DDIMSampler(), seed=3, guidance_scale=2.0).on(module)(range(400))
    for name, shown, labels in (("samples", images, label), ("training images", train.image, train.label)):
        expected = QualityMetrics(load_classifier("digits"))
        expected.update(levels_to_model(test.image, 17), real=True)
        expected.update(levels_to_model(shown, 17), real=False, label=labels)
        assert quality.measured[name] == pytest.approx(expected.compute(), rel=1e-4, abs=1e-4)
    assert float(runner.callback_metrics["test/frechet"]) == pytest.approx(quality.measured["samples"]["frechet"])
    floor = quality.measured["training images"]
    assert float(runner.callback_metrics["test/floor_frechet"]) == pytest.approx(floor["frechet"])
    # a network that has not been trained draws noise
    assert quality.measured["samples"]["frechet"] > 5 * floor["frechet"] and floor["accuracy"] > 0.99
    printed, record = capsys.readouterr().out, json.loads((tmp_path / "quality-test.json").read_text())
    assert "400 samples (DDIMSampler, all steps, guidance scale 2, seed 3" in printed
    assert "against 297 test images" in printed
    assert (tmp_path / "quality-test.txt").read_text() in printed
    assert record["figures"] == quality.measured and record["classifier"] == "digits" and record["real_images"] == 297


def test_a_classifier_of_ones_own_and_an_unconditional_model(tmp_path: Path) -> None:
    path = ROOT / "ddpm_lightning/metrics/weights/digits.safetensors"
    quality = SampleQuality(n=20, steps=50, classifier=str(path))
    trainer(tmp_path, callbacks=[quality]).test(build(test_bounds=[]), Digits(limit_test=8), verbose=False)
    assert "accuracy" not in quality.measured["samples"] and "accuracy" in quality.measured["training images"]
    # 50 steps are cut to the 10 that the chain has
    assert "DDIMSampler, 10 steps" in (tmp_path / "quality-test.txt").read_text()


def test_features_of_other_images_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small, large = build(), build(shape=(1, 28, 28), levels=256, decoder=DiscretizedGaussian(256))
    for module, data, words in (
        (small, Digits(), ""),
        (large, MNIST(download=False), ""),
        (large, FashionMNIST(download=False), "mnist was trained on other images than these of FashionMNIST"),
    ):
        name, _ = named_classifier(module, None, data)
        told = capsys.readouterr().err
        assert (words in told and "scripts/train_classifier.py" in told) if words else not told
        named_classifier(module, name, data)  # asked for by its name
        assert not capsys.readouterr().err
    trainer(tmp_path).test(small, Digits(limit_test=8), verbose=False)
    small.trainer.datamodule = FashionMNIST(download=False)
    named_classifier(small, None)
    assert "digits was trained on other images than these of FashionMNIST" in capsys.readouterr().err


@pytest.mark.cli
def test_on_the_command_line_two_processes_give_the_figures_of_one(trained: Path, tmp_path: Path) -> None:
    common = ["-c", f"{trained}/config.yaml", f"--ckpt_path={trained}/checkpoints/last.ckpt", "--model.test_bounds=[]"]
    switch = ["--trainer.callbacks+=SampleQuality", "--trainer.callbacks.n=31", "--trainer.callbacks.batch_size=8"]
    two = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    run_ddpm_pair("test", *common, *switch, f"--run_dir={tmp_path}", *two)
    record = json.loads((tmp_path / "quality-test.json").read_text())
    module, data = Run(trained).load()
    module.bounds["test"], one = [], SampleQuality(n=31)
    trainer(tmp_path / "one", callbacks=[one]).test(module, data, verbose=False)
    assert record["samples"] == 31 and set(record["figures"]) == {"samples", "training images"}
    for name, figures in one.measured.items():
        assert record["figures"][name] == pytest.approx(figures, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "changes", "words"),
    [
        ({"n": 3}, {}, "n = 3 must be 4 or more"),
        ({"every_n_epochs": 0}, {}, "every_n_epochs = 0"),
        ({"steps": 0}, {}, "steps = 0"),
        ({"classifier": "mnist"}, {}, r"classifier mnist knows images \(1, 28, 28\), not \(1, 8, 8\)"),
        ({"classifier": "nowhere"}, {}, "classifier nowhere: neither"),
        ({"guidance_scale": 2.0}, {}, "guidance"),
        ({}, {"shape": (1, 16, 16)}, r"no classifier is shipped for images of shape \[1, 16, 16\]"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict, changes: dict, words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=words):
        SampleQuality(**options).setup(trainer(tmp_path), build(**changes), "fit")


# --- the figure and the scripts


def test_nearest_neighbours_lie_below_their_sample() -> None:
    samples = torch.arange(3, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 1, 40, 40) * 50
    nearest = (samples[:, None] + torch.tensor([10, 20], dtype=torch.uint8).view(1, 2, 1, 1, 1)).contiguous()
    picture = nearest_neighbours(samples, nearest, 256)
    height = tile(samples, 256, 3).shape[1]
    assert picture.shape == (3, 3 * 42 + 4 + 2, 3 * 42 + 2)
    column = picture[0, :, [22, 64, 106]].T
    assert [column[:, 20].tolist(), column[:, height + 24].tolist()] == [[0, 50, 100], [10, 60, 110]]
    assert column[:, -20].tolist() == [20, 70, 120]
    assert bool((picture[:, height : height + 2] == 255).all())


def test_quality_of_a_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddpm_lightning.progress.QUIET", 0)
    options = ["--n=40", "--steps=4", "--batch_size=30", f"--out={tmp_path}", "--sampler=HeunSampler"]
    main(["evaluate", "quality", str(trained), *options])
    captured, record = capsys.readouterr(), json.loads((tmp_path / "quality.json").read_text())
    assert captured.out == (tmp_path / "quality.txt").read_text() and "40/40" in captured.err
    assert "40 samples (HeunSampler, 4 steps, seed 0" in captured.out
    assert list(record["figures"]) == ["samples", "40 training images", "40 validation images"]
    digits = Digits()
    train, test = (levels_to_model(x, 17).flatten(1) for x in
                   (digits.split("train").images, digits.split("test").chosen(40, 0).image))  # fmt: skip
    medians = record["median_distance_to_nearest_training_image"]
    expected = torch.cdist(test, train).min(1).values.median()
    assert medians["test images"]["pixels"] == pytest.approx(float(expected), rel=1e-4)
    # twenty steps of training leave noise, which no training image is near to
    assert medians["samples"]["pixels"] > 2 * medians["test images"]["pixels"]
    assert (tmp_path / "neighbours.png").stat().st_size > 5_000


def test_training_images_are_found_out() -> None:
    """The check for copies, given copies."""
    train, classifier = Digits().split("train").images, load_classifier("digits")
    medians, picture = neighbours_of(train[:20], train, points_of(train, 17, classifier), 17, classifier)
    assert medians == {"pixels": 0, "features": pytest.approx(0, abs=1e-4)}
    # the first of 16 columns: the sample, the line, and itself again
    assert torch.equal(picture[:, :34, :34], picture[:, 38:72, :34])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [(["--checkpoint=nowhere.ckpt"], "nowhere.ckpt does not exist"), (["--n=2"], "--n 2 must be 4 or more"),
     (["--guidance_scale=2"], "class-conditional"), (["--steps=0"], "--steps 0 must be 1 or more"),
     (["--classifier=mnist"], r"classifier mnist knows images (1, 28, 28), not (1, 8, 8)")],
)  # fmt: skip
def test_a_quality_that_cannot_be_measured(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], word: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["evaluate", "quality", str(trained), "--n=4", f"--out={tmp_path / 'out'}", *arguments])
    assert stopped.value.code == 2 and word in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_real_images_are_kept_for_the_next_set_of_samples() -> None:
    split = Digits().split("train")
    batches = [(split.images[rows], split.labels[rows]) for rows in torch.arange(90).split(30)]
    module, classifier = build(), load_classifier("digits")
    compare = Comparison(module, classifier, batches[:1])
    first, second = compare(batches[1:2]), compare(batches[2:])
    assert first != second == Comparison(module, classifier, batches[:1])(batches[2:])
    only = Comparison(module, classifier, batches[:1], only=["frechet"])
    assert only(batches[1:2]) == {"frechet": first["frechet"]}


def test_train_classifier_is_deterministic_and_writes_what_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("train_classifier")
    for name in "ab":
        module.main(data="digits", epochs=2, out=tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    test = Digits().split("test")
    predicted = load_classifier(str(tmp_path / "a"))(levels_to_model(test.images, 17)).argmax(1)
    share = float((predicted == test.labels).double().mean())
    assert f"test accuracy {share:.4f} of 297 images" in capsys.readouterr().out and share > 0.3


def test_jittered_images_stay_where_they_are_but_for_a_little() -> None:
    module = script("train_classifier")
    x = torch.full((50, 1, 28, 28), -1.0)
    x[..., 12:16, 12:16] = 1
    jittered = module.jittered(x, torch.Generator().manual_seed(0))
    assert bool((jittered >= -1).all()) and bool((jittered <= 1 + 1e-6).all())
    rows = torch.arange(28.0)
    mass = jittered + 1
    centre = (mass.sum((1, 2, 3), keepdim=False).reciprocal()[:, None] * mass.sum((1, 3)) * rows).sum(1)
    assert float((centre - 13.5).abs().max()) < 1.5 * 1.15 and float(centre.std()) > 0.4
