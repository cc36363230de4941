"""The U-Net on fields: one to three dimensions, periodic lattices, and conditions that are numbers or fields."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning.networks import UNet
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    DenoisingElbo,
    NoiseMSE,
    TrajectoryElbo,
    UniformTimes,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    ClassifierFreeDenoiser,
    DiffusionModel,
    FixedSmallVariance,
    GammaConditioning,
    PlainGaussian,
    VParameterization,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, DPMSolverSampler, HeunSampler, ProbabilityFlow
from ddpm_lightning.schedules import LinearGamma

SPACES: dict[int, tuple[int, ...]] = {1: (24,), 2: (8, 12), 3: (4, 8, 12)}


def network(dims: int, channels: int = 2, **arguments: Any) -> UNet:
    torch.manual_seed(0)
    net = UNet(channels, width=8, multipliers=(1, 2, 2), blocks=1, attention=(1,), dims=dims, **arguments)
    for parameter in net.parameters():  # it is 0 at first
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def deviation(net: UNet, dims: int, shift: int, dtype: torch.dtype) -> float:
    """Largest change of the output, relative to its size, where input and output are shifted along each axis."""
    x, t = torch.randn(3, 2, *SPACES[dims], dtype=dtype), torch.rand(3, dtype=dtype)
    net = net.to(dtype)
    with torch.no_grad():
        y = net(x, t)
        moved = [
            (net(x.roll(shift, axis), t).roll(-shift, axis) - y).abs().max() / y.abs().max()
            for axis in range(2, 2 + dims)
        ]
    return float(torch.stack(moved).max())


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_periodic_network_commutes_with_shifts_by_its_stride(dims: int) -> None:
    net = network(dims, padding="circular", fourier=(0.5,))
    assert deviation(net, dims, 4, torch.float64) < 1e-12
    assert deviation(net, dims, 4, torch.float32) < 1e-4
    # by less than the stride it does not, and with zeros beyond the edge not at all
    assert deviation(net, dims, 1, torch.float64) > 1e-3
    assert deviation(network(dims), dims, 4, torch.float64) > 1e-3


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conditions_reach_the_output_and_their_absence_too(dims: int) -> None:
    net, space = network(dims, vector_size=2, field_channels=3).double(), SPACES[dims]
    x, t = torch.randn(4, 2, *space).double(), torch.rand(4).double()
    vector, field = torch.randn(4, 2).double(), torch.randn(4, 3, *space).double()
    known = {"vector": vector, "field": field}
    full = net(x, t, **known)
    assert full.shape == x.shape
    for name, value in known.items():
        none = net(x, t, **{**known, name: None})
        zeros = net(x, t, **{**known, name: torch.zeros_like(value)})
        nan = value.clone()
        nan[1:3].flatten(1)[:, 0] = torch.nan  # one number is enough
        mixed = net(x, t, **{**known, name: nan})
        torch.testing.assert_close(mixed[1:3], none[1:3], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(mixed[[0, 3]], full[[0, 3]], rtol=1e-10, atol=1e-12)
        # no condition is not the condition 0
        assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations((full, none, zeros), 2))
    nan = vector.clone()
    nan[0] = torch.nan
    net(x, t, vector=nan).sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in net.parameters())


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        ({"dims": 4}, {}, "dims must be 1, 2 or 3, got 4"),
        ({"padding": "reflect"}, {}, "padding must be zeros or circular"),
        ({"vector_size": 0}, {}, "vector_size must be None or at least 1"),
        ({}, {"x": torch.zeros(2, 1, 8)}, r"expected x of shape \[B, 1, H, W\], got \[2, 1, 8\]: the network has dims"),
        ({"dims": 1}, {"x": torch.zeros(2, 1, 7)}, "size 7 is not divisible by 2"),
        ({"dims": 3}, {"x": torch.zeros(2, 1, 8, 6, 5)}, "size 8 x 6 x 5 is not divisible by 2"),
        ({}, {"vector": torch.zeros(2, 3)}, "a vector was given to a network without"),
        ({}, {"field": torch.zeros(2, 1, 8, 8)}, "a field was given to a network without"),
        ({"vector_size": 3}, {"vector": torch.zeros(2, 2)}, r"expected vector of shape \[2, 3\], got \[2, 2\]"),
        ({"field_channels": 1}, {"field": torch.zeros(2, 1, 8, 6)}, r"expected field of shape \[2, 1, 8, 8\]"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], given: dict[str, Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        UNet(width=8, multipliers=(1, 2), blocks=1, **arguments)(
            **{"x": torch.zeros(2, 1, 8, 8), "t": torch.zeros(2), **given}
        )


def model_of(dims: int, **arguments: Any) -> DiffusionModel:
    net = network(dims, padding="circular", **arguments)
    parts = (LinearGamma(-6.0, 4.0, T=8), VParameterization(), GammaConditioning(), FixedSmallVariance())
    return DiffusionModel(net, *parts, PlainGaussian(), clip_x0=False)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_every_part_of_the_theory_takes_fields(dims: int) -> None:
    """A training step, all forms of the bound, all samplers and the flow."""
    model, shape = model_of(dims), (4, 2, *SPACES[dims])
    x0, generator = torch.randn(shape), torch.Generator().manual_seed(0)
    NoiseMSE(UniformTimes())(model, x0, generator).mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.network.parameters())
    with torch.no_grad():
        for bound in (DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo(), ContinuousElbo(4)):
            total = bound(model, x0, image_generators(0, range(4))).total
            assert total.shape == (4,) and bool(total.isfinite().all())
        x_T = model.prior(x0).sample(generator)
        for sampler in (AncestralSampler(), DDIMSampler(), DPMSolverSampler(), HeunSampler()):
            drawn = sampler(model, x_T, generators=generator)
            assert drawn.shape == shape and bool(drawn.isfinite().all())
        flow = ProbabilityFlow(2)
        there_and_back = flow.decode(model, flow.encode(model, x0))
        assert float((there_and_back - x0).abs().mean()) < 0.05


@pytest.mark.parametrize("name", ["vector", "field"])
def test_guidance_goes_from_no_condition_to_the_condition(name: str) -> None:
    model = model_of(2, vector_size=2, field_channels=1)
    x, t = torch.randn(3, 2, 8, 12), torch.tensor(0.5).double()
    value = torch.randn(3, 2) if name == "vector" else torch.randn(3, 1, 8, 12)
    denoiser, cond = model.denoiser, {name: value}
    with torch.no_grad():
        with_it, without = denoiser(x, t, **cond).eps, denoiser(x, t).eps
        for scale, expected in ((0.0, without), (1.0, with_it), (3.0, without + 3 * (with_it - without))):
            guided = ClassifierFreeDenoiser(denoiser, scale, num_classes=None)(x, t, **cond).eps
            torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
