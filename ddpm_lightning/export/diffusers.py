"""A model as the components of a diffusers pipeline.

    pipeline = to_pipeline(model, shape=(1, 28, 28))
    pipeline.save_pretrained(folder)                     # safetensors and json
    DDPMPipeline.from_pretrained(folder)                 # this module must have been imported
    DDIMPipeline.from_pretrained(folder)

diffusers' timestep k = 0..T-1 is state k + 1 of this package's chain. :class:`DiffusersUNet` answers with eps whatever
the network's own parameterisation, so the schedulers need no other prediction type. Their last step gives the predicted
x_0 where this package's decoder gives the most probable grey levels, and their DDIM keeps eps where it has clipped x_0
unless it is told ``use_clipped_model_output=True``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ddpm_lightning.errors import InputError
from ddpm_lightning.export.files import describe_model, model_of
from ddpm_lightning.process import DiffusionModel, FixedLargeVariance, FixedSmallVariance
from ddpm_lightning.schedules import VarianceExploding

try:
    from diffusers import DDPMPipeline, DDPMScheduler
    from diffusers.configuration_utils import ConfigMixin, register_to_config
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.utils import BaseOutput
except ImportError as error:
    raise InputError(f"{error.name} is missing: pip install 'ddpm-lightning[export]'") from None

__all__ = ["DiffusersUNet", "NoiseOutput", "UNet2DNetwork", "scheduler_for", "to_pipeline"]

_VARIANCE_TYPES = {FixedLargeVariance: "fixed_large", FixedSmallVariance: "fixed_small"}


@dataclass
class NoiseOutput(BaseOutput):
    """What diffusers' pipelines expect of a model: predicted eps ``[B, C, H, W]``."""

    sample: Tensor


class DiffusersUNet(ModelMixin, ConfigMixin):  # type: ignore[misc]  # they are meant to be mixed so
    """A diffusion model with the call of diffusers' UNet2DModel.

    Args:
        description: the model's parts as plain data (``describe_model``).
        in_channels: C.
        sample_size: H and W.
    """

    @register_to_config
    def __init__(self, description: dict[str, Any], in_channels: int, sample_size: list[int]) -> None:
        super().__init__()
        self.model = model_of(dict(description))

    def forward(
        self, sample: Tensor, timestep: Tensor | float, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> NoiseOutput | tuple[Tensor]:
        """Predicted eps at ``sample`` ``[B, C, H, W]`` and timestep 0..T-1, one or ``[B]``."""
        k = torch.as_tensor(timestep, device=sample.device)
        t = self.model.grid.to(sample.device)[k + 1]
        cond = {} if class_labels is None else {"label": class_labels}
        eps = self.model.denoiser(sample, t, **cond).eps
        return NoiseOutput(sample=eps) if return_dict else (eps,)


class UNet2DNetwork(nn.Module):
    """diffusers' UNet2DModel with the call of this package's networks, for a model with TimeConditioning.

    Args:
        unet: takes timesteps k = 0..T-1.
        T: number of states of the chain; its time t = (k + 1) / T is timestep k.
    """

    def __init__(self, unet: nn.Module, T: int) -> None:
        super().__init__()
        self.unet, self.T = unet, T

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        output: Tensor = self.unet(x, t * self.T - 1).sample
        return output


def scheduler_for(model: DiffusionModel) -> DDPMScheduler:
    """diffusers' ancestral scheduler of the model's chain. ``DDIMScheduler.from_config`` and others take its config.

    Raises:
        InputError: a chain or a variance that diffusers does not know.
    """
    variance = type(model.reverse_process.variance)
    if variance not in _VARIANCE_TYPES:
        raise InputError(
            f"diffusers has no {variance.__name__}: export a model with "
            "--model.variance FixedLargeVariance or FixedSmallVariance"
        )
    if isinstance(model.schedule, VarianceExploding):
        raise InputError("diffusers' DDPM has no exploding variance: export a variance-preserving model")
    if not model.has_plain_process:
        raise InputError(
            "diffusers has no learned encoder and one noise level for all pixels: export to safetensors instead"
        )
    alpha_bars = torch.exp(2 * model.schedule.log_alpha(model.grid[1:])).detach()
    before = torch.cat([torch.ones_like(alpha_bars[:1]), alpha_bars[:-1]])
    return DDPMScheduler(
        num_train_timesteps=model.T,
        trained_betas=(1 - alpha_bars / before).tolist(),
        variance_type=_VARIANCE_TYPES[variance],
        clip_sample=model.clip_x0,
        prediction_type="epsilon",
    )


def to_pipeline(model: DiffusionModel, shape: tuple[int, ...]) -> DDPMPipeline:
    """The model, for images of a shape (C, H, W), as a DDPMPipeline with a copy of its weights.

    Raises:
        InputError: as :func:`scheduler_for`; a part that is not of this package.
    """
    scheduler = scheduler_for(model)
    unet = DiffusersUNet(describe_model(model), shape[0], list(shape[1:]))
    unet.model.load_state_dict(model.state_dict())
    return DDPMPipeline(unet=unet.eval(), scheduler=scheduler)
