"""Pictures of what the levels of a hierarchical VAE hold."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ddpm_lightning.callbacks.publishing import publish_picture
from ddpm_lightning.data.datamodule import ArrayDataModule
from ddpm_lightning.errors import at_least
from ddpm_lightning.figures import tile
from ddpm_lightning.ops import image_generators
from ddpm_lightning.sampling.request import slerp
from ddpm_lightning.training import HierarchyModule

__all__ = ["LevelPictures"]


class LevelPictures(Callback):
    """Two pictures of the averaged model after each validation within ``fit``, to the loggers and the run's folder.

    - levels/reconstructions: validation images in the first row. In row n + 1 each is encoded up to level n, and
      decoded from there. What a level has lost is drawn anew.
    - levels/walk: row n goes from one validation image to another one along a great circle in the states of level n.

    Args:
        n: number of images, and of columns of a walk.
        seed: seed of the noise.
    """

    def __init__(self, n: int = 10, seed: int = 0) -> None:
        at_least(2, n=n)
        self.n, self.seed = n, seed

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        wanted = trainer.state.fn == "fit" and not trainer.sanity_checking and isinstance(data, ArrayDataModule)
        if not (wanted and isinstance(pl_module, HierarchyModule)):
            return
        images = data.split("val").images[: self.n].to(pl_module.device)
        with torch.inference_mode(), trainer.precision_plugin.forward_context():
            for name, rows in (("reconstructions", self.reconstructions), ("walk", self.walk)):
                picture = tile(rows(pl_module, images), pl_module.levels, columns=self.n)
                publish_picture(trainer, f"levels/{name}", picture, f"levels/{name}_{trainer.global_step:07d}.png")

    def reconstructions(self, module: HierarchyModule, images: Tensor) -> Tensor:
        """The first picture's images, uint8 ``[(T + 1) n, C, H, W]``, of ``images`` uint8 ``[n, C, H, W]``."""
        states = self._states(module, images)
        rows = [self._decoded(module, state, n) for n, state in enumerate(states, start=1)]
        return torch.cat([images, *rows])

    def walk(self, module: HierarchyModule, images: Tensor) -> Tensor:
        """The second picture's images, uint8 ``[T n, C, H, W]``, between the first two of ``images``."""
        fraction = torch.linspace(0, 1, self.n, device=images.device)
        rows = []
        for n, state in enumerate(self._states(module, images[:2]), start=1):
            a, b = (end.expand(self.n, *end.shape) for end in state)
            rows.append(self._decoded(module, slerp(a, b, fraction), n))
        return torch.cat(rows)

    def _states(self, module: HierarchyModule, images: Tensor) -> list[Tensor]:
        generators = image_generators(self.seed, range(len(images)))
        return module.ema_model.encoded(module.scale.to_model(images), generators)

    def _decoded(self, module: HierarchyModule, state: Tensor, n: int) -> Tensor:
        # the same noise in each row: what differs comes from the states
        return module.scale.to_data(module.ema_model.generate(state, n, image_generators(self.seed, [0] * len(state))))
