"""The networks' contracts: shapes, conditioning, errors, initial values, and what one pixel can see."""

import copy
import inspect
import math
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from ddpm_lightning.networks import FourierFeatures, SimpleUNet, SinusoidalEmbedding, UNet

N = TypeVar("N", bound=nn.Module)

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three levels": {"multipliers": (1, 2, 3), "blocks": (1, 2, 1)},
    "attention": {"attention": (0, 1), "heads": 2},
    "classes": {"num_classes": 5},
    "everything": {"width": 12, "attention": (1,), "heads": 4, "num_classes": 3, "out_channels": 2, "dropout": 0.1},
}


def small_unet(**options: Any) -> UNet:
    return UNet(**{"width": 8, "multipliers": (1, 2), "blocks": 1, **options})


def perturbed(network: N) -> N:
    """The network with noise on every parameter, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return network


def batch(count: int = 4, channels: int = 1, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, channels, size, size, generator=generator)
    return x, torch.rand(count, generator=generator)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> UNet:
    torch.manual_seed(0)
    return perturbed(small_unet(**VARIANTS[request.param])).eval()


# --- the embedding


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_embedding_separates_neighbouring_steps(dtype: torch.dtype) -> None:
    steps = torch.arange(-1000, 1001, dtype=torch.float32) / 1000
    rows = SinusoidalEmbedding(32)(steps).to(dtype).double()
    distances = torch.cdist(rows, rows) + 1e9 * torch.eye(len(rows), dtype=torch.float64)
    assert distances.min() > 0.5


def test_embedding_values_and_dtypes() -> None:
    embedding = SinusoidalEmbedding(4, scale=10.0, max_period=100.0)
    t = torch.tensor([0.3, -0.3], dtype=torch.float64)
    expected = torch.stack([(3 * t.sign()).cos(), (0.03 * t.sign()).cos(), (10 * t).sin(), (0.1 * t).sin()], dim=1)
    torch.testing.assert_close(embedding(t), expected)
    assert embedding(t.float()).dtype == torch.float32
    assert embedding(t.bfloat16()).dtype == torch.float32
    assert not embedding.state_dict()


@pytest.mark.parametrize("options", [{"dim": 7}, {"dim": 2}, {"dim": 8, "scale": 0.0}, {"dim": 8, "max_period": 0.5}])
def test_embedding_rejects(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^(dim = [27]|scale = 0|max_period = 0.5) must be"):
        SinusoidalEmbedding(**options)


# --- the lecture's network


@pytest.mark.parametrize("size", [8, 28, 7])
def test_simple_unet_shape(size: int) -> None:
    x, t = batch(3, 2, size)
    assert SimpleUNet(channels=2)(x, t).shape == x.shape


def test_simple_unet_sees_exactly_9_by_9_pixels() -> None:
    torch.manual_seed(0)
    network = SimpleUNet().double()
    x = torch.randn(64, 1, 21, 21, dtype=torch.float64, requires_grad=True)
    network(x, torch.rand(64, dtype=torch.float64))[:, 0, 10, 10].sum().backward()
    assert x.grad is not None
    seen = (x.grad != 0).any(dim=0)[0]
    expected = torch.zeros(21, 21, dtype=torch.bool)
    expected[6:15, 6:15] = True
    assert torch.equal(seen, expected)


def test_simple_unet_sees_t() -> None:
    x, t = batch()
    network = SimpleUNet()
    assert (network(x, t) - network(x, t + 0.5)).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_simple_unet_takes_no_label() -> None:
    x, t = batch()
    with pytest.raises(ValueError, match="unconditional"):
        SimpleUNet()(x, t, label=torch.zeros(4, dtype=torch.int64))


# --- the U-Net


def test_unet_batch_height_width_and_channels_equal() -> None:
    x, t = batch(count=8, channels=8)
    network = perturbed(small_unet(channels=8)).eval()
    output = network(x, t)
    assert output.shape == (8, 8, 8, 8)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1]) for i in range(8)])
    torch.testing.assert_close(output, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(8, 12), (28, 28), (4, 32)])
def test_unet_of_any_divisible_size(shape: tuple[int, int]) -> None:
    network = small_unet(channels=3, multipliers=(1, 2, 2), out_channels=6)
    assert network(torch.randn(2, 3, *shape), torch.rand(2)).shape == (2, 6, *shape)


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_unet_is_zero_at_first(options: dict[str, Any]) -> None:
    x, t = batch()
    output = small_unet(**options)(x, t)
    assert torch.equal(output, torch.zeros(4, options.get("out_channels", 1), 8, 8))


def test_unet_depends_on_x_and_t(variant: UNet) -> None:
    x, t = batch()
    output = variant(x, t)
    for other in (variant(x, t + 0.001), variant(x, -t), variant(x.flip(2), t)):
        assert (output - other).abs().amax(dim=(1, 2, 3)).min() > 1e-4


def test_unet_keeps_images_apart(variant: UNet) -> None:
    x, t = batch(6)
    output = variant(x, t)
    order = torch.tensor([3, 1, 5])
    torch.testing.assert_close(variant(x[order], t[order]), output[order], rtol=1e-4, atol=1e-4)
    x = x.clone()
    x[0] = 100.0
    torch.testing.assert_close(variant(x, t)[1:], output[1:], rtol=1e-4, atol=1e-4)


def test_unet_sees_the_whole_image() -> None:
    network = perturbed(small_unet(multipliers=(1, 2, 2), attention=(2,)))
    x, t = batch(1, size=16)
    x.requires_grad_()
    network(x, t)[0, 0, 0, 0].backward()
    assert x.grad is not None and (x.grad != 0).all()


@pytest.mark.parametrize("network", [SimpleUNet(), *(small_unet(**options) for options in VARIANTS.values())])
def test_gradients_reach_every_parameter(network: nn.Module) -> None:
    x, t = batch()
    perturbed(network)(x, t).square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("network", [SimpleUNet(), *(small_unet(**options) for options in VARIANTS.values())])
def test_gradients_exist_at_first(network: nn.Module) -> None:
    # distributed training fails on a parameter that is outside the graph, even at the zero start
    x, t = batch()
    network(x, t).sum().backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


# --- classes


def test_label_changes_the_output_of_its_image_only() -> None:
    x, t = batch()
    network = perturbed(small_unet(num_classes=5)).eval()
    one = network(x, t, label=torch.tensor([0, 1, 2, 3]))
    two = network(x, t, label=torch.tensor([0, 1, 2, 4]))
    torch.testing.assert_close(one[:3], two[:3])
    assert (one[3] - two[3]).abs().max() > 1e-3


def test_no_label_is_the_null_class() -> None:
    x, t = batch()
    network = perturbed(small_unet(num_classes=5)).eval()
    null = network(x, t, label=torch.full((4,), 5))
    torch.testing.assert_close(network(x, t), null)
    assert (null - network(x, t, label=torch.full((4,), 4))).abs().max() > 1e-3


def test_label_errors() -> None:
    x, t = batch()
    with pytest.raises(ValueError, match="num_classes"):
        small_unet()(x, t, label=torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="label of shape"):
        small_unet(num_classes=2)(x, t, label=torch.zeros(3, dtype=torch.int64))


# --- errors


def test_size_error_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"28 x 30 is not divisible by 4: pad .* fewer multipliers"):
        small_unet(multipliers=(1, 1, 1))(torch.zeros(2, 1, 28, 30), torch.zeros(2))


@pytest.mark.parametrize("network", [SimpleUNet(), small_unet()])
def test_shape_errors(network: nn.Module) -> None:
    x, t = batch()
    with pytest.raises(ValueError, match=r"x of shape \[B, 1, H, W\]"):
        network(x.expand(-1, 2, -1, -1), t)
    with pytest.raises(ValueError, match=r"x of shape"):
        network(x[0], t)
    for wrong in (t[:3], t[0], t[:, None]):
        with pytest.raises(ValueError, match=r"t of shape \[4\]"):
            network(x, wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (1, 2, 3)}, "blocks has 3 entries for 2 levels"),
        ({"blocks": 0}, "blocks = 0 must hold"),
        ({"multipliers": ()}, r"multipliers = \(\) must hold"),
        ({"width": 0}, "width = 0 must be 1 or more"),
        ({"attention": (2,)}, "levels are 0..1"),
        ({"attention": (-1,)}, "levels are 0..1"),
        ({"attention": (1,), "heads": 3}, "heads=3 must divide the 16 channels"),
        ({"dropout": 1.0}, "dropout = 1 must lie"),
        ({"num_classes": 0}, "num_classes"),
        ({"out_channels": 0}, "out_channels"),
        ({"time_scale": -1.0}, "time_scale = -1 must be positive"),
    ],
)
def test_argument_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_unet(**options)


@pytest.mark.parametrize("width", [1, 2, 6, 7, 10, 24])
def test_any_width(width: int) -> None:
    x, t = batch()
    assert perturbed(small_unet(width=width))(x, t).isfinite().all()


# --- state, precision, rebuilding


def test_state_dict_round_trip(variant: UNet) -> None:
    x, t = batch()
    arguments = {name: getattr(variant, name) for name in inspect.signature(UNet).parameters}
    other = UNet(**arguments).eval()
    other.load_state_dict(variant.state_dict())
    assert torch.equal(other(x, t), variant(x, t))


def test_float64(variant: UNet) -> None:
    x, t = batch()
    output = copy.deepcopy(variant).double()(x.double(), t.double())
    assert output.dtype == torch.float64
    torch.testing.assert_close(output, variant(x, t).double(), rtol=1e-3, atol=1e-3)


def test_float64_times_with_float32_images(variant: UNet) -> None:
    x, t = batch()
    assert variant(x, t.double()).dtype == torch.float32


def test_autocast(variant: UNet) -> None:
    x, t = batch()
    with torch.autocast("cpu", torch.bfloat16):
        output = variant(x, t)
    assert output.dtype == torch.float32
    expected = variant(x, t)
    assert (output - expected).square().mean() < 1e-3 * expected.square().mean()


def test_whole_network_in_bfloat16(variant: UNet) -> None:
    x, t = batch()
    assert copy.deepcopy(variant).bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


def test_channels_last_gives_the_same(variant: UNet) -> None:
    x, t = batch()
    other = copy.deepcopy(variant).to(memory_format=torch.channels_last)
    output = other(x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(output, variant(x, t), rtol=1e-4, atol=1e-4)


def test_init_arguments_are_attributes() -> None:
    arguments: list[tuple[type[nn.Module], dict[str, Any]]] = [
        (SinusoidalEmbedding, {"dim": 6, "scale": 3.0, "max_period": 10.0}),
        (SimpleUNet, {"channels": 2}),
        (
            UNet,
            {
                "channels": 2,
                "width": 4,
                "multipliers": [1, 2],
                "blocks": [1, 2],
                "attention": [1],
                "heads": 2,
                "dims": 1,
                "padding": "circular",
                "vector_size": 3,
                "vector_scale": {"mean": [0.0, 1.0, 2.0], "std": [1.0, 1.0, 0.5]},
                "field_channels": 2,
                "dropout": 0.2,
                "num_classes": 3,
                "out_channels": 5,
                "time_scale": 10.0,
                "fourier": [2.0],
                "patch": 2,
            },
        ),
    ]
    for cls, options in arguments:
        assert set(options) == set(inspect.signature(cls).parameters)
        network = cls(**options)
        for name, value in options.items():
            assert getattr(network, name) == value
    assert UNet().out_channels is None


# --- Fourier features


def test_fourier_features_by_their_definition() -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features = FourierFeatures([0.5, 127.5])
    out = features(x)
    assert out.shape == (2, 15, 4, 5) and features.copies == 5
    expected = [x, (math.pi * x).sin(), (math.pi * x).cos(), (255 * math.pi * x).sin(), (255 * math.pi * x).cos()]
    torch.testing.assert_close(out, torch.cat(expected, 1), rtol=1e-9, atol=1e-9)
    assert FourierFeatures()(x) is x
    with pytest.raises(ValueError, match=r"fourier = .* must hold positive"):
        FourierFeatures([1.0, 0.0])


def test_fourier_features_keep_noise_below_bfloat16() -> None:
    """Noise of a thousandth on grey levels: the period of one level shows it, under autocast too."""
    levels = 2 * torch.arange(256).reshape(1, 1, 16, 16) / 255 - 1
    noise = 1e-3 * torch.randn(levels.shape, generator=torch.Generator().manual_seed(0))
    x = levels + noise
    with torch.autocast("cpu", torch.bfloat16):
        sine = FourierFeatures([127.5])(x)[:, 1:2]
    # every level has the phase 127.5 (k 2/255 - 1) = k - 127.5, so the sine is that of the noise alone, turned by pi
    torch.testing.assert_close(sine, -torch.sin(2 * math.pi * 127.5 * noise), rtol=0, atol=2e-4)
    rounded = x.bfloat16().float() - levels
    assert torch.corrcoef(torch.stack([rounded.flatten(), noise.flatten()]))[0, 1] < 0.8


def test_unet_with_fourier_features_takes_them_in() -> None:
    torch.manual_seed(0)
    network = UNet(channels=2, width=8, multipliers=(1, 2), fourier=(4.0, 2.0))
    assert network.stem.in_channels == 10
    out = network(torch.zeros(2, 2, 8, 8), torch.zeros(2))
    assert out.shape == (2, 2, 8, 8)
