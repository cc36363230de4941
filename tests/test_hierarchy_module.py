"""Hierarchical VAEs through the command line: the same training, runs, bounds and samples as diffusion models."""

import json
from pathlib import Path

import pytest
import torch
from builders import differences, equal, refused, state
from conftest import run_ddpm
from PIL import Image
from safetensors.torch import load_file

from ddpm_lightning.callbacks import LevelPictures
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import ConsistencyElbo, NegativeElbo, TrajectoryElbo
from ddpm_lightning.process import ConvLevel, DiscretizedGaussian, HierarchicalVAE, VectorLevel
from ddpm_lightning.runs import Run
from ddpm_lightning.sampling import SampleRequest
from ddpm_lightning.training import DiffusionModule, GenerativeModule, HierarchyModule

SHORT = ("--data.batch_size", "100", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false")
CONFIG = "configs/hvae_digits.yaml"


def fit(folder: Path, steps: int, *options: str) -> None:
    command = ["fit", str(folder)] if folder.exists() else ["fit", "-c", CONFIG, "--run_dir", str(folder)]
    run_ddpm(*command, "--trainer.max_steps", str(steps), "--trainer.check_val_every_n_epoch", "1", *SHORT, *options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for 14 steps, and gone on with until step 20."""
    folder = tmp_path_factory.mktemp("hvae") / "run"
    fit(folder, 14)
    fit(folder, 20)
    return folder


def test_a_resumed_run_is_the_uninterrupted_one(run: Path, tmp_path: Path) -> None:
    fit(tmp_path / "whole", 20)
    ours, theirs = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (run, tmp_path / "whole")
    )
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert differences(ours[part], theirs[part]) == []


def test_a_run_is_loaded_as_what_it_is(run: Path) -> None:
    module, data = Run(run).load()
    assert isinstance(module, HierarchyModule) and data.shape == (1, 8, 8)
    assert module.model.shapes == [(1, 8, 8), (8, 4, 4), (16,)]
    again = GenerativeModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")
    assert equal(state(again), state(module))
    with pytest.raises(InputError, match="written by HierarchyModule, which is no DiffusionModule"):
        Run(run).load_diffusion()
    with pytest.raises(InputError, match="written by HierarchyModule, which is no DiffusionModule"):
        DiffusionModule.load_from_checkpoint(run / "checkpoints" / "last.ckpt")


def test_its_bound_is_reported_in_two_forms(run: Path) -> None:
    run_ddpm("test", str(run), "--data.limit_test", "60")
    figures = json.loads((run / "bound-test.json").read_text())["figures"]
    assert set(figures) == {"consistency", "trajectory"}
    terms = figures["consistency"]
    total = terms["reconstruction"]["mean"] - terms["prior_matching"]["mean"] - terms["consistency"]["mean"]
    assert terms["elbo"]["mean"] == pytest.approx(total)
    difference = terms["elbo"]["mean"] - figures["trajectory"]["elbo"]["mean"]
    assert abs(difference) < 4 * (terms["elbo"]["se"] + figures["trajectory"]["elbo"]["se"])
    assert "shapes [[1, 8, 8], [8, 4, 4], [16]]" in (run / "bound-test.txt").read_text()


def test_samples_belong_to_their_seed(run: Path, tmp_path: Path) -> None:
    for n, batch in (("6", "6"), ("4", "3")):
        out = tmp_path / n
        run_ddpm("sample", str(run), "--n", n, "--batch_size", batch, "--seed", "3", "--out", str(out))
    six, four = (load_file(tmp_path / n / "samples.safetensors")["images"] for n in ("6", "4"))
    assert six.shape == (6, 1, 8, 8) and torch.equal(six[:4], four)
    module, _ = Run(run).load()
    assert torch.equal(SampleRequest(seed=3).on(module)(range(6)), six)
    assert int(six.max()) <= 16


def test_the_levels_are_shown(run: Path) -> None:
    for name, rows in (("reconstructions", 3), ("walk", 2)):
        (picture,) = (run / "levels").glob(f"{name}_0000013.png")
        assert Image.open(picture).size == (10 * 34 + 2, rows * 34 + 2)
    module, data = Run(run).load()
    assert isinstance(module, HierarchyModule)
    pictures, images = LevelPictures(n=3), data.split("val").images[:3]
    assert torch.equal(pictures.reconstructions(module, images)[:3], images)
    assert pictures.walk(module, images).shape == (6, 1, 8, 8)


def test_quality_is_measured_of_its_samples(run: Path) -> None:
    done = run_ddpm("evaluate", "quality", str(run), "--n", "40", "--batch_size", "40")
    assert "40 samples (drawn level by level, seed 0" in done


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["sample", "RUN", "--sampler", "DDIMSampler"], "--sampler is for diffusion models"),
        (["sample", "RUN", "--steps", "5"], "--steps is for diffusion models"),
        (["sample", "RUN", "--guidance_scale", "2"], "--guidance_scale is for diffusion models"),
        (["sample", "RUN", "--gif", "true"], "--gif true shows images on their way from noise"),
        (["evaluate", "flow", "RUN"], "trained a HierarchyModule: only diffusion models"),
        (["fit", "-c", CONFIG, "--model.network", "UNet"], "model.network"),
        (["export", "RUN", "--to", "onnx", "--out", "x.onnx"], "HierarchyModule, which is no DiffusionModule"),
        (["fit", "-c", CONFIG, "--model.hierarchy", "[]"], "hierarchy = [] must hold one level"),
        (["fit", "-c", CONFIG, "--model.test_bounds", "[{class_path: DenoisingElbo}]"], "the denoising form needs"),
        (["fit", "-c", CONFIG, "--model.objective", "ContinuousNegativeElbo",
          "--model.objective.times", "UniformTimes"], "ContinuousNegativeElbo trains diffusion models only"),
        (["fit", "-c", CONFIG, "--module", "torch.nn.Linear"], "--module torch.nn.Linear is no GenerativeModule"),
        (["fit", "-c", CONFIG, "--module", "no.such"], "--module no.such cannot be imported"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    words = [str(run) if word == "RUN" else word for word in words]
    folder = ["--run_dir", str(tmp_path / "new")] if words[0] == "fit" else []
    assert sentence in refused(capsys, *words, *folder)


def test_levels_that_do_not_chain_are_named() -> None:
    for levels, sentence in (
        (
            [ConvLevel(4, factor=2), VectorLevel(8), ConvLevel(4)],
            r"level 3, ConvLevel: the state below has the shape \[8\]",
        ),
        ([ConvLevel(4, factor=3)], r"level 1, ConvLevel: .* factor = 3 divides"),
    ):
        with pytest.raises(InputError, match=sentence):
            HierarchicalVAE(levels, DiscretizedGaussian(17), (1, 8, 8))


def test_a_level_starts_as_an_autoregression() -> None:
    """Equal shapes: mean c h, variance 1 - c^2; so standard normal numbers stay standard normal."""
    model = HierarchicalVAE([VectorLevel(8, carry=0.6)] * 1, DiscretizedGaussian(17), (8,))
    x = torch.randn(5, 8)
    for gaussian in (model.encoder_step(1, x, x), model.reconstruction_gaussian(x)):
        torch.testing.assert_close(gaussian.mean, 0.6 * x)
        torch.testing.assert_close(gaussian.log_var.exp(), torch.full_like(x, 0.64))


@pytest.fixture
def model() -> HierarchicalVAE:
    torch.manual_seed(0)
    return HierarchicalVAE([ConvLevel(4, 8, 1, 2), VectorLevel(6, 16)], DiscretizedGaussian(17), (1, 8, 8))


def test_the_warm_up_raises_the_weight_of_the_costs(model: HierarchicalVAE) -> None:
    x0 = torch.zeros(6, 1, 8, 8)
    terms = ConsistencyElbo()(model, x0, torch.Generator().manual_seed(0))
    objective = NegativeElbo(ConsistencyElbo(), warmup=2)
    for weight in (0.0, 0.5, 1.0, 1.0):
        loss = objective(model, x0, torch.Generator().manual_seed(0))
        cost = terms.reconstruction - terms.total
        torch.testing.assert_close(loss, (weight * cost - terms.reconstruction) / 64)
    assert int(objective.eval().batches) == 4
    objective(model, x0)
    assert int(objective.batches) == 4
    assert "batches" not in NegativeElbo(ConsistencyElbo()).state_dict()


def test_free_nats_stop_the_pressure_on_a_level(model: HierarchicalVAE) -> None:
    x0 = torch.zeros(6, 1, 8, 8)
    with torch.no_grad():  # the levels cost something
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    terms = ConsistencyElbo()(model, x0, torch.Generator().manual_seed(0))
    first, second = (float(each.detach().mean()) for each in (terms.step_costs, terms.costs["prior_matching"]))
    free = 0.5 * (first + second)
    low, high = sorted((first, second))
    loss = NegativeElbo(ConsistencyElbo(), free_nats=free)(model, x0, torch.Generator().manual_seed(0)).mean()
    torch.testing.assert_close(float(loss.detach()), float(free + high - terms.reconstruction.detach().mean()) / 64)
    assert low < free < high
    for bound in (TrajectoryElbo(), ConsistencyElbo(steps=1)):
        with pytest.raises(InputError, match="free_nats = 1 needs the cost of each level"):
            NegativeElbo(bound, free_nats=1.0)
