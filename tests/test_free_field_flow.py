"""The free field under its exact denoiser: the flow's density is the field's own, in one, two and three dimensions."""

import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning.lattice import FreeFieldAction, free_field_exact, simulate_free_field
from ddpm_lightning.process import (
    DiffusionModel,
    EpsParameterization,
    FixedSmallVariance,
    GammaConditioning,
    PlainGaussian,
)
from ddpm_lightning.samplers import ProbabilityFlow
from ddpm_lightning.schedules import LinearGamma

M2 = 0.5


class ExactDenoiser(nn.Module):
    r"""E[eps | x_t] of the free field, mode by mode: the power of a mode is 1 / (m^2 + k-hat^2)."""

    def forward(self, x: Tensor, gamma: Tensor) -> Tensor:
        space = x.shape[2:]
        k2 = torch.zeros(space, dtype=torch.float64)
        for axis, size in enumerate(space):
            k = 2 * torch.pi * torch.arange(size, dtype=torch.float64) / size
            k2 = k2 + (2 - 2 * k.cos()).reshape(-1, *(1,) * (len(space) - 1 - axis))
        power = 1 / (M2 + k2)
        shape = (-1, *(1,) * (x.ndim - 1))
        alpha2, sigma2 = torch.sigmoid(-gamma.double()).reshape(shape), torch.sigmoid(gamma.double()).reshape(shape)
        axes = tuple(range(2, x.ndim))
        modes = torch.fft.fftn(x.double(), dim=axes) * sigma2.sqrt() / (alpha2 * power + sigma2)
        return torch.fft.ifftn(modes, dim=axes).real.to(x.dtype)


def model() -> DiffusionModel:
    parts = (EpsParameterization(), GammaConditioning(1.0), FixedSmallVariance(), PlainGaussian())
    return DiffusionModel(ExactDenoiser(), LinearGamma(-14.0, 12.0, T=2), *parts, clip_x0=False)


@pytest.mark.parametrize(("L", "dim"), [(12, 1), (4, 2), (3, 3)])
def test_the_density_of_the_flow_is_exact(L: int, dim: int) -> None:
    x0 = simulate_free_field(L, dim, M2, 3, seed=1).fields.double().reshape(3, 1, *(L,) * dim)
    exact = -FreeFieldAction(M2)(x0) - free_field_exact(L, dim, M2)["logZ"]
    found = ProbabilityFlow(steps=20, tolerance=2e-3).image_log_likelihood(model(), x0)
    sites = L**dim
    assert float((found.log_prob - exact).abs().max()) / sites < 1e-4
    assert float(found.error.max()) < 2e-3
