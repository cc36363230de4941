"""Learned encoders and gammas for each pixel in runs: trained, gone on with, sampled, exported, refused."""

from pathlib import Path

import pytest
import torch
from builders import build, compared, differences
from conftest import run_ddpm
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.export import load_model, save_model
from ddpm_lightning.figures import schedule_curves
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import DenoisingElbo, NegativeElbo, NoiseMSE, UniformTimes
from ddpm_lightning.process import CategoricalDecoder, NetworkEncoder
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import AncestralSampler
from ddpm_lightning.schedules import LearnedGamma, PixelwiseGamma
from ddpm_lightning.training.sharding import check_shardable

LEARNED = [
    "--model.clip_x0=false",
    "--model.encoder=NetworkEncoder",
    "--model.encoder.network=UNet",
    "--model.encoder.network.width=8",
    "--model.encoder.network.multipliers=[1,2]",
    "--model.encoder.network.blocks=1",
    "--model.schedule=PixelwiseGamma",
    "--model.schedule.shape=[1,8,8]",
    "--model.schedule.T=8",
    "--model.objective=NegativeElbo",
    "--model.objective.bound=DenoisingElbo",
    "--model.objective.bound.steps=1",
    "--data.limit_val=16",
    "--trainer.limit_train_batches=4",
]

ANALYTIC = ["--model.variance.gammas=[0.0]", "--model.variance.eps_mse=[0.1]"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny: list[str]) -> Path:
    """A run of two epochs, stopped after the first."""
    folder = tmp_path_factory.mktemp("encoder")
    options = [*[option for option in tiny if "schedule" not in option], *LEARNED]
    for name, epochs in (("whole", 2), ("stopped", 1)):
        printed = run_ddpm("fit", *options, f"--run_dir={folder / name}", f"--trainer.max_epochs={epochs}")
        assert "SampleGrid draws with AncestralSampler: DDIMSampler does not know of NetworkEncoder" in printed
    run_ddpm("fit", str(folder / "stopped"), "--trainer.max_epochs=2")
    return folder


def test_a_run_goes_on_bit_for_bit(run: Path) -> None:
    whole, resumed = (compared(run / name / "checkpoints/last.ckpt") for name in ("whole", "stopped"))
    assert differences(whole, resumed) == []
    state, start = whole["state_dict"], PixelwiseGamma((1, 8, 8)).first
    assert isinstance(state, dict)
    for part in ("model", "ema_model"):
        assert (state[f"{part}.schedule.first"].cpu() != start).all()
        assert state[f"{part}.encoder.network.out_conv.weight"].abs().min() > 0
    assert (run / "whole/schedule.png").is_file() and (run / "whole/forward.png").is_file()


def test_a_run_is_evaluated_sampled_and_exported(run: Path, tmp_path: Path) -> None:
    folder = str(run / "whole")
    weighted = "{class_path: ImportanceWeightedElbo, init_args: {samples: 2}}"
    forms = f"[DenoisingElbo, ConsistencyElbo, TrajectoryElbo, ContinuousElbo, {weighted}]"
    printed = run_ddpm("test", folder, "--data.limit_test=8", f"--model.test_bounds={forms}")
    assert "continuous   diffusion" in printed and "nan" not in printed
    assert "iwae_2       jensen_gap" in printed and "one draw (iwae_2: 2) for each image" in printed
    run_ddpm("sample", folder, "--n=2", "--steps=3")
    file = tmp_path / "model.safetensors"
    run_ddpm("export", folder, "--to=safetensors", f"--out={file}")
    module, _ = Run(folder).load()
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    ours, exported = (
        AncestralSampler()(model, x_T, generators=torch.Generator().manual_seed(1))
        for model in (module.ema_model, load_model(file))
    )
    assert torch.equal(ours, exported)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["sample", "--sampler=HeunSampler"], "HeunSampler does not know of NetworkEncoder"),
        (["evaluate", "flow"], "the probability flow is that of a fixed encoder and one noise level"),
        (["evaluate", "variance"], "an analytic variance only with a fixed encoder and one noise level"),
        (
            ["export", "--to=diffusers", "--out=never"],
            "diffusers has no learned encoder and one noise level for all pixels",
        ),
        (["test", "--model.encoder.network.width=16"], "--model.encoder.network.width 16: the checkpoint was trained"),
        (["test", "--model.variance=AnalyticVariance", *ANALYTIC], "AnalyticVariance is made for a fixed encoder"),
    ],
)
def test_what_a_run_refuses(run: Path, arguments: list[str], sentence: str) -> None:
    place = 2 if arguments[0] == "evaluate" else 1
    printed = run_ddpm(*arguments[:place], str(run / "whole"), *arguments[place:], expect=2)
    assert sentence in printed and "Traceback" not in printed


class Halved(nn.Module):
    """An encoder's network that returns smaller images."""

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        return x[..., ::2, ::2]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"schedule": PixelwiseGamma((1, 4, 4))}, "shape [1, 4, 4]: the data's images have the shape [1, 8, 8]"),
        ({"encoder": NetworkEncoder(UNet(3, width=8))}, "--model.encoder NetworkEncoder cannot take the data's images"),
        ({"encoder": NetworkEncoder(Halved())}, "--model.encoder NetworkEncoder cannot take the data's images"),
        (
            {"encoder": NetworkEncoder(UNet(1, width=8, multipliers=(1, 2)))},
            "NetworkEncoder is learned through the bound",
        ),
    ],
)
def test_modules_that_do_not_fit_are_refused(changes: dict, sentence: str) -> None:
    objective = {} if "learned" in sentence else {"objective": NegativeElbo(DenoisingElbo(1))}
    with pytest.raises(InputError) as refused:
        build(**changes, **objective)
    assert sentence in str(refused.value)


def test_an_encoder_cannot_be_sharded() -> None:
    encoder = NetworkEncoder(UNet(1, width=8, multipliers=(1, 2), blocks=1))
    module = build(encoder=encoder, objective=NegativeElbo(DenoisingElbo(1)))
    with pytest.raises(InputError, match=r"trains model\.encoder\.network\..*, and only the network's weights"):
        check_shardable(module, "LinearChain", False, False)


def test_a_fixed_model_is_exported_as_it_always_was(tmp_path: Path) -> None:
    """No word of an encoder in the file, so that older versions can read it."""
    save_model(build(objective=NoiseMSE(UniformTimes())).model, tmp_path / "model.safetensors")
    assert b"encoder" not in (tmp_path / "model.safetensors").read_bytes()


def test_curves_of_pixels_are_drawn_as_a_band() -> None:
    one, each = LearnedGamma(units=8), PixelwiseGamma((1, 8, 8))
    assert torch.equal(schedule_curves({"a": one}), schedule_curves({"a": LearnedGamma(units=8)}))
    narrow = schedule_curves({"a": each})
    with torch.no_grad():
        each.first += torch.linspace(-2, 2, 64).reshape(1, 8, 8)
    assert (schedule_curves({"a": each}) != narrow).float().mean() > 0.01


def test_the_average_has_an_encoder_of_its_own() -> None:
    encoder = NetworkEncoder(UNet(1, width=8, multipliers=(1, 2), blocks=1))
    module = build(
        encoder=encoder, objective=NegativeElbo(DenoisingElbo(1)), decoder=CategoricalDecoder(17), clip_x0=False
    )
    assert module.ema_model.encoder is not encoder and module.model.encoder is encoder
    assert module.ema_model.forward_process.encoder is module.ema_model.encoder
    assert not any(p.requires_grad for p in module.ema_model.encoder.parameters())
    optimizer = module.configure_optimizers()
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert all(id(p) in held for p in encoder.parameters())
