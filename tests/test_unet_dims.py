"""The U-Net on fields: one to three dimensions, periodic lattices, and conditions that are numbers or fields."""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import pixel_unshuffle

from ddpm_lightning.errors import InputError
from ddpm_lightning.networks import AdaptedNetwork, FeatureClassifier, SimpleUNet, UNet
from ddpm_lightning.networks.patches import from_patches, to_patches
from ddpm_lightning.objectives import (
    ConsistencyElbo,
    ContinuousElbo,
    ContinuousNegativeElbo,
    DenoisingElbo,
    ElboEstimator,
    EquispacedTimes,
    HybridObjective,
    ImportanceWeightedElbo,
    MinSNRWeighting,
    NegativeElbo,
    NoiseMSE,
    Objective,
    StratifiedTimes,
    TrajectoryElbo,
    UniformTimes,
    WeightedMSE,
    path_log_probs,
    state_bound,
)
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    AverageOperator,
    CategoricalDecoder,
    ClassifierFreeDenoiser,
    ConvLevel,
    DiffusionModel,
    DiscretizedGaussian,
    DPSDenoiser,
    FixedSmallVariance,
    GammaConditioning,
    LearnedRangeVariance,
    LinearMeasurement,
    MatrixOperator,
    MMPSDenoiser,
    NetworkEncoder,
    PlainGaussian,
    ProductDenoiser,
    VParameterization,
    eps_mse_table,
)
from ddpm_lightning.samplers import (
    AncestralSampler,
    DDIMSampler,
    DPMSolverSampler,
    ExactDivergence,
    HeunSampler,
    HutchinsonDivergence,
    MomentMatchingSampler,
    ProbabilityFlow,
    ReplacementSampler,
    Sampler,
    draw_paths,
)
from ddpm_lightning.schedules import LearnedGamma, LinearGamma, PixelwiseGamma, Schedule

SPACES: dict[int, tuple[int, ...]] = {1: (24,), 2: (8, 12), 3: (4, 8, 12)}


def network(dims: int, channels: int = 2, **arguments: Any) -> UNet:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {"width": 8, "multipliers": (1, 2, 2), "blocks": 1, "attention": (1,)}
    net = UNet(channels, dims=dims, **{**defaults, **arguments})
    for parameter in net.parameters():  # it is 0 at first
        nn.init.normal_(parameter, std=0.2)
    return net.eval()


def deviation(net: UNet, dims: int, shift: int, dtype: torch.dtype) -> float:
    """Largest change of the output, relative to its size, where input, field and output are shifted along each axis."""
    draw = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x, field = draw(3, 2, *SPACES[dims]).to(dtype), draw(3, 1, *SPACES[dims]).to(dtype)
    t, net = torch.tensor([0.1, 0.5, 0.9], dtype=dtype), net.to(dtype)
    cond = {} if net.field_channels is None else {"vector": draw(3, 2).to(dtype)}

    def output(shift: int, axis: int) -> Tensor:
        moved = {"field": field.roll(shift, axis)} if cond else {}
        return net(x.roll(shift, axis), t, **cond, **moved).roll(-shift, axis)

    with torch.no_grad():
        y = output(0, 2)
        changes = [(output(shift, axis) - y).abs().max() / y.abs().max() for axis in range(2, 2 + dims)]
    return float(torch.stack(changes).max())


@pytest.mark.parametrize("conditions", [{}, {"vector_size": 2, "field_channels": 1}], ids=["plain", "conditions"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_periodic_network_commutes_with_shifts_by_its_stride(dims: int, conditions: dict[str, int]) -> None:
    make = partial(network, dims, attention=(0, 1, 2), fourier=(0.5,), **conditions)
    net = make(padding="circular")
    found = {dtype: deviation(net, dims, 4, dtype) for dtype in (torch.float64, torch.float32)}
    print(f"dims = {dims}: largest deviation", found)
    assert found[torch.float64] < 1e-13 and found[torch.float32] < 2e-5
    # by less than the stride it does not, and with zeros beyond the edge not at all
    assert deviation(net, dims, 1, torch.float64) > 1e-2
    assert deviation(make(), dims, 4, torch.float64) > 1e-2


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_patches_are_channels_and_back(dims: int) -> None:
    x = torch.arange(2 * 3 * math.prod(SPACES[dims])).view(2, 3, *SPACES[dims])
    patches = to_patches(x, 4)
    assert patches.shape == (2, 3 * 4**dims, *(size // 4 for size in SPACES[dims]))
    assert torch.equal(from_patches(patches, 4), x) and to_patches(x, 1).equal(x)
    # a pixel's channels are its patch, channel by channel
    corner = x[(slice(None), slice(None), *(slice(4),) * dims)]
    assert torch.equal(patches.flatten(2)[:, :, 0], corner.flatten(1))
    if dims == 2:
        assert torch.equal(patches, pixel_unshuffle(x, 4))


@pytest.mark.parametrize("conditions", [{}, {"vector_size": 2, "field_channels": 1}], ids=["plain", "conditions"])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_network_of_patches(dims: int, conditions: dict[str, int]) -> None:
    make = partial(network, dims, multipliers=(1, 2), attention=(1,), fourier=(0.5,), patch=2, **conditions)
    net = make(padding="circular")
    # the patch is one more factor of its stride
    assert deviation(net, dims, 4, torch.float64) < 1e-13 < 1e-2 < deviation(net, dims, 2, torch.float64)
    output = net.float()(torch.randn(2, 2, *SPACES[dims]), torch.rand(2))
    assert output.shape == (2, 2, *SPACES[dims]) and not output._is_view()  # of views FSDP warns
    learned = make(out_channels=4)
    assert learned(torch.randn(2, 2, *SPACES[dims]), torch.rand(2)).shape == (2, 4, *SPACES[dims])
    with pytest.raises(ValueError, match=r"not divisible by 4: .* or a smaller patch"):
        net(torch.randn(2, 2, *(6,) * dims), torch.rand(2))
    with pytest.raises(ValueError, match="patch = 0 must be 1 or more"):
        make(patch=0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conditions_reach_the_output_and_their_absence_too(dims: int) -> None:
    net, space = network(dims, vector_size=2, field_channels=3).double(), SPACES[dims]
    x, t = torch.randn(4, 2, *space).double(), torch.rand(4).double()
    vector, field = torch.randn(4, 2).double(), torch.randn(4, 3, *space).double()
    known = {"vector": vector, "field": field}
    full = net(x, t, **known).detach()
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
        outputs = (full, none.detach(), zeros.detach())
        assert all(float((a - b).abs().max()) > 1e-3 for a, b in itertools.combinations(outputs, 2))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_no_nan_reaches_a_gradient(dims: int) -> None:
    net, space = network(dims, vector_size=2, field_channels=3), SPACES[dims]
    x, vector, field = torch.randn(4, 2, *space), torch.randn(4, 2), torch.randn(4, 3, *space)
    vector[0], field[1, 2] = torch.nan, torch.nan
    leaves = [value.requires_grad_() for value in (x, vector, field)]
    output = net(x, torch.rand(4), vector=vector, field=field)
    output.square().sum().backward()
    assert bool(output.isfinite().all())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in [*leaves, *net.parameters()])
    # a row without condition does not depend on the numbers that stand beside its NaN
    assert vector.grad is not None and field.grad is not None
    assert not vector.grad[0].any() and not field.grad[1].any()
    assert bool(vector.grad[1:].any(1).all()) and bool(field.grad[[0, 2, 3]].flatten(1).any(1).all())


def test_an_infinite_condition_is_not_taken_for_none() -> None:
    net, x, t = network(1, vector_size=2), torch.randn(2, 2, 24), torch.rand(2)
    assert not net(x, t, vector=torch.tensor([[torch.inf, 0.0], [0.0, 0.0]]))[0].isfinite().all()


@pytest.mark.parametrize(("name", "option"), [("vector", "vector_size"), ("field", "field_channels")])
def test_networks_without_conditions_say_so(name: str, option: str) -> None:
    x, t, cond = torch.zeros(2, 1, 8, 8), torch.zeros(2), {name: torch.zeros(2, 1, 8, 8)}
    for net in (SimpleUNet(), AdaptedNetwork(SimpleUNet())):
        with pytest.raises(ValueError, match=rf"^{type(net).__name__} .*: leave {name} out, or use UNet\({option}="):
            net(x, t, **cond)


def test_what_is_for_images_only_says_so() -> None:
    line = torch.zeros(2, 1, 28)
    with pytest.raises(
        ValueError, match=r"expected x of shape \[B, 1, H, W\], got \[2, 1, 28\]: SimpleUNet .* UNet\(dims="
    ):
        SimpleUNet()(line, torch.zeros(2))
    with pytest.raises(ValueError, match=r"expected floating-point images \[B, 1, 28, 28\]"):
        FeatureClassifier()(line)
    with pytest.raises(InputError, match=r"it must be \[channels, height, width\]"):
        ConvLevel(2).stand_on((1, 28))


def test_a_vector_is_standardised() -> None:
    torch.manual_seed(0)
    plain = UNet(width=8, multipliers=(1,), blocks=1, vector_size=2)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    scaled = UNet(
        width=8, multipliers=(1,), blocks=1, vector_size=2, vector_scale={"mean": [0.25, 10.0], "std": [0.5, 4.0]}
    )
    scaled.load_state_dict(plain.state_dict())
    x, t, z = torch.randn(3, 1, 8, 8), torch.rand(3), torch.tensor([[1.0, -1.0], [0.5, 2.0], [torch.nan, 0.0]])
    vector = z * torch.tensor([0.5, 4.0]) + torch.tensor([0.25, 10.0])
    torch.testing.assert_close(scaled(x, t, vector=vector), plain(x, t, vector=z))
    assert torch.equal(scaled(x, t), plain(x, t)) and not torch.equal(scaled(x, t, vector=vector), plain(x, t))


@pytest.mark.parametrize(
    ("arguments", "given", "words"),
    [
        ({"dims": 4}, {}, "dims = 4 must be 1, 2 or 3"),
        ({"padding": "reflect"}, {}, "padding = reflect must be zeros or circular"),
        ({"vector_size": 0}, {}, "vector_size = 0 must be 1 or more"),
        ({"vector_scale": {"mean": [0.0], "std": [1.0]}}, {}, "vector_scale must hold mean and std, None numbers each"),
        ({"vector_size": 2, "vector_scale": {"mean": [0.0, 0.0], "std": [1.0, 0.0]}}, {}, "each std positive"),
        ({"vector_size": 1, "vector_scale": {"mean": [0.0]}}, {}, "vector_scale must hold mean and std, 1 numbers"),
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
    return plain_model(network(dims, padding="circular", **arguments))


def plain_model(net: nn.Module, schedule: Schedule | None = None, **parts: Any) -> DiffusionModel:
    defaults = {"variance": FixedSmallVariance(), "decoder": PlainGaussian(), "clip_x0": False, **parts}
    return DiffusionModel(
        net, schedule or LinearGamma(-6.0, 4.0, T=4), VParameterization(), GammaConditioning(), **defaults
    )


class SeenAsImages(nn.Module):
    """A network of fields ``[B, C, *space]`` that is given and gives images ``[B, C, H, W]`` of the same numbers."""

    def __init__(self, net: UNet, space: tuple[int, ...]) -> None:
        super().__init__()
        self.net, self.space = net, space

    def forward(self, x: Tensor, t: Tensor, **cond: Any) -> Tensor:
        output: Tensor = self.net(x.reshape(*x.shape[:2], *self.space), t, **cond)
        return output.reshape(len(x), -1, *x.shape[2:])


# shape of the field, and an image of the same numbers in the same order
SHAPES = {"1-D": ((2, 12), (2, 3, 4)), "3-D": ((1, 4, 4, 6), (1, 4, 24))}
Made = Callable[..., DiffusionModel]


@pytest.fixture(params=SHAPES)
def pair(request: pytest.FixtureRequest) -> tuple[Made, tuple[int, ...], tuple[int, ...]]:
    """What makes a model of fields, or of the images of the same numbers, with the same weights; and both shapes."""
    shape, image = SHAPES[request.param]

    def made(of: tuple[int, ...], schedule: Any = None, outputs: int = 1, encoder: bool = False, **parts: Any) -> Any:
        def net(outputs: int = 1) -> nn.Module:
            arguments = {"multipliers": (1, 2), "padding": "circular", "out_channels": outputs * shape[0]}
            fields = network(len(shape) - 1, shape[0], **arguments)
            return fields if of == shape else SeenAsImages(fields, shape[1:])

        parts["encoder"] = NetworkEncoder(net()) if encoder else None
        return plain_model(net(outputs), schedule(of) if schedule else None, **parts)

    return made, shape, image


def same(pair: tuple[Made, Any, Any], run: Callable[[DiffusionModel, Tensor], Iterable[Tensor]], **parts: Any) -> None:
    """``run(model, x0)`` gives the same numbers, to rounding, for fields and for images of the same numbers."""
    made, *shapes = pair
    results = []
    for shape in shapes:
        x0 = torch.randn(3, math.prod(shape), generator=torch.Generator().manual_seed(2)).clamp(-1, 1)
        model = made(shape, **parts)
        results.append(list(run(model, x0.reshape(3, *shape))))
    fields, images = results
    assert len(fields) == len(images) > 0
    for a, b in zip(fields, images, strict=True):
        assert bool(a.isfinite().all())
        torch.testing.assert_close(a.flatten(), b.flatten(), rtol=1e-5, atol=1e-6)
        assert len(a.flatten()) == 1 or a.unique().numel() > 1


def pixelwise(of: tuple[int, ...]) -> PixelwiseGamma:
    """Another gamma for each pixel, in the same order for both shapes."""
    schedule = PixelwiseGamma(of, -6.0, 4.0, T=4)
    with torch.no_grad():
        for name, parameter in schedule.named_parameters():
            if parameter.ndim >= len(of):
                drawn = torch.randn(parameter.numel(), generator=torch.Generator().manual_seed(len(name)))
                parameter.add_(0.1 * drawn.reshape(parameter.shape))
    return schedule


PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gamma of each pixel": {"schedule": pixelwise},
    "learned variance": {"variance": LearnedRangeVariance(), "outputs": 2},
    "encoder": {"encoder": True},
    "grey levels": {"decoder": DiscretizedGaussian(16), "clip_x0": True},
    "categories": {"decoder": CategoricalDecoder(16)},
}


def takes(part: ElboEstimator | Sampler, model: DiffusionModel) -> bool:
    """All parts take all models, but for learned encoders and gammas, of which some do not know."""
    try:
        part.check(model)
    except InputError:
        assert not model.has_plain_process
        return False
    return True


def generators_of(x0: Tensor) -> list[torch.Generator]:
    return image_generators(0, range(len(x0)))


@pytest.mark.parametrize("parts", PARTS)
def test_every_form_of_the_bound_takes_fields(pair: Any, parts: str) -> None:
    def run(model: DiffusionModel, x0: Tensor) -> Iterator[Tensor]:
        for bound in BOUNDS:
            if takes(bound, model):
                yield bound(model, x0, generators_of(x0)).total
        yield path_log_probs(model, x0, generators_of(x0)).elbo
        yield state_bound(model, x0, 0, generators_of(x0), paths=2)

    with torch.no_grad():
        same(pair, run, **PARTS[parts])


BOUNDS = (DenoisingElbo(), ConsistencyElbo(), TrajectoryElbo(), ContinuousElbo(4), ImportanceWeightedElbo(2))
OBJECTIVES: dict[str, tuple[Objective, dict[str, Any]]] = {
    "noise": (NoiseMSE(UniformTimes()), {}),
    "weighted": (WeightedMSE(StratifiedTimes(), weighting=MinSNRWeighting(), continuous=True), {}),
    "bound": (NegativeElbo(DenoisingElbo()), {}),
    "bound of pixels": (NegativeElbo(ConsistencyElbo()), PARTS["gamma of each pixel"]),
    "continuous": (ContinuousNegativeElbo(EquispacedTimes()), {"schedule": lambda of: LearnedGamma(-6.0, 4.0, T=4)}),
    "continuous of pixels": (ContinuousNegativeElbo(UniformTimes()), PARTS["gamma of each pixel"]),
    "continuous with encoder": (ContinuousNegativeElbo(UniformTimes()), PARTS["encoder"]),
    "hybrid": (HybridObjective(UniformTimes()), PARTS["learned variance"]),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_trains_a_step_on_fields(pair: Any, name: str) -> None:
    objective, parts = OBJECTIVES[name]

    def run(model: DiffusionModel, x0: Tensor) -> Iterator[Tensor]:
        objective.check(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        before = [p.detach().clone() for p in model.network.parameters()]
        for _ in range(2):
            optimizer.zero_grad()
            loss = objective(model, x0, torch.Generator().manual_seed(0))
            loss.mean().backward()
            optimizer.step()
        yield loss.detach()
        after = list(model.network.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        yield from (p.detach() for p in model.parameters())

    same(pair, run, **parts)


def samplers_of(shape: tuple[int, ...], x0: Tensor) -> Iterator[Sampler]:
    plain = (
        AncestralSampler(),
        DDIMSampler(),
        DDIMSampler(1.0),
        DPMSolverSampler(1),
        DPMSolverSampler(),
        DPMSolverSampler(sde=True),
        HeunSampler(),
    )
    mask = (torch.arange(math.prod(shape)) % 3 == 0).reshape(shape)
    yield from plain
    for sampler in plain[0], plain[4]:
        yield ReplacementSampler(sampler, x0, mask, resamplings=2)
        yield MomentMatchingSampler(sampler, x0[:1], mask, iterations=2, noise_var=0.1)


@pytest.mark.parametrize("parts", PARTS)
def test_every_sampler_draws_fields(pair: Any, parts: str) -> None:
    def run(model: DiffusionModel, x0: Tensor) -> Iterator[Tensor]:
        x_T = model.prior(x0).sample(generators_of(x0))
        for sampler in samplers_of(x0.shape[1:], x0):
            if takes(sampler, model):
                drawn = sampler(model, x_T, generators=generators_of(x0))
                assert drawn.shape == x0.shape
                yield drawn
        weighted = draw_paths(model, x_T, generators_of(x0))
        yield weighted.x0
        yield weighted.log_ratio

    with torch.no_grad():
        same(pair, run, **PARTS[parts])


def test_the_flow_and_the_errors_of_the_denoiser_take_fields(pair: Any) -> None:
    def run(model: DiffusionModel, x0: Tensor) -> Iterator[Tensor]:
        flow, x1 = ProbabilityFlow(2, tolerance=1e9, max_steps=11), x0.double()
        x_T = flow.encode(model, x1)
        assert float((flow.decode(model, x_T) - x1).abs().mean()) < 0.1
        yield x_T
        likelihood = partial(flow.log_likelihood, model, x1, generators=generators_of(x0))
        yield likelihood(divergence=HutchinsonDivergence(2)).log_prob
        # a gradient for each value and step is too dear for a test: what is exact are its unit vectors
        yield ExactDivergence().vectors(x1)
        table = eps_mse_table(model, [(x0, {})], model.grid[1:], torch.Generator().manual_seed(0))
        yield from (torch.tensor(column) for column in table)

    with torch.no_grad():
        same(pair, run)


def test_guidance_by_a_factor_and_by_a_measurement_takes_fields(pair: Any) -> None:
    def run(model: DiffusionModel, x0: Tensor) -> Iterator[Tensor]:
        weights = torch.linspace(-1, 1, x0[0].numel())
        y = torch.ones(3, 2)
        rows = MatrixOperator(torch.stack((weights, weights.square())), tuple(x0.shape[1:]))
        for wrap in (
            partial(ProductDenoiser, log_factor=lambda x_t, x0_hat, t: (x0_hat.flatten(1) * weights).sum(1)),
            partial(DPSDenoiser, measurement=LinearMeasurement(rows, y, 0.5)),
            partial(MMPSDenoiser, measurement=LinearMeasurement(rows, y, 0.5), iterations=2),
        ):
            guided = wrap(model.denoiser)(x0, torch.tensor(0.5).double())
            assert guided.x0.shape == x0.shape
            yield from (guided.x0, guided.eps)

    same(pair, run)


@pytest.mark.parametrize(("shape", "size"), [((2, 12), (2, 6)), ((2, 4, 6), (2, 2, 3)), ((1, 4, 4, 6), (1, 2, 2, 3))])
def test_averages_of_fields(shape: tuple[int, ...], size: tuple[int, ...]) -> None:
    operator, x = AverageOperator(2), torch.randn(3, *shape, dtype=torch.float64)
    y = operator.apply(x)
    blocks = x.reshape(3, shape[0], *(n for pixels in shape[1:] for n in (pixels // 2, 2)))
    torch.testing.assert_close(y, blocks.mean(tuple(range(3, blocks.ndim, 2))))
    v = torch.randn(3, *size, dtype=torch.float64)
    torch.testing.assert_close((operator.adjoint(v) * x).sum(), (v * y).sum())
    with pytest.raises(InputError, match="factor = 5 does not divide images of"):
        AverageOperator(5).apply(x)
    with pytest.raises(InputError, match=r"must be \[B, C, \*space\]"):
        operator.apply(torch.zeros(3, 4))


@pytest.mark.parametrize("names", [["label"], ["vector"], ["field"], ["label", "vector", "field"]], ids="+".join)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_guidance_goes_from_no_condition_to_the_condition(dims: int, names: list[str]) -> None:
    model, space = model_of(dims, num_classes=2, vector_size=2, field_channels=1), SPACES[dims]
    x, t = torch.randn(3, 2, *space), torch.tensor(0.5).double()
    known = {"label": torch.tensor([0, 1, 1]), "vector": torch.randn(3, 2), "field": torch.randn(3, 1, *space)}
    denoiser, cond = model.denoiser, {name: known[name] for name in names}
    with torch.no_grad():
        with_it, without = denoiser(x, t, **cond).eps, denoiser(x, t).eps
        assert float((with_it - without).abs().max()) > 1e-3
        for scale, expected in ((0.0, without), (1.0, with_it), (3.0, without + 3 * (with_it - without))):
            guided = ClassifierFreeDenoiser(denoiser, scale, num_classes=2)(x, t, **cond).eps
            torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cond", [{}, {"label": None}, {"vector": None, "field": None}])
def test_guidance_without_a_condition_is_refused(cond: dict[str, None]) -> None:
    model = model_of(1, vector_size=2, field_channels=1)
    with pytest.raises(InputError, match="give label, vector or field"):
        ClassifierFreeDenoiser(model.denoiser, 2.0, None)(torch.randn(3, 2, 24), torch.tensor(0.5), **cond)
