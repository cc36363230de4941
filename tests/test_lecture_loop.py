"""The lecture's sampling loop and the package's, with the lecture's network and the same noise.

The loop is Ho et al. 2020 (arXiv 2006.11239), algorithm 2, written from the betas alone. Its index i = 1..T is the
package's time t = i/T, and its last step, at i = 1 with z = 0, is the mean of the package's decoder.
"""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from ddpm_lightning.networks import SimpleUNet
from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedLargeVariance,
    FixedSmallVariance,
    PlainGaussian,
    ReverseVariance,
    TimeConditioning,
)
from ddpm_lightning.samplers import AncestralSampler
from ddpm_lightning.schedules import LinearChain

T = 300
SEED = 5


@pytest.fixture(scope="module")
def network() -> SimpleUNet:
    """The lecture's network as it is initialised: its output is not zero, and it sees the time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return SimpleUNet().double().requires_grad_(False)


def betas_and_alpha_bars() -> tuple[list[float], list[float]]:
    """beta_i and alpha-bar_i, float64; index 0 is the data, where nothing has been added."""
    betas = [0.0, *torch.linspace(1e-4, 0.02, T, dtype=torch.float64).tolist()]
    alpha_bars = [1.0]
    for beta in betas[1:]:
        alpha_bars.append(alpha_bars[-1] * (1 - beta))
    return betas, alpha_bars


def lecture_states(network: SimpleUNet, x: Tensor, small: bool, clip_x0: bool, generator: torch.Generator) -> Iterator:
    """x_{T-1}, ..., x_1, x_0 by algorithm 2; with clipping its mean is written in terms of the clipped x_0."""
    betas, alpha_bars = betas_and_alpha_bars()
    for i in range(T, 0, -1):
        beta, bar, bar_before = betas[i], alpha_bars[i], alpha_bars[i - 1]
        eps = network(x, torch.full((len(x),), i / T, dtype=x.dtype))
        if clip_x0:
            x0 = ((x - (1 - bar) ** 0.5 * eps) / bar**0.5).clamp(-1, 1)
            mean = (bar_before**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - bar_before) * x) / (1 - bar)
        else:
            mean = (x - beta / (1 - bar) ** 0.5 * eps) / (1 - beta) ** 0.5
        sigma2 = beta * (1 - bar_before) / (1 - bar) if small else beta
        z = torch.randn(x.shape, generator=generator, dtype=x.dtype) if i > 1 else torch.zeros_like(x)
        x = mean + sigma2**0.5 * z
        yield x


@pytest.mark.parametrize("clip_x0", [False, True])
@pytest.mark.parametrize("variance", [FixedLargeVariance(), FixedSmallVariance()], ids=lambda v: type(v).__name__)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-5)], ids=["f64", "f32"])
def test_every_state_is_that_of_the_lectures_loop(
    network: SimpleUNet, variance: ReverseVariance, clip_x0: bool, dtype: torch.dtype, tolerance: float
) -> None:
    model = DiffusionModel(
        network.to(dtype),
        LinearChain(T),
        EpsParameterization(),
        TimeConditioning(),
        variance,
        PlainGaussian(levels=256),
        clip_x0,
    )
    x_T = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(SEED), dtype=dtype)
    states: list[Tensor] = []
    final = AncestralSampler()(
        model, x_T, generators=torch.Generator().manual_seed(7), callback=lambda x, _: states.append(x)
    )
    small = isinstance(variance, FixedSmallVariance)
    lecture = list(lecture_states(network, x_T, small, clip_x0, torch.Generator().manual_seed(7)))
    assert len(states) == len(lecture) == T
    # without clipping the states of an untrained network grow: compare in units of their own size
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(states, lecture, strict=True))
    assert worst < tolerance
    assert torch.equal(final, states[-1])
    if clip_x0:
        # or clipping would not have been tested
        assert float(final.abs().max()) == 1
