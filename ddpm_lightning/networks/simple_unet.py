from torch import Tensor, nn

from ddpm_lightning.networks.arguments import at_least
from ddpm_lightning.networks.conditions import refuse_conditions

__all__ = ["SimpleUNet"]


class SimpleUNet(nn.Module):
    """Four 3x3 convolutions with an embedding of t added in the middle: the lecture's ``SimpleUNet``.

    As printed, the lecture adds 64 features of the time to 128 channels, which does not run. Here the last linear layer
    of the time's MLP gives 128 features.

    The network has no down-sampling and no skip connection: it is a U-Net in name only. One output pixel sees 9 x 9
    input pixels, so the network denoises local strokes but cannot draw global structure (a whole digit). It takes
    images only, no fields of one or three dimensions, and no condition.

    Args:
        channels: number of image channels C, both in and out, at least 1; None for 1, and on the command line for the
            data's.
    """

    def __init__(self, channels: int | None = None) -> None:
        super().__init__()
        channels = 1 if channels is None else channels
        at_least(1, channels=channels)
        self.channels = channels
        self.encoder = nn.Sequential(
            nn.Conv2d(channels, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()
        )
        self.time_mlp = nn.Sequential(nn.Linear(1, 64), nn.ReLU(), nn.Linear(64, 128))
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(128, 64, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(64, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
        """Map images ``x`` ``[B, C, H, W]`` and times ``t`` ``[B]`` to ``[B, C, H, W]`` in the dtype of ``x``."""
        refuse_conditions("SimpleUNet is unconditional", cond)
        if x.ndim != 4:
            raise ValueError(
                f"expected x of shape [B, {self.channels}, H, W], got {list(x.shape)}: SimpleUNet takes images "
                "only; use UNet(dims=...) for fields of one or three dimensions"
            )
        if x.shape[1] != self.channels:
            raise ValueError(f"expected x of shape [B, {self.channels}, H, W], got {list(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"expected t of shape [{x.shape[0]}], one for each image, got {list(t.shape)}")
        time: Tensor = self.time_mlp(t.to(x.dtype)[:, None])
        features: Tensor = self.encoder(x) + time[:, :, None, None]
        output: Tensor = self.decoder(features)
        return output.to(x.dtype)
