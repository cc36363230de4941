"""Networks that give a distribution over grey levels: Bayes' rule against sums by hand, and the command line."""

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from builders import build
from conftest import run_ddpm
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.export import load_model
from ddpm_lightning.networks import LevelsUNet, UNet
from ddpm_lightning.objectives import ContinuousElbo, NoiseMSE, StratifiedTimes, WeightedMSE
from ddpm_lightning.process import (
    CategoricalDecoder,
    CategoricalParameterization,
    DiffusionModel,
    FixedSmallVariance,
    GammaConditioning,
    LearnedRangeVariance,
)
from ddpm_lightning.runs import Run
from ddpm_lightning.samplers import DDIMSampler
from ddpm_lightning.schedules import LinearGamma, PixelwiseGamma, Schedule, VarianceExploding

SMALL = {"width": 8, "multipliers": (1, 2), "blocks": 1}


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2,), (3, 2), (2, 3, 2)])
def test_the_prediction_is_the_mean_by_bayes_rule(shape: tuple[int, ...]) -> None:
    batch, channels, levels = 3, 2, 5
    logits, x_t = tensor(batch, channels * levels, *shape), tensor(batch, channels, *shape, seed=1)
    alpha = torch.tensor([0.9, 0.5, 1.0]).double().view(-1, 1, *(1,) * len(shape))
    sigma = torch.tensor([0.1, 0.8, 3.0]).double().view(-1, 1, *(1,) * len(shape))
    prediction = CategoricalParameterization().predict(logits, x_t, alpha, sigma)
    for b in range(batch):
        for c in range(channels):
            for place in torch.cartesian_prod(*map(torch.arange, shape)).view(-1, len(shape)).tolist():
                total = mean = 0.0
                for k in range(levels):
                    level = 2 * k / (levels - 1) - 1
                    distance = (float(x_t[(b, c, *place)]) - float(alpha[b]) * level) / float(sigma[b])
                    weight = math.exp(float(logits[(b, c * levels + k, *place)]) - distance**2 / 2)
                    total, mean = total + weight, mean + weight * level
                assert float(prediction.x0[(b, c, *place)]) == pytest.approx(mean / total, rel=1e-12, abs=1e-14)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t)


def test_a_gamma_for_each_pixel_and_any_dtype() -> None:
    logits, x_t = tensor(2, 17, 4, 4), tensor(2, 1, 4, 4, seed=1)
    schedule = PixelwiseGamma((1, 4, 4))
    scales = tuple(scale.detach() for scale in schedule.scales(torch.tensor([0.3, 0.6]).double(), x_t))
    exact = CategoricalParameterization().predict(logits, x_t, *scales).x0
    for pixel in ((0, 0, 0, 0), (1, 0, 3, 2)):
        b, _, i, j = pixel
        alone = CategoricalParameterization().predict(
            logits[b : b + 1, :, i : i + 1, j : j + 1],
            x_t[b : b + 1, :, i : i + 1, j : j + 1],
            *(scale.expand(x_t.shape)[b : b + 1, :, i : i + 1, j : j + 1] for scale in scales),
        )
        assert float(alone.x0) == pytest.approx(float(exact[pixel]), rel=1e-12)
    # the least noise of mnist_likelihood.yaml, in float32
    alpha, sigma = torch.tensor([[[[1.0]]]]), torch.tensor([[[[0.0013]]]])
    for k in (0, 100, 255):
        level = 2 * k / 255 - 1
        noisy = torch.full((1, 1, 1, 1), level + 0.0013)
        x0 = CategoricalParameterization().predict(torch.zeros(1, 256, 1, 1), noisy, alpha, sigma).x0
        assert float(x0) == pytest.approx(level, abs=1e-6)


class Known(nn.Module):
    """Says the same probabilities of the levels for every pixel."""

    def __init__(self, probabilities: Sequence[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(probabilities).double().log()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.logits.view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])


@pytest.mark.parametrize("probabilities", [(0.25, 0.25, 0.25, 0.25), (0.6, 0.0625, 0.3, 0.0375)])
def test_the_bound_of_independent_pixels_is_their_entropy(probabilities: Sequence[float]) -> None:
    model = DiffusionModel(
        Known(probabilities), LinearGamma(-12.0, 9.0, T=1000), CategoricalParameterization(), GammaConditioning(),
        FixedSmallVariance(), CategoricalDecoder(4), clip_x0=False,
    )  # fmt: skip
    generator, n = torch.Generator().manual_seed(0), 2000
    index = torch.multinomial(torch.tensor(probabilities), n * 16, replacement=True, generator=generator)
    x0 = (2 * index.view(n, 1, 4, 4) / 3 - 1).double()
    bits = -ContinuousElbo(40)(model, x0, generator).total / 16 / math.log(2)
    entropy = -sum(p * math.log2(p) for p in probabilities)
    assert abs(float(bits.mean()) - entropy) < 4 * float(bits.std()) / n**0.5 < 0.05


def test_the_logits_are_functions_of_the_level_and_of_the_histogram() -> None:
    network = LevelsUNet(2, 9, rank=5, context=16, **SMALL).double()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel()))
    x, t = tensor(3, 2, 8, 8).clamp(-1.5, 1.5), torch.tensor([0.1, 0.5, 0.9]).double()
    logits = network(x, t)
    assert logits.shape == (3, 18, 8, 8) and logits.dtype == x.dtype
    # less what all pixels share, the logits have rank 5 at most
    apart = logits.unflatten(1, (2, 9)).movedim(2, -1)
    apart = apart - apart[:, :, :1, :1]
    assert int(torch.linalg.matrix_rank(apart.flatten(0, -2), rtol=1e-9)) == 5
    histogram = network._histogram(torch.tensor([[[-1.0, -0.875], [5.0, 0.25]], [[0.0, 0.0], [-7.0, 1.0]]])[None])
    assert histogram.view(2, 9).tolist() == [[1.5, 0.5, 0, 0, 0, 1, 0, 0, 1], [1, 0, 0, 0, 2, 0, 0, 0, 1]]
    assert network(x.fill_(torch.nan), t).isnan().all()
    # without the perceptron, and at first
    assert LevelsUNet(1, 9, context=0, **SMALL).shared is None
    first = LevelsUNet(1, 9, **SMALL)
    assert first(torch.zeros(1, 1, 8, 8), torch.zeros(1)).abs().max() == 0
    plain, same = UNet(1, out_channels=9, **SMALL), LevelsUNet(1, 9, **SMALL)
    assert {name for name, _ in same.named_parameters() if "shared" not in name} == {
        name for name, _ in plain.named_parameters()
    }
    assert LevelsUNet(2, 9, patch=2, **SMALL)(x.float(), t.float()).shape == (3, 18, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"levels": 1}, "levels = 1"), ({"rank": 2}, "rank = 2"), ({"context": -1}, "context = -1")],
)
def test_refused_by_the_network(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message} must be . or more"):
        LevelsUNet(1, **options)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="fields have none: use VParameterization"):
        CategoricalParameterization.output_channels(1, None)
    with pytest.raises(InputError, match="give the objective another target"):
        WeightedMSE(StratifiedTimes(), target=CategoricalParameterization())
    with pytest.raises(InputError, match=r"under CategoricalParameterization it must return \[17, 8, 8\].*channels 17"):
        build(network=UNet(1, **SMALL), parameterization=CategoricalParameterization())


def test_a_network_of_logits_is_refused_where_it_does_not_fit() -> None:
    categorical = {"parameterization": CategoricalParameterization()}
    for options, words in (
        ({"network": LevelsUNet(1, 18, **SMALL), **categorical}, "made for 18 grey levels and the data have 17"),
        ({"network": LevelsUNet(1, 17, **SMALL)}, "give it --model.parameterization CategoricalParameterization"),
        (
            {"network": LevelsUNet(1, 17, **SMALL), **categorical, "variance": LearnedRangeVariance()},
            "LevelsUNet has no output for LearnedRangeVariance",
        ),
    ):
        with pytest.raises(InputError, match=words):
            build(**options)


@pytest.mark.parametrize("exploding", [False, True])
def test_it_trains_under_any_schedule(exploding: bool) -> None:
    schedule: Schedule = LinearGamma(-9.0, 5.0, T=12)
    schedule = VarianceExploding(schedule) if exploding else schedule
    network = LevelsUNet(1, 17, **SMALL)
    module = build(network=network, schedule=schedule, parameterization=CategoricalParameterization())
    x0 = (2 * torch.randint(17, (16, 1, 8, 8), generator=torch.Generator().manual_seed(0)) / 16 - 1).float()
    loss = NoiseMSE(StratifiedTimes())(module.model, x0, torch.Generator().manual_seed(1)).mean()
    loss.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert torch.isfinite(loss) and network.out_conv.weight.grad.abs().max() > 0


def test_a_learned_variance_has_its_channels_beside_the_levels() -> None:
    network = UNet(1, out_channels=18, **SMALL)
    torch.nn.init.normal_(network.out_conv.weight, generator=torch.Generator().manual_seed(0))
    model = DiffusionModel(
        network, LinearGamma(-9.0, 5.0, T=12), CategoricalParameterization(), GammaConditioning(),
        LearnedRangeVariance(), CategoricalDecoder(17),
    )  # fmt: skip
    x, t = tensor(2, 1, 8, 8).float(), torch.tensor([0.5, 1.0]).double()
    prediction = model.denoiser(x, t)
    output = network(x, (model.schedule.gamma(t) / 20).float())
    assert prediction.variance_output is not None and torch.equal(prediction.variance_output, output[:, 17:])
    assert prediction.output.shape == (2, 17, 8, 8) and prediction.x0.shape == x.shape


@pytest.mark.cli
def test_on_the_command_line_it_follows_the_data(tiny: list[str], tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    parts = ["--model.network=LevelsUNet", "--model.network.context=8", "--model.parameterization"]
    run_ddpm("fit", *tiny, *parts, "CategoricalParameterization", f"--run_dir={run}", "--trainer.max_epochs=1")
    assert "denoising    elbo" in run_ddpm("test", run, "--data.limit_test=8")
    assert "4 images" in run_ddpm("sample", run, "--n=4", "--steps=3", f"--out={tmp_path}/samples")
    run_ddpm("export", run, "--to=safetensors", f"--out={tmp_path}/model.safetensors")
    model, (module, _) = load_model(tmp_path / "model.safetensors"), Run(run).load()
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = [DDIMSampler()(each, x_T, generators=torch.Generator()) for each in (model, module.ema_model)]
    torch.testing.assert_close(*drawn)
    plain = ["--model.parameterization", "CategoricalParameterization", "--trainer.max_steps=1"]
    run_ddpm("fit", *tiny, *plain, f"--run_dir={tmp_path}/plain")  # a UNet gets as many channels as there are levels
    assert "out_channels: 17" in (tmp_path / "plain/config.yaml").read_text()
