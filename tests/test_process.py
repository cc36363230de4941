"""Forward and reverse processes against Bayes' rule and the formulas of the lecture, then the model as a module."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import ScalarGaussianWorld, assert_mean, assert_moments, linear_betas, oracle_model
from torch import Tensor, nn

from ddpm_lightning.distributions import DiagonalGaussian
from ddpm_lightning.errors import InputError
from ddpm_lightning.objectives import NoiseMSE, UniformTimes
from ddpm_lightning.process import (
    AnalyticVariance,
    ClippedDenoiser,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    ForwardProcess,
    GammaConditioning,
    NoiseConditioning,
    ReverseVariance,
    TimeConditioning,
)
from ddpm_lightning.samplers import AncestralSampler
from ddpm_lightning.schedules import BetaChain, LinearChain, Schedule, chain_grid, strided_grid

BETAS = linear_betas(20, 0.01, 0.4)
WORLD = ScalarGaussianWorld(0.3, 0.25, BETAS, "beta")
ABAR = WORLD.abar
PAIRS = [(1, 2), (5, 6), (19, 20), (3, 11), (1, 20)]


def times(*indices: int) -> Tensor:
    return torch.tensor(indices, dtype=torch.float64) / len(BETAS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Recorder(nn.Module):
    """A small network that keeps every second argument it is given."""

    def __init__(self, scale: float = 0.1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((), scale))
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        self.seen.append(t.detach().clone())
        self.cond = cond
        return self.weight * x


def build(
    network: nn.Module,
    *,
    schedule: Schedule | None = None,
    conditioning: NoiseConditioning | None = None,
    variance: ReverseVariance | None = None,
    clip_x0: bool = True,
) -> DiffusionModel:
    return DiffusionModel(
        network=network,
        schedule=schedule or BetaChain(BETAS),
        parameterization=EpsParameterization(),
        conditioning=conditioning or TimeConditioning(),
        variance=variance or FixedLargeVariance(),
        decoder=DiscretizedGaussian(levels=256),
        clip_x0=clip_x0,
    )


# --- the forward process


@pytest.mark.parametrize(("s", "t"), PAIRS)
def test_posterior_is_bayes_rule(s: int, t: int) -> None:
    """q(x_s | x_t, x_0) is the normalised product of q(x_s | x_0) and q(x_t | x_s) as functions of x_s."""
    x0, x_t = normal(4, 1, 4, 4), normal(4, 1, 4, 4, seed=1)
    ratio = math.sqrt(ABAR[t] / ABAR[s])
    step_var = 1 - ABAR[t] / ABAR[s]
    precision = 1 / (1 - ABAR[s]) + ratio**2 / step_var
    mean = (math.sqrt(ABAR[s]) * x0 / (1 - ABAR[s]) + ratio * x_t / step_var) / precision
    posterior = ForwardProcess(BetaChain(BETAS)).posterior(x0, x_t, times(s)[0], times(t)[0])
    torch.testing.assert_close(posterior.mean, mean, rtol=1e-10, atol=1e-10)
    assert posterior.log_var.exp().flatten().tolist() == pytest.approx([1 / precision], rel=1e-10)


@pytest.mark.parametrize("t", [1, 2, 3, 10, 20])
def test_posterior_coefficients(t: int) -> None:
    """mu~ = sqrt(abar_{t-1}) beta_t / (1 - abar_t) x_0 + sqrt(alpha_t) (1 - abar_{t-1}) / (1 - abar_t) x_t."""
    process = ForwardProcess(BetaChain(BETAS))
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    s_time, t_time = times(t - 1)[0], times(t)[0]
    beta = BETAS[t - 1]
    c0 = math.sqrt(ABAR[t - 1]) * beta / (1 - ABAR[t])
    ct = math.sqrt(1 - beta) * (1 - ABAR[t - 1]) / (1 - ABAR[t])
    assert process.posterior_mean(one, zero, s_time, t_time).item() == pytest.approx(c0, rel=1e-10)
    assert process.posterior_mean(zero, one, s_time, t_time).item() == pytest.approx(ct, rel=1e-10, abs=1e-15)


def test_posterior_mean_at_the_data_is_x0() -> None:
    x0, x_t = normal(2, 1, 4, 4), normal(2, 1, 4, 4, seed=1)
    for t in (1, 7, 20):
        assert torch.equal(ForwardProcess(BetaChain(BETAS)).posterior_mean(x0, x_t, times(0)[0], times(t)[0]), x0)


def test_marginal_and_transition() -> None:
    process, x = ForwardProcess(BetaChain(BETAS)), normal(1, 1, 4, 4)
    for t in (1, 2, 10, 20):
        marginal = process.marginal(x, times(t)[0])
        torch.testing.assert_close(marginal.mean, math.sqrt(ABAR[t]) * x, rtol=1e-12, atol=0)
        assert marginal.log_var.exp().item() == pytest.approx(1 - ABAR[t], rel=1e-12)
        step = process.transition(x, times(t - 1)[0], times(t)[0])
        torch.testing.assert_close(step.mean, math.sqrt(1 - BETAS[t - 1]) * x, rtol=1e-12, atol=0)
        assert step.log_var.exp().item() == pytest.approx(BETAS[t - 1], rel=1e-10)
        from_data = process.transition(x, times(0)[0], times(t)[0])
        torch.testing.assert_close(from_data.mean, marginal.mean, rtol=1e-12, atol=0)
        torch.testing.assert_close(from_data.log_var, marginal.log_var, rtol=1e-12, atol=0)


def test_marginal_at_zero_is_the_image() -> None:
    process, x0 = ForwardProcess(BetaChain(BETAS)), normal(3, 1, 2, 2)
    assert torch.equal(process.marginal(x0, torch.zeros(3)).sample(torch.Generator().manual_seed(0)), x0)


@pytest.mark.parametrize("indices", [list(range(1, 21)), [2, 3, 11, 20]])
def test_path_has_the_joint_distribution(indices: list[int]) -> None:
    """Every state has q(x_t | x_0), and states at s < t have covariance sqrt(abar_t / abar_s) (1 - abar_s)."""
    n, x0 = 20_000, 0.7
    images = torch.full((n, 1, 1, 1), x0, dtype=torch.float64)
    process = ForwardProcess(BetaChain(BETAS))
    path = list(process.path(images, times(*indices), torch.Generator().manual_seed(0)))
    assert len(path) == len(indices)
    for t, x_t in zip(indices, path, strict=True):
        assert_moments(x_t, math.sqrt(ABAR[t]) * x0, 1 - ABAR[t])
    centred = [x_t - math.sqrt(ABAR[t]) * x0 for t, x_t in zip(indices, path, strict=True)]
    for i, j in [(0, 1), (1, 2), (0, len(path) - 1), (1, len(path) - 2)]:
        low, high = sorted((indices[i], indices[j]))
        assert_mean(centred[i] * centred[j], math.sqrt(ABAR[high] / ABAR[low]) * (1 - ABAR[low]), max_se=0.008)


# --- one time for each image


def calls() -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], DiagonalGaussian]]:
    process = ForwardProcess(BetaChain(BETAS))
    variances: dict[str, ReverseVariance] = {
        "large": FixedLargeVariance(),
        "small": FixedSmallVariance(),
        "analytic": AnalyticVariance([-3.0, 0.0, 3.0], [0.8, 0.5, 0.1]),
    }
    models = {name: build(nn.Identity(), variance=variance) for name, variance in variances.items()}
    for model in models.values():
        model.network.forward = lambda x, t: torch.tanh(x) + t.reshape(-1, 1, 1, 1)

    def decoder(model: DiffusionModel, x: Tensor, s: Tensor, t: Tensor) -> DiagonalGaussian:
        return model.reverse_process.decoder_gaussian(model.reverse_process.denoiser(x, s), x, s, t)

    return {
        "marginal": lambda x0, x, s, t: process.marginal(x0, t),
        "transition": lambda x0, x, s, t: process.transition(x, s, t),
        "posterior": lambda x0, x, s, t: process.posterior(x0, x, s, t),
        "reverse, large": lambda x0, x, s, t: models["large"].reverse_process.transition(x, s, t),
        "reverse, small": lambda x0, x, s, t: models["small"].reverse_process.transition(x, s, t),
        "reverse, analytic": lambda x0, x, s, t: models["analytic"].reverse_process.transition(x, s, t),
        "decoder, analytic": lambda x0, x, s, t: decoder(models["analytic"], x, s, t),
        "decoder": lambda x0, x, s, t: decoder(models["small"], x, s, t),
    }


@pytest.mark.parametrize("name", calls())
def test_times_per_image_when_batch_equals_width(name: str) -> None:
    """[B] times on images with B = C = H = W give what a loop over the images gives."""
    call = calls()[name]
    x0, x = normal(4, 4, 4, 4), normal(4, 4, 4, 4, seed=1)
    s, t = times(1, 4, 9, 14), times(3, 5, 20, 15)
    batch = call(x0, x, s, t)
    for k in range(4):
        one = call(x0[k : k + 1], x[k : k + 1], s[k], t[k])
        torch.testing.assert_close(batch.mean[k : k + 1], one.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(batch.log_prob(x)[k : k + 1], one.log_prob(x[k : k + 1]), rtol=1e-12, atol=1e-10)
        torch.testing.assert_close(batch.entropy()[k : k + 1], one.entropy(), rtol=1e-12, atol=1e-10)
        noise = batch.sample(torch.Generator().manual_seed(0))[k] - batch.mean[k]
        raw = torch.randn(4, 4, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)[k]
        std = one.log_var.exp().sqrt().item()
        torch.testing.assert_close(noise, std * raw, rtol=1e-9, atol=1e-9)


def test_wrong_times_are_refused() -> None:
    process, x = ForwardProcess(BetaChain(BETAS)), normal(4, 1, 2, 2)
    with pytest.raises(ValueError, match="one time for each of 4 images"):
        process.marginal(x, times(1, 2, 3))


# --- denoisers


@pytest.mark.parametrize("scale", [0.0, 0.1, 30.0, -30.0])
@pytest.mark.parametrize("clip_x0", [False, True])
def test_x0_and_eps_agree(scale: float, clip_x0: bool) -> None:
    """Trap 4: x_t = alpha_t x0 + sigma_t eps before and after clipping."""
    model = build(Recorder(scale).double(), clip_x0=clip_x0)
    x_t, t = 2 * normal(4, 1, 4, 4), times(1, 5, 13, 20)
    prediction = model.reverse_process.denoiser(x_t, t)
    abar = torch.tensor([ABAR[i] for i in (1, 5, 13, 20)], dtype=torch.float64).reshape(-1, 1, 1, 1)
    rebuilt = abar.sqrt() * prediction.x0 + (1 - abar).sqrt() * prediction.eps
    torch.testing.assert_close(rebuilt, x_t, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(prediction.output, scale * x_t, rtol=1e-6, atol=0)
    raw = model.denoiser(x_t, t)
    torch.testing.assert_close(raw.eps, scale * x_t, rtol=1e-6, atol=0)
    if clip_x0:
        torch.testing.assert_close(prediction.x0, raw.x0.clamp(-1, 1), rtol=0, atol=0)
        if abs(scale) > 1:
            assert bool((raw.x0.abs() > 1).any())
            assert bool((prediction.eps != raw.eps).any())
    else:
        torch.testing.assert_close(prediction.x0, raw.x0, rtol=0, atol=0)


def test_clipped_denoiser_leaves_predictions_in_range_alone() -> None:
    model = build(Recorder(0.9).double(), clip_x0=False)
    x_t, t = 0.1 * normal(4, 1, 4, 4), times(1, 2, 3, 4)
    raw, clipped = model.denoiser(x_t, t), ClippedDenoiser(model.denoiser)(x_t, t)
    assert bool((raw.x0.abs() <= 1).all())
    assert torch.equal(raw.x0, clipped.x0)
    torch.testing.assert_close(clipped.eps, raw.eps, rtol=1e-9, atol=1e-12)
    assert ClippedDenoiser(model.denoiser).schedule is model.schedule


def test_eps_parameterization_target_inverts_predict() -> None:
    x0, eps = normal(3, 1, 2, 2), normal(3, 1, 2, 2, seed=1)
    alpha, sigma = torch.full((3, 1, 1, 1), 0.6).double(), torch.full((3, 1, 1, 1), 0.8).double()
    parameterization = EpsParameterization()
    target = parameterization.target(x0, eps, alpha, sigma)
    prediction = parameterization.predict(target, alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(prediction.x0, x0)
    torch.testing.assert_close(prediction.eps, eps)


@pytest.mark.parametrize("conditioning", [TimeConditioning(), GammaConditioning(scale=10.0)])
@pytest.mark.parametrize("steps", [20, 7])
def test_training_and_sampling_give_the_network_the_same_scalar(conditioning: NoiseConditioning, steps: int) -> None:
    """Trap 11: a strided sampler meets exactly those numbers that training showed for the same times."""
    schedule = LinearChain(20, 0.01, 0.4)
    network = Recorder()
    model = build(network, schedule=schedule, conditioning=conditioning)
    x0 = torch.zeros(1000, 1, 1, 1)
    NoiseMSE(UniformTimes())(model, x0, torch.Generator().manual_seed(0))
    trained = set(network.seen.pop().tolist())
    assert len(trained) == 20
    AncestralSampler()(model, torch.zeros(2, 1, 2, 2), grid=strided_grid(chain_grid(20), steps))
    assert len(network.seen) == steps
    assert all(level.shape == (2,) for level in network.seen)
    sampled = [level.unique().item() for level in network.seen]
    assert set(sampled) <= trained
    grid = strided_grid(chain_grid(20), steps).flip(0)[:-1]
    levels = grid if isinstance(conditioning, TimeConditioning) else schedule.gamma(grid) / 10
    assert sampled == levels.float().tolist()


def test_network_in_bfloat16_still_tells_the_steps_apart() -> None:
    """The scalar must not lose its steps on the way to a network whose weights are bfloat16."""
    network = Recorder().bfloat16()
    model = build(network, schedule=LinearChain(1000))
    model.denoiser(torch.zeros(1000, 1, 1, 1), chain_grid(1000)[1:])
    assert len(network.seen[0].unique()) == 1000


def test_conditions_reach_the_network() -> None:
    network = Recorder()
    model = build(network)
    label = torch.tensor([3, 1])
    model.reverse_process.transition(torch.zeros(2, 1, 2, 2), times(1)[0], times(2)[0], label=label)
    assert network.cond["label"] is label
    network.cond = {}
    model.decoder_gaussian(torch.zeros(2, 1, 2, 2), label=label)
    assert network.cond["label"] is label


# --- the reverse process


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_reverse_variances(variance: str) -> None:
    world = ScalarGaussianWorld(0.3, 0.25, BETAS, variance)
    model = oracle_model(world)
    x = normal(2, 1, 2, 2)
    for t in range(2, 21):
        step = model.reverse_process.transition(x, times(t - 1)[0], times(t)[0])
        assert step.log_var.exp().item() == pytest.approx(world.reverse_var(t), rel=1e-10)
    assert model.decoder_gaussian(x).log_var.exp().item() == pytest.approx(world.reverse_var(1), rel=1e-10)


def test_reverse_mean_is_the_posterior_at_the_predicted_image() -> None:
    model = build(Recorder(0.7).double(), clip_x0=True)
    x_t, s, t = 3 * normal(4, 1, 4, 4), times(1, 4, 9, 14), times(3, 5, 20, 15)
    x0 = model.denoiser(x_t, t).x0.clamp(-1, 1)
    expected = model.forward_process.posterior(x0, x_t, s, t).mean
    torch.testing.assert_close(model.reverse_process.transition(x_t, s, t).mean, expected, rtol=1e-12, atol=1e-12)


def test_small_variance_needs_two_steps() -> None:
    """Trap 5: beta~_1 = 0 and there is no beta~_2 to stand in for it."""
    with pytest.raises(InputError, match="FixedLargeVariance, or a larger T"):
        build(Recorder(), schedule=BetaChain([0.3]), variance=FixedSmallVariance())
    assert build(Recorder(), schedule=BetaChain([0.3]), variance=FixedLargeVariance()).T == 1
    small = build(Recorder(), schedule=BetaChain([0.3, 0.4]), variance=FixedSmallVariance())
    assert bool(small.decoder_gaussian(torch.zeros(1, 1, 1, 1)).log_var.isfinite().all())


# --- the model as a module


def test_state_dict_names_each_tensor_once() -> None:
    model = build(nn.Conv2d(1, 1, 3, padding=1))
    state = model.state_dict()
    assert sorted(state) == ["network.bias", "network.weight"]
    assert len(list(model.parameters())) == 2
    other = build(nn.Conv2d(1, 1, 3, padding=1))
    other.load_state_dict(state)
    assert torch.equal(other.network.weight, model.network.weight)


def test_deepcopy_is_a_model_of_its_own() -> None:
    model = build(Recorder(0.5))
    twin = copy.deepcopy(model)
    x, t = torch.ones(2, 1, 2, 2), times(5)[0]
    before = model.denoiser(x, t).eps.clone()
    with torch.no_grad():
        twin.network.weight.fill_(2.0)
    assert torch.equal(model.denoiser(x, t).eps, before)
    assert bool((twin.denoiser(x, t).eps == 2).all())
    assert bool((twin.reverse_process.denoiser(x, t).output == 2).all())
    assert twin.reverse_process.forward_process.schedule is twin.schedule


def test_autocast_network_gives_float32_images() -> None:
    """Trap 29: only the network runs in half precision."""
    torch.manual_seed(0)

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.output: Tensor = self.layer(x)
            return self.output

    network = Convolution()
    model = build(network, clip_x0=False)
    x = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model.denoiser(x, times(20)[0])
        images = AncestralSampler()(model, x, generators=torch.Generator().manual_seed(0))
        loss = NoiseMSE(UniformTimes())(model, x, torch.Generator().manual_seed(0))
    assert network.output.dtype == torch.bfloat16
    assert prediction.x0.dtype == prediction.eps.dtype == images.dtype == torch.float32
    assert loss.dtype == torch.float64
    sigma, alpha = math.sqrt(1 - ABAR[20]), math.sqrt(ABAR[20])
    torch.testing.assert_close(prediction.x0, (x - sigma * prediction.eps) / alpha, rtol=1e-5, atol=1e-5)


def test_network_in_its_own_precision() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = build(Recorder().to(dtype))
        prediction = model.denoiser(torch.ones(2, 1, 2, 2), times(3)[0])
        assert prediction.x0.dtype == prediction.eps.dtype == torch.float32
        assert prediction.eps.flatten().tolist() == pytest.approx([0.1] * 8, rel=1e-2)
