"""The generative model: prior, reverse steps and decoder, with the forward process that trains and bounds it."""

from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.distributions import DiagonalGaussian, centred_like
from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import DeviceTable
from ddpm_lightning.process.conditioning import NoiseConditioning
from ddpm_lightning.process.decoders import Decoder
from ddpm_lightning.process.denoiser import ClippedDenoiser, Denoiser, NetworkDenoiser
from ddpm_lightning.process.encoder import Encoder, IdentityEncoder
from ddpm_lightning.process.forward import ForwardProcess
from ddpm_lightning.process.generative import GenerativeModel
from ddpm_lightning.process.parameterization import Parameterization, Prediction
from ddpm_lightning.process.reverse import ReverseProcess
from ddpm_lightning.process.variance import ReverseVariance
from ddpm_lightning.schedules import Schedule, TabulatedSchedule

__all__ = ["DiffusionModel"]


_FARTHEST = 80  # exp(80) and exp(-80) are numbers of float32


class DiffusionModel(GenerativeModel):
    r"""Everything that the objectives, the bound and the samplers need, and nothing of training.

    Args:
        network: ``network(x, c, **cond) -> [B, C, *space]``, or ``[B, 2 C, *space]`` where ``variance`` is learned.
        schedule: the noise schedule, whose chain of T steps is the model.
        parameterization: meaning of the network's output.
        conditioning: the scalar that the network is given for t.
        variance: variance of the reverse steps.
        decoder: p(x_0 | x_1).
        clip_x0: clip predicted x0 to [-1, 1] in reverse steps, decoder and samplers (never in the training loss).
            The bound is that of the model so clipped.
        encoder: m(x_0, t) of the forward process; None for the identity, m = x_0. With another one the network learns
            what the reverse steps need in the place of x_0, :math:`E[m - dm/d\gamma | x_t]` in the limit of small
            steps. This may lie beyond [-1, 1]: switch ``clip_x0`` off.

    Attributes:
        denoiser: the network's own prediction, unclipped; what the training objective sees.
        reverse_process: the reverse process, whose ``denoiser`` is clipped where ``clip_x0`` is set.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        parameterization: Parameterization,
        conditioning: NoiseConditioning,
        variance: ReverseVariance,
        decoder: Decoder,
        clip_x0: bool = True,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        # The nn.Modules are held here and nowhere else; processes and denoisers are views of them. So a state dict
        # names each tensor once, and a deep copy of the model is a model of its own.
        self.network, self.schedule = network, schedule
        self.encoder = IdentityEncoder() if encoder is None else encoder
        self.decoder, self.clip_x0 = decoder, clip_x0
        self._wraps: tuple[Callable[[Denoiser], Denoiser], ...] = ()
        self._set_views(parameterization, conditioning, variance)
        self._grid = DeviceTable(schedule.grid())
        self._check_steps()

    def _set_views(
        self, parameterization: Parameterization, conditioning: NoiseConditioning, variance: ReverseVariance
    ) -> None:
        """Processes and denoisers of the network, the schedule and the encoder."""
        self.forward_process = ForwardProcess(self.schedule, self.encoder)
        self.denoiser = NetworkDenoiser(
            self.network, self.schedule, parameterization, conditioning, variance.network_outputs
        )
        reverse: Denoiser = self.denoiser
        for wrap in self._wraps:
            reverse = wrap(reverse)
        self._set_reverse_process(reverse, variance)

    def _set_reverse_process(self, reverse: Denoiser, variance: ReverseVariance) -> None:
        reverse = ClippedDenoiser(reverse) if self.clip_x0 else reverse
        self.reverse_process = ReverseProcess(reverse, self.forward_process, variance)

    def _check_steps(self) -> None:
        gamma = self.schedule.gamma(self.grid[1:])
        if not bool((gamma.abs() < _FARTHEST).all()):
            raise InputError(
                f"gamma of {type(self.schedule).__name__} runs from {float(gamma.min()):g} to {float(gamma.max()):g}: "
                f"beyond {_FARTHEST} the noise or the signal is lost in float32; choose a schedule within that"
            )
        if not bool((self.schedule.gamma(self.grid).diff(dim=0) > 0).all()):
            raise InputError(
                f"gamma of {type(self.schedule).__name__} does not increase from state to state, so the "
                "signal-to-noise ratio does not fall: choose another schedule"
            )
        variance = self.reverse_process.variance
        if variance.needs_plain_process and not self.has_plain_process:
            raise InputError(
                f"{type(variance).__name__} is made for a fixed encoder and one noise level for all pixels: use "
                "FixedLargeVariance, FixedSmallVariance or LearnedRangeVariance"
            )
        if variance.min_T > self.T:
            raise InputError(
                f"{type(variance).__name__} gives the decoder of a chain of T = {self.T} steps no variance: "
                "use FixedLargeVariance, or a larger T"
            )

    @property
    def has_plain_process(self) -> bool:
        r"""True for :math:`q(x_t | x_0) = N(\alpha_t x_0, \sigma_t^2 I)`: a fixed encoder, one noise level for all
        pixels."""
        return self.encoder.is_identity and self.schedule.pixel_shape is None

    @property
    def T(self) -> int:
        """Number of steps of the chain."""
        return len(self.grid) - 1

    @property
    def grid(self) -> Tensor:
        """Times of the chain, that of the data first: float64 ``[T + 1]`` on the CPU."""
        return self._grid.on(torch.device("cpu"))

    def grid_on(self, device: torch.device) -> Tensor:
        return self._grid.on(device)

    def with_steps(self, T: int) -> "DiffusionModel":
        """The same network and schedule, sharing their weights, as a chain of T states with its own bound."""
        other = copy(self)
        other._grid = DeviceTable(self.schedule.grid(T))
        other._check_steps()
        return other

    def with_denoiser(self, wrap: Callable[[Denoiser], Denoiser]) -> "DiffusionModel":
        """The same model, sharing its weights, with another denoiser in its reverse steps, decoder and samplers.

        ``wrap`` makes it of the denoiser that the reverse steps have now, before clipping. Where ``clip_x0`` is set,
        the result is clipped too. ``denoiser``, which a training objective sees, stays.
        """
        other, reverse = copy(self), self.reverse_process.denoiser
        other._wraps = (*self._wraps, wrap)
        unclipped = reverse.denoiser if isinstance(reverse, ClippedDenoiser) else reverse
        other._set_reverse_process(wrap(unclipped), self.reverse_process.variance)
        return other

    def tabulated(self, times: Tensor) -> tuple["DiffusionModel", tuple[Tensor, ...]]:
        """The same model, sharing its weights, with its schedule computed beforehand at ``times``, float64 ``[K]``
        without the time of the data; and the scalars to ask it for.

        A sampler asks for gamma, alpha and sigma several times in each step. With a small network that is a good part
        of the cost.
        """
        table = TabulatedSchedule(self.schedule, times)
        other = copy(self)
        # a module keeps its parts in a dictionary that a copy would share
        other._modules = {**self._modules, "schedule": table}
        denoiser = self.denoiser
        other._set_views(denoiser.parameterization, denoiser.conditioning, self.reverse_process.variance)
        return other, table.times

    def encoder_step(self, n: int | Tensor, before: Tensor, x0: Tensor) -> DiagonalGaussian:
        grid = self.grid_on(before.device)
        return self.forward_process.transition(before, grid[n - 1], grid[n], x0)

    def encoder_marginal(self, n: int | Tensor, x0: Tensor) -> DiagonalGaussian:
        return self.forward_process.marginal(x0, self.grid_on(x0.device)[n])

    def reverse(self, n: int | Tensor, after: Tensor, **cond: Any) -> DiagonalGaussian:
        grid = self.grid_on(after.device)
        return self.reverse_process.transition(after, grid[n], grid[n + 1], **cond)

    def reconstruction_gaussian(self, x1: Tensor, **cond: Any) -> DiagonalGaussian:
        return self.decoder_gaussian(x1, **cond)

    def facts(self) -> dict[str, Any]:
        return {"clip_x0": self.clip_x0, "variance": type(self.reverse_process.variance).__name__}

    def prior(self, like: Tensor) -> DiagonalGaussian:
        """p(x_T) over images of the shape of ``like``: N(0, I) for a variance-preserving schedule."""
        return centred_like(like, self.schedule.log_unit_var(self.grid_on(like.device)[-1]))

    def decoder_gaussian(
        self, x1: Tensor, grid: Tensor | None = None, prediction: Prediction | None = None, **cond: Any
    ) -> DiagonalGaussian:
        """The Gaussian over x_0 that the decoder starts from; without the denoiser q(x_1 | x_0) as a function of x_0.

        Args:
            x1: the first state of the chain.
            grid: the times of the chain, ``[K + 1]`` increasing; None for the model's own.
            prediction: the denoiser's at x_1; None to make it where it is needed.
        """
        grid = self.grid_on(x1.device) if grid is None else grid
        if not self.decoder.uses_denoiser:
            return self.forward_process.likelihood(x1, grid[1])
        if prediction is None:
            prediction = self.reverse_process.denoiser(x1, grid[1], **cond)
        return self.reverse_process.decoder_gaussian(prediction, x1, grid[1], grid[min(2, len(grid) - 1)])
