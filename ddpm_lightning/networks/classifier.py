from torch import Tensor, nn

from ddpm_lightning.networks.arguments import at_least

__all__ = ["FeatureClassifier"]


class FeatureClassifier(nn.Module):
    """Classes of images ``[B, channels, size, size]`` in model range [-1, 1], and the features in which samples are
    compared with data.

    A 3x3 convolution, strided ones that halve the image until it has at most 4 x 4 pixels, one more, and two linear
    layers. Between them are GroupNorm and SiLU, so the features of an image depend on no other image and on no mode.
    The features are the first linear layer's output before its SiLU. They have no floor at 0, as a Gaussian fitted to
    them needs it. 28 x 28 images, width 24: 123,306 parameters. All arguments are at least 1.

    Args:
        channels: image channels.
        size: height and width of the images.
        num_classes: number of classes.
        width: channels at full resolution; twice as many below.
        num_features: dimensions of the features.
    """

    def __init__(
        self, channels: int = 1, size: int = 28, num_classes: int = 10, width: int = 24, num_features: int = 64
    ) -> None:
        super().__init__()
        at_least(1, channels=channels, size=size, num_classes=num_classes, width=width, num_features=num_features)
        self.channels, self.size, self.num_classes = channels, size, num_classes
        self.width, self.num_features = width, num_features
        convolutions, inputs, pixels = [_convolution(channels, width, 1)], width, size
        while pixels > 4:
            convolutions.append(_convolution(inputs, 2 * width, 2))
            inputs, pixels = 2 * width, (pixels + 1) // 2
        convolutions.append(_convolution(inputs, inputs, 1))
        self.body = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(inputs * pixels**2, num_features))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(num_features, num_classes))

    def features(self, x: Tensor) -> Tensor:
        """Features ``[B, num_features]`` of images ``[B, channels, size, size]`` in model range."""
        expected = (self.channels, self.size, self.size)
        if tuple(x.shape[1:]) != expected or not x.is_floating_point():
            raise ValueError(
                f"expected floating-point images [B, {', '.join(map(str, expected))}] in model range [-1, 1], "
                f"got {x.dtype} {list(x.shape)}"
            )
        output: Tensor = self.body(x)
        return output

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[B, num_classes]`` of images ``[B, channels, size, size]`` in model range."""
        output: Tensor = self.head(self.features(x))
        return output


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    groups = max(g for g in range(1, 9) if outputs % g == 0)
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1), nn.GroupNorm(groups, outputs), nn.SiLU()
    )
