"""Guidance in worlds where the guided distribution is known exactly, at every noise level and at every state."""

from collections.abc import Callable

import pytest
import torch
from oracles import assert_covariance
from torch import Tensor
from worlds_cases import (
    CORRELATED,
    EYE,
    GAMMAS,
    IMAGES,
    SCHEDULE,
    TIMES,
    VARIANCES,
    exact,
    network_model,
    noise,
    states_of,
)
from worlds_chain import chain_of, optimal_model, preserving
from worlds_gaussian import CorrelatedGaussianWorld

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import image_generators
from ddpm_lightning.process import (
    AutoguidedDenoiser,
    ClassifierDenoiser,
    ClassifierFreeDenoiser,
    Denoiser,
    GammaConditioning,
    LogFactor,
    Prediction,
    ProductDenoiser,
)
from ddpm_lightning.samplers import AncestralSampler, DDIMSampler, Sampler
from ddpm_lightning.schedules import LinearGamma, Schedule, VarianceExploding

POINT, VAR = torch.tensor([-0.5, 0.4, 0.2, 1.0], dtype=torch.float64), 0.3
PRODUCT = CorrelatedGaussianWorld(*CORRELATED.posterior(EYE, POINT, VAR))
CLASSES = [CorrelatedGaussianWorld(mean, var * EYE) for mean, var in zip(IMAGES.means, IMAGES.var, strict=True)]


def gaussian_factor(world: CorrelatedGaussianWorld, point: Tensor, var: float, schedule: Schedule) -> LogFactor:
    """log E[N(point; x_0, var I) | x_t] in a Gaussian world: log N(point; x0_hat, Cov[x_0 | x_t] + var I)."""

    def log_factor(x_t: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        alpha, sigma2 = preserving(schedule.gamma(t))
        _, cov = world.posterior(alpha * EYE, torch.zeros_like(point), float(sigma2))
        difference = point - x0_hat.reshape(-1, 4)
        return -0.5 * (difference * torch.linalg.solve(cov + var * EYE, difference.T).T).sum(1)

    return log_factor


def product(schedule: Schedule) -> Callable[[Denoiser], Denoiser]:
    return lambda denoiser: ProductDenoiser(denoiser, gaussian_factor(CORRELATED, POINT, VAR, schedule))


def classifier(x: Tensor, gamma: Tensor) -> Tensor:
    """The exact posterior of the mixture's component, as logits."""
    alpha, sigma2 = (scale[:, None] for scale in preserving(gamma.double()))
    return IMAGES._joint_log_prob(x.reshape(len(x), -1), alpha, sigma2)


def classified(scale: float) -> Callable[[Denoiser], Denoiser]:
    return lambda denoiser: ClassifierDenoiser(denoiser, classifier, scale, GammaConditioning(1.0))


class ClassDenoiser(Denoiser):
    """The optimal denoiser of the mixture, or of the components that are named."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule

    def __call__(self, x_t: Tensor, t: Tensor, *, label: Tensor | None = None) -> Prediction:
        x0 = exact(IMAGES, x_t, float(t), self.schedule)
        if label is not None:
            x0 = torch.cat(
                [exact(CLASSES[k], x[None], float(t), self.schedule) for k, x in zip(label.tolist(), x_t, strict=True)]
            )
        alpha_t, sigma_t = self.scales(x_t, t)
        return Prediction(x0, (x_t - alpha_t * x0) / sigma_t, x0)


# --- multiplying by a factor


@pytest.mark.parametrize("t", TIMES)
def test_a_gaussian_factor_gives_the_posterior_mean_of_the_product(t: float) -> None:
    x_t, time = noise(50), torch.tensor(t, dtype=torch.float64)
    base = optimal_model(CORRELATED, SCHEDULE).denoiser
    prediction = product(SCHEDULE)(base)(x_t, time)
    torch.testing.assert_close(prediction.x0, exact(PRODUCT, x_t, t), rtol=1e-9, atol=1e-9)
    alpha_t, sigma_t = base.scales(x_t, time)
    torch.testing.assert_close(alpha_t * prediction.x0 + sigma_t * prediction.eps, x_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", TIMES)
def test_a_factor_on_a_factor(t: float) -> None:
    """The outer wrapper differentiates the inner one's x0: the product of three Gaussians."""
    x_t, point = noise(20), torch.tensor([0.9, -0.2, 0.3, 0.1], dtype=torch.float64)
    inner = product(SCHEDULE)(optimal_model(CORRELATED, SCHEDULE).denoiser)
    outer = ProductDenoiser(inner, gaussian_factor(PRODUCT, point, 0.2, SCHEDULE))
    expected = CorrelatedGaussianWorld(*PRODUCT.posterior(EYE, point, 0.2))
    prediction = outer(x_t, torch.tensor(t, dtype=torch.float64))
    torch.testing.assert_close(prediction.x0, exact(expected, x_t, t), rtol=1e-9, atol=1e-9)


def test_a_factor_of_x_t_alone_adds_its_gradient_to_the_score() -> None:
    x_t, t = noise(5), torch.tensor(0.4, dtype=torch.float64)
    base = optimal_model(CORRELATED, SCHEDULE).denoiser
    guided = ProductDenoiser(base, lambda x, x0_hat, t: -x.square().flatten(1).sum(1))(x_t, t)
    sigma_t = base.scales(x_t, t)[1]
    torch.testing.assert_close(-guided.eps / sigma_t, -base(x_t, t).eps / sigma_t - 2 * x_t)


@pytest.mark.parametrize("variance", VARIANCES)
def test_ancestral_states_of_a_product(variance: str) -> None:
    model = optimal_model(CORRELATED, SCHEDULE, variance=VARIANCES[variance]).with_denoiser(product(SCHEDULE))
    states = states_of(model, AncestralSampler(), 30_000)
    for state, moments in zip(states, PRODUCT.ancestral_moments(chain_of(GAMMAS), variance), strict=True):
        assert_covariance(state, *moments)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_states_of_a_product(eta: float) -> None:
    model = optimal_model(CORRELATED, SCHEDULE).with_denoiser(product(SCHEDULE))
    for state, moments in zip(
        states_of(model, DDIMSampler(eta), 30_000), PRODUCT.ddim_moments(chain_of(GAMMAS), eta), strict=True
    ):
        assert_covariance(state, *moments)


@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
def test_images_of_a_product_on_a_fine_grid(sampler: Sampler) -> None:
    """The product's mean and covariance, within 4 standard errors and 0.03 for 200 steps."""
    schedule = LinearGamma(-9.0, 9.0, T=200)
    model = optimal_model(CORRELATED, schedule).with_denoiser(product(schedule))
    assert_covariance(states_of(model, sampler, 4000)[-1], PRODUCT.mean, PRODUCT.cov, 0.03)


# --- classifier guidance


@pytest.mark.parametrize("t", TIMES)
def test_the_exact_classifier_at_scale_one_gives_the_class(t: float) -> None:
    x_t, time, label = noise(20), torch.tensor(t, dtype=torch.float64), torch.arange(20) % 2
    base = optimal_model(IMAGES, SCHEDULE).denoiser
    once = classified(1.0)(base)(x_t, time, label=label)
    torch.testing.assert_close(once.x0, ClassDenoiser(SCHEDULE)(x_t, time, label=label).x0, rtol=1e-8, atol=1e-8)
    none, twice = base(x_t, time), classified(2.0)(base)(x_t, time, label=label)
    torch.testing.assert_close(classified(0.0)(base)(x_t, time, label=label).eps, none.eps, rtol=0, atol=0)
    torch.testing.assert_close(twice.eps - none.eps, 2 * (once.eps - none.eps))


@pytest.mark.parametrize("k", [0, 1])
def test_states_of_a_class(k: int) -> None:
    model = optimal_model(IMAGES, SCHEDULE).with_denoiser(classified(1.0))
    states = states_of(model, AncestralSampler(), 30_000, label=torch.full((30_000,), k))
    for state, moments in zip(states, CLASSES[k].ancestral_moments(chain_of(GAMMAS), "beta"), strict=True):
        assert_covariance(state, *moments)


# --- classifier-free guidance


@pytest.mark.parametrize("t", TIMES)
def test_classifier_free_guidance_is_linear_in_eps(t: float) -> None:
    x_t, time, label = noise(20), torch.tensor(t, dtype=torch.float64), torch.arange(20) % 2
    base = ClassDenoiser(SCHEDULE)
    conditional, unconditional = base(x_t, time, label=label), base(x_t, time)
    for scale in (0.0, 0.5, 1.0, 2.0, 7.5):
        guided = ClassifierFreeDenoiser(base, scale, 2)(x_t, time, label=label)
        w = scale - 1
        torch.testing.assert_close(guided.eps, (1 + w) * conditional.eps - w * unconditional.eps)
        alpha_t, sigma_t = base.scales(x_t, time)
        torch.testing.assert_close(alpha_t * guided.x0 + sigma_t * guided.eps, x_t, rtol=1e-9, atol=1e-9)
        if scale in (0, 1):
            assert torch.equal(guided.x0, (conditional if scale == 1 else unconditional).x0)
        # with exact denoisers the factor is the exact classifier to the power of the scale
        other = classified(scale)(optimal_model(IMAGES, SCHEDULE).denoiser)(x_t, time, label=label)
        torch.testing.assert_close(guided.x0, other.x0, rtol=1e-7, atol=1e-7)


def test_classifier_free_guidance_evaluates_what_it_needs() -> None:
    asked: list[bool] = []

    class Asked(ClassDenoiser):
        def __call__(self, x_t: Tensor, t: Tensor, *, label: Tensor | None = None) -> Prediction:
            asked.append(label is not None)
            return super().__call__(x_t, t, label=label)

    for scale, expected in ((1.0, [True]), (0.0, [False]), (3.0, [True, False])):
        asked.clear()
        ClassifierFreeDenoiser(Asked(SCHEDULE), scale, 2)(noise(2), torch.tensor(0.5), label=torch.tensor([0, 1]))
        assert asked == expected


# --- autoguidance

# a guide of the same data, spread too widely
WIDE = CorrelatedGaussianWorld(CORRELATED.mean, 3 * CORRELATED.cov)


def autoguided(schedule: Schedule, scale: float) -> Callable[[Denoiser], Denoiser]:
    guide = optimal_model(WIDE, schedule).denoiser
    return lambda denoiser: AutoguidedDenoiser(denoiser, guide.under(denoiser.schedule), scale)


def between(t: float, x_t: Tensor, scale: float) -> Tensor:
    """The guided x0, from the two gains of linear regression, Cov (alpha Cov + sigma^2 / alpha)^-1, by hand."""
    alpha, sigma2 = preserving(SCHEDULE.gamma(torch.tensor(t, dtype=torch.float64)))
    gains = [torch.linalg.solve(alpha**2 * world.cov + sigma2 * EYE, alpha * world.cov) for world in (WIDE, CORRELATED)]
    gain = (1 - scale) * gains[0] + scale * gains[1]
    return (CORRELATED.mean + (x_t.reshape(-1, 4) - alpha * CORRELATED.mean) @ gain).reshape(x_t.shape)


@pytest.mark.parametrize("t", TIMES)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 3.5])
def test_autoguidance_of_one_gaussian_by_another(t: float, scale: float) -> None:
    x_t, time = noise(20), torch.tensor(t, dtype=torch.float64)
    base = optimal_model(CORRELATED, SCHEDULE).denoiser
    guided = autoguided(SCHEDULE, scale)(base)(x_t, time)
    torch.testing.assert_close(guided.x0, between(t, x_t, scale), rtol=1e-9, atol=1e-9)
    alpha_t, sigma_t = base.scales(x_t, time)
    torch.testing.assert_close(alpha_t * guided.x0 + sigma_t * guided.eps, x_t, rtol=1e-9, atol=1e-9)


def test_autoguidance_at_scale_one_is_the_model_and_costs_no_guide() -> None:
    def never(*args: object, **cond: object) -> Prediction:
        raise AssertionError("the guide was asked")

    base, x_t, t = optimal_model(CORRELATED, SCHEDULE).denoiser, noise(5), torch.tensor(0.4, dtype=torch.float64)
    one = AutoguidedDenoiser(base, never, 1.0)(x_t, t)  # type: ignore[arg-type]
    assert torch.equal(one.x0, base(x_t, t).x0) and torch.equal(one.eps, base(x_t, t).eps)


def test_ddim_states_under_autoguidance() -> None:
    """Each step is affine in x_t, so the states are Gaussian, with moments that follow by hand."""
    model = optimal_model(CORRELATED, SCHEDULE).with_denoiser(autoguided(SCHEDULE, 2.0))
    mean, cov, (alpha, sigma2) = torch.zeros(4), EYE, preserving(torch.as_tensor(GAMMAS, dtype=torch.float64))
    states = states_of(model, DDIMSampler(), 30_000)
    for n, state in zip(range(7, -1, -1), states[:8], strict=True):
        assert_covariance(state, mean, cov)
        t, s = float(SCHEDULE.grid()[n + 1]), n - 1
        gain, at_zero = (between(t, x, 2.0).reshape(-1, 4) for x in (EYE.reshape(4, 1, 2, 2), torch.zeros(1, 1, 2, 2)))
        ratio = (sigma2[s] / sigma2[n]).sqrt()
        matrix = (alpha[s] - ratio * alpha[n]) * (gain - at_zero).T + ratio * EYE
        mean = (alpha[s] - ratio * alpha[n]) * at_zero[0] + matrix @ mean.double()
        cov = matrix @ cov @ matrix.T


@pytest.mark.parametrize("exploding", [False, True])
def test_a_guide_is_asked_at_the_noise_level_of_the_model(exploding: bool) -> None:
    """A network that is told gamma guides under a schedule of other times and units as under its own."""
    own, other = LinearGamma(-7.0, 6.0, T=50), LinearGamma(-5.0, 4.0, T=8)
    schedule: Schedule = VarianceExploding(other) if exploding else other
    guide = optimal_model(WIDE, own).denoiser
    assert isinstance(guide.conditioning, GammaConditioning)
    t, t_own = torch.tensor(0.5, dtype=torch.float64), torch.tensor((-0.5 + 7) / 13, dtype=torch.float64)
    assert other.gamma(t) == pytest.approx(float(own.gamma(t_own)))
    x_t = noise(5)
    unit = torch.exp(0.5 * schedule.log_unit_var(t))
    torch.testing.assert_close(guide.under(schedule)(unit * x_t, t).x0, guide(x_t, t_own).x0, rtol=1e-9, atol=1e-9)


# --- the contract of wrappers


def pull(x_t: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
    return -(x0_hat - 0.5).square().flatten(1).sum(1)


def two_classes(x: Tensor, c: Tensor) -> Tensor:
    return torch.stack([x.flatten(1).sum(1), c], 1)


WRAPS: dict[str, Callable[[Denoiser], Denoiser]] = {
    "product": lambda denoiser: ProductDenoiser(denoiser, pull),
    "classifier": lambda denoiser: ClassifierDenoiser(denoiser, two_classes, 2.0),
    "classifier-free": lambda denoiser: ClassifierFreeDenoiser(denoiser, 2.0, 2),
    "autoguidance": lambda denoiser: AutoguidedDenoiser(denoiser, network_model().denoiser.under(denoiser.schedule), 2),
    "both": lambda denoiser: ProductDenoiser(ClassifierFreeDenoiser(denoiser, 2.0, 2), pull),
}


@pytest.mark.parametrize("name", WRAPS)
def test_any_autograd_mode_gives_the_same(name: str) -> None:
    model = network_model().with_denoiser(WRAPS[name])
    x_t, t, cond = noise(3), torch.tensor(0.5, dtype=torch.float64), {}
    if name != "product":
        cond = {"label": torch.tensor([0, 1, 1])}
    before = x_t.clone()
    plain = model.reverse_process.denoiser(x_t, t, **cond)
    with torch.no_grad():
        without = model.reverse_process.denoiser(x_t, t, **cond)
    with torch.inference_mode():
        inputs = x_t.clone(), t.clone(), {key: value.clone() for key, value in cond.items()}
        inference = model.reverse_process.denoiser(inputs[0], inputs[1], **inputs[2])
        AncestralSampler()(model, inputs[0], generators=torch.Generator().manual_seed(0), **inputs[2])
    for prediction in (without, inference):
        assert torch.equal(prediction.x0, plain.x0) and torch.equal(prediction.eps, plain.eps)
        assert not prediction.x0.requires_grad
    if name in ("product", "both"):
        assert not plain.x0.requires_grad
    assert model.network.gain.grad is None and torch.equal(x_t, before) and not x_t.requires_grad


@pytest.mark.parametrize("name", WRAPS)
@pytest.mark.parametrize("sampler", [AncestralSampler(), DDIMSampler()])
def test_an_image_does_not_depend_on_the_batch(name: str, sampler: Sampler) -> None:
    model, x_T, label = network_model().with_denoiser(WRAPS[name]), noise(6, size=4), torch.arange(6) % 2

    def run(order: list[int]) -> Tensor:
        cond = {} if name == "product" else {"label": label[order]}
        return sampler(model, x_T[order], generators=image_generators(4, order), **cond)

    whole = run(list(range(6)))
    for order in ([5, 0, 3], [2], list(range(5, -1, -1))):
        assert torch.equal(run(order), whole[order])


@pytest.mark.parametrize("clip_x0", [False, True])
def test_a_guided_model_is_a_view(clip_x0: bool) -> None:
    """The wrapper is given the unclipped denoiser, its result is clipped; wraps go on top of each other."""
    model, given = network_model(clip_x0), []

    def wrap(denoiser: Denoiser) -> Denoiser:
        given.append(denoiser)
        return ProductDenoiser(denoiser, pull)

    first = model.with_denoiser(wrap)
    second = first.with_denoiser(wrap)
    assert given[0] is model.denoiser and isinstance(given[1], ProductDenoiser)
    assert first.network is model.network and first.denoiser is model.denoiser and second.T == model.T
    x_t, t = 2 * noise(4), torch.tensor(0.4, dtype=torch.float64)
    raw = ProductDenoiser(model.denoiser, pull)(x_t, t).x0
    assert float(raw.detach().abs().max()) > 1
    expected = raw.clamp(-1, 1) if clip_x0 else raw
    assert torch.equal(first.reverse_process.denoiser(x_t, t).x0, expected)
    assert not torch.equal(model.reverse_process.denoiser(x_t, t).x0, expected)
    shorter = first.with_steps(3)
    assert shorter.T == 3 and shorter.reverse_process is first.reverse_process


def test_guidance_errors() -> None:
    base, x_t, t = ClassDenoiser(SCHEDULE), noise(2), torch.tensor(0.5)
    with pytest.raises(InputError, match=r"class-conditional model: train one with class_conditional = true"):
        ClassifierFreeDenoiser(base, 2.0, None)(x_t, t, label=torch.zeros(2, dtype=torch.long))
    for denoiser in (ClassifierFreeDenoiser(base, 2.0, 2), ClassifierDenoiser(base, two_classes)):
        with pytest.raises(InputError, match="give label"):
            denoiser(x_t, t)
        with pytest.raises(InputError, match=r"shape \[3\] for 2 images"):
            denoiser(x_t, t, label=torch.zeros(3, dtype=torch.long))
        for wrong in (-1, 3):
            with pytest.raises(InputError, match=r"label must lie between 0 and [12], these span"):
                denoiser(x_t, t, label=torch.tensor([wrong, wrong]))
    with pytest.raises(InputError, match="label must lie between 0 and 1"):
        ClassifierDenoiser(base, two_classes)(x_t, t, label=torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="not one number for each image"):
        ProductDenoiser(base, lambda x, x0_hat, t: x0_hat.sum())(x_t, t)
