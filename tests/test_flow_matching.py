"""Flow matching in the frame of diffusion: the straight path, the velocity, its loss and its times."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from oracles import assert_mean
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    ElboEstimator,
    LogitNormalTimes,
    LogitNormalWeighting,
    StratifiedTimes,
    TrajectoryElbo,
    UniformTimes,
    VelocityWeighting,
    WeightedMSE,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    CategoricalDecoder,
    DiffusionModel,
    DiscretizedGaussian,
    EpsParameterization,
    FixedSmallVariance,
    GammaConditioning,
    Parameterization,
    TimeConditioning,
    VelocityParameterization,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, Sampler
from ddpm_lightning.schedules import CosineGamma, LinearChain, LinearGamma, Schedule, StraightPath
from ddpm_lightning.schedules.continuous import ContinuousSchedule

PATH = StraightPath(T=12)
T = torch.linspace(0, 1, 101, dtype=torch.float64)


def network() -> UNet:
    torch.manual_seed(0)
    net = UNet(width=8, multipliers=(1, 2), blocks=1)
    for parameter in net.parameters():  # it is 0 at first
        nn.init.normal_(parameter, std=0.2)
    return net.double().eval()


def model_of(
    net: nn.Module,
    schedule: Schedule = PATH,
    parameterization: Parameterization | None = None,
    decoder: Any = None,
    conditioning: Any = None,
) -> DiffusionModel:
    return DiffusionModel(
        net,
        schedule,
        parameterization or VelocityParameterization(),
        conditioning or TimeConditioning(),
        FixedSmallVariance(),
        decoder or DiscretizedGaussian(17),
        clip_x0=False,
    )


def images(count: int = 6) -> Tensor:
    return torch.randint(0, 17, (count, 1, 8, 8), generator=torch.Generator().manual_seed(1)).double() / 8 - 1


def test_the_path_is_straight() -> None:
    tau = 1e-3 + (0.999 - 1e-3) * T
    torch.testing.assert_close(PATH.alpha(T), 1 - tau, rtol=1e-12, atol=0)
    torch.testing.assert_close(PATH.sigma(T), tau, rtol=1e-12, atol=0)
    torch.testing.assert_close(PATH.log_unit_var(T).exp(), (1 - tau) ** 2 + tau**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(PATH.gamma(T), PATH.log_sigma2(T) - 2 * PATH.log_alpha(T), rtol=1e-12, atol=1e-12)
    data = torch.tensor(-1.0).double()
    assert (float(PATH.alpha(data)), float(PATH.sigma(data)), float(PATH.gamma(data))) == (1.0, 0.0, -math.inf)
    t = T.clone().requires_grad_()
    (slope,) = torch.autograd.grad(PATH.gamma(t).sum(), t)
    torch.testing.assert_close(PATH.gamma_slope(T), slope, rtol=1e-10, atol=0)
    assert not PATH.preserves_variance


@pytest.mark.parametrize(("first", "last"), [(0.0, 0.9), (0.5, 0.5), (0.1, 1.0), (-0.1, 0.5), (math.nan, 0.5)])
def test_cuts_that_make_no_sense_are_refused(first: float, last: float) -> None:
    with pytest.raises(InputError, match=r"first = .* must lie between 0 and last"):
        StraightPath(first, last)


class _SameNoise(ContinuousSchedule):
    """The gamma of the straight path, with variance preserved."""

    def __init__(self) -> None:
        super().__init__(T=12)

    def state_gamma(self, t: Tensor) -> Tensor:
        return PATH.state_gamma(t)

    def gamma_slope(self, t: Tensor) -> Tensor:
        return PATH.gamma_slope(t)


@pytest.mark.parametrize("estimator", [DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo(), ContinuousElbo(4)])
@pytest.mark.parametrize("decoder", [DiscretizedGaussian(17), CategoricalDecoder(17)])
def test_the_bound_does_not_depend_on_the_units_of_x(estimator: ElboEstimator, decoder: Any) -> None:
    """A network that sees x_t in units of its standard deviation is the same model on both paths."""
    bounds = [
        estimator(
            model_of(network(), schedule, EpsParameterization(), decoder, GammaConditioning()),
            images(),
            image_generators(0, range(6)),
        ).total
        for schedule in (PATH, _SameNoise())
    ]
    torch.testing.assert_close(*bounds, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [PATH, LinearGamma(), LinearChain(12)])
def test_velocity_and_its_target_fit(schedule: Schedule) -> None:
    x0, eps = images(), torch.randn(6, 1, 8, 8).double()
    t = schedule.grid()[[1, 2, 5, 7, 9, 12]]
    alpha, sigma = schedule.scales(t, x0)
    velocity = VelocityParameterization()
    assert torch.equal(velocity.target(x0, eps, alpha, sigma), eps - x0)
    prediction = velocity.predict(eps - x0, alpha * x0 + sigma * eps, alpha, sigma)
    torch.testing.assert_close(prediction.x0, x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(prediction.eps, eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("schedule", [PATH, CosineGamma(), LinearChain(12, 0.01, 0.3)])
def test_the_velocity_loss_is_a_weighting(schedule: Schedule) -> None:
    losses = [
        WeightedMSE(StratifiedTimes(), target, weighting)(model_of(network(), schedule), images(), torch.Generator())
        for target, weighting in ((VelocityParameterization(), None), (None, VelocityWeighting()))
    ]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=0)


def test_the_loss_is_that_of_flow_matching() -> None:
    """|eps - x0 - u(x_t, t)|^2 at logit-normal times, nothing else."""
    model, x0 = model_of(network()), images(64)
    seen: list[tuple[Tensor, ...]] = []
    forward = model.forward_process.noised

    def noised(x0: Tensor, t: Tensor, generators: Any) -> tuple[Tensor, Tensor]:
        x_t, eps = forward(x0, t, generators)
        seen.append((t, x_t, eps))
        return x_t, eps

    model.forward_process.noised = noised  # type: ignore[method-assign]
    objective = WeightedMSE(LogitNormalTimes(0.2, 0.8), weighting=LogitNormalWeighting(0.2, 0.8), continuous=True)
    loss = objective(model, x0, torch.Generator().manual_seed(3))
    ((t, x_t, eps),) = seen
    scale = torch.exp(-0.5 * PATH.log_unit_var(t)).reshape(-1, 1, 1, 1)
    u = model.network(x_t * scale, t)
    torch.testing.assert_close(loss, (eps - x0 - u).square().flatten(1).mean(1), rtol=1e-8, atol=0)
    tau = PATH.sigma(t).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(x_t, (1 - tau) * x0 + tau * eps)
    assert_mean(torch.logit(t), 0.2, max_se=0.11)
    assert float(torch.logit(t).std()) == pytest.approx(0.8, abs=0.15)


@pytest.mark.parametrize("times", [None, UniformTimes()])
def test_logit_normal_times_are_unbiased(times: Any) -> None:
    """With std 1.5 the weights have a finite variance for these functions."""
    sampler, like = LogitNormalTimes(0.3, 1.5, times), torch.empty(1000, 1)
    draws = [sampler(like, torch.Generator().manual_seed(seed)) for seed in range(200)]
    for f, integral in (
        (torch.square, 1 / 3),
        (lambda u: u * (1 - u), 1 / 6),
        (lambda u: torch.sin(math.pi * u), 2 / math.pi),
    ):
        means = torch.stack([(draw.weight * f(draw.position)).mean() for draw in draws])
        assert_mean(means, integral, max_se=0.01)
    assert all(bool(((draw.position >= 0) & (draw.position < 1)).all()) for draw in draws)


def test_the_density_is_one() -> None:
    u = (torch.arange(100_000).double() + 0.5) / 100_000
    weighting = LogitNormalWeighting(0.5, 0.7)
    density = weighting(PATH, u) / VelocityWeighting()(PATH, u)
    assert float(density.mean()) == pytest.approx(1, abs=1e-6)
    ends = weighting(LinearGamma(), torch.tensor([0.0, 1.0]).double())
    assert ends.tolist() == [0.0, 0.0]
    for make in (LogitNormalWeighting, LogitNormalTimes):
        with pytest.raises(InputError, match="std = 0 must be positive"):
            make(std=0.0)


class _ThroughTheOtherDoor(nn.Module):
    """A velocity network read as one of eps: eps = (x_t + alpha u) / (alpha + sigma)."""

    def __init__(self, net: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.net, self.schedule = net, schedule

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.schedule.scales(t, x)
        x_t = x * torch.exp(0.5 * self.schedule.log_unit_var(t)).reshape(-1, 1, 1, 1).to(x)
        return (x_t + alpha * self.net(x, t)) / (alpha + sigma)


def doors() -> tuple[DiffusionModel, DiffusionModel]:
    net = network()
    return model_of(net), model_of(_ThroughTheOtherDoor(net, PATH), parameterization=EpsParameterization())


def test_two_doors_give_the_same_losses_and_bits() -> None:
    for objective in (
        WeightedMSE(StratifiedTimes(), VelocityParameterization()),
        WeightedMSE(LogitNormalTimes(), weighting=LogitNormalWeighting(), continuous=True),
    ):
        losses = [objective(model, images(), torch.Generator().manual_seed(0)) for model in doors()]
        torch.testing.assert_close(*losses, rtol=1e-8, atol=0)
    for estimator in (DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo(), ContinuousElbo(5)):
        totals = [estimator(model, images(), image_generators(0, range(6))).total for model in doors()]
        torch.testing.assert_close(*totals, rtol=1e-8, atol=1e-6)


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler(), DPMSolverSampler(), HeunSampler()])
@torch.no_grad()
def test_two_doors_give_the_same_samples(sampler: Sampler) -> None:
    x_T = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    states: list[list[Tensor]] = [[], []]
    for model, seen in zip(doors(), states, strict=True):
        sampler(
            model, x_T, generators=torch.Generator().manual_seed(0), callback=lambda x, t, seen=seen: seen.append(x)
        )
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_a_step_of_ddim_is_an_euler_step_along_the_velocity() -> None:
    model = model_of(network())
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    states: list[tuple[Tensor, Tensor]] = [(x, model.grid[-1])]
    DDIMSampler()(model, x, callback=lambda x, t: states.append((x, t)))
    for (x_t, t), (x_s, s) in list(pairwise(states))[:-1]:  # the last is the decoder's
        u = model.denoiser(x_t, t).output
        torch.testing.assert_close(x_s, x_t + (PATH.sigma(s) - PATH.sigma(t)) * u, rtol=1e-9, atol=1e-9)
