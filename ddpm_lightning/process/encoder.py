r"""Encoders m(x_0, t) of the forward process: what stands in its mean in the place of the image itself,

.. math:: q(x_t | x_0) = N(\alpha_t \, m(x_0, t), \; \sigma_t^2 I), \qquad m = x_0 \text{ at the time of the data}

With a learned m the forward process is Markov only given x_0 (Nielsen et al. 2023, DiffEnc, arXiv 2310.19789).
"""

import warnings

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ddpm_lightning.ops import expand_to
from ddpm_lightning.process.conditioning import GammaConditioning, NoiseConditioning
from ddpm_lightning.schedules import Schedule

__all__ = ["Encoder", "IdentityEncoder", "NetworkEncoder"]


class Encoder(nn.Module):
    """Base of encoders: subclasses define :meth:`forward`."""

    is_identity = False
    """True where m(x_0, t) = x_0 at all times, so that the forward process is Markov."""

    def forward(self, schedule: Schedule, x0: Tensor, t: Tensor) -> Tensor:
        """m(x_0, t), ``[B, C, *space]``; x_0 itself at the time of the data, where gamma is -inf."""
        raise NotImplementedError

    def rate(self, schedule: Schedule, x0: Tensor, t: Tensor) -> Tensor:
        """:math:`d m(x_0, t) / dt`, ``[B, C, *space]``, for which gradients can be taken in turn."""
        # forward-mode differentiation, of which the fused kernels of attention know nothing, and which torch 2.11 gets
        # wrong in inference mode, in which the Trainer validates and tests
        gradients = torch.is_grad_enabled()
        with (
            torch.inference_mode(False),
            torch.set_grad_enabled(gradients),
            sdpa_kernel(SDPBackend.MATH),
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", message=".*torch.jit.script")  # torch's own
            time = t.clone()  # made here, so none of inference mode
            rate: Tensor = torch.func.jvp(lambda t: self(schedule, x0, t), (time,), (torch.ones_like(time),))[1]
        return rate


class IdentityEncoder(Encoder):
    """:math:`m(x_0, t) = x_0`: the fixed forward process."""

    is_identity = True

    def forward(self, schedule: Schedule, x0: Tensor, t: Tensor) -> Tensor:
        return x0


class NetworkEncoder(Encoder):
    r"""A network that adds to the image, the more the noisier x_t is:

    .. math:: m(x_0, t) = x_0 + \mathrm{sigmoid}(\gamma_t) \, \text{network}(x_0, c)

    With variance preservation this is :math:`\alpha_t^2 x_0 + \sigma_t^2 y(x_0, t)` with
    :math:`y = x_0 + \text{network}` (DiffEnc, section 3). A network that returns 0 at first, as ``UNet`` does, makes
    the encoder begin as the identity. The encoder takes no part in sampling.

    Args:
        network: called as ``network(x, c)`` with the scalar c of ``conditioning``; returns ``[B, C, *space]``.
        conditioning: the scalar that the network is given for t; None for :class:`GammaConditioning`.
    """

    def __init__(self, network: nn.Module, conditioning: NoiseConditioning | None = None) -> None:
        super().__init__()
        self.network, self.conditioning = network, conditioning

    def forward(self, schedule: Schedule, x0: Tensor, t: Tensor) -> Tensor:
        dtype = next((p.dtype for p in self.network.parameters()), x0.dtype)
        level = (self.conditioning or GammaConditioning())(schedule, t).to(torch.promote_types(dtype, torch.float32))
        # at the time of the data any number will do, since the weight is 0
        level = torch.where(torch.isfinite(level), level, 0)
        output: Tensor = self.network(x0.to(dtype), level.expand(x0.shape[0])).to(x0.dtype)
        return x0 + expand_to(torch.sigmoid(schedule.gamma(t)), x0).to(x0.dtype) * output
