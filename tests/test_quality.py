"""Distances between samples and data against closed forms, and the classifiers whose features they are taken in."""

import math
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from mnist_files import DATA_DIR, real_mnist
from safetensors.torch import load_file, save_file
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics import Metric

from ddpm_lightning.data import MNIST, Digits, levels_to_model
from ddpm_lightning.errors import InputError
from ddpm_lightning.metrics import (
    ClassifierFeatures,
    ClassMetrics,
    FrechetDistance,
    KernelDistance,
    PrecisionRecall,
    QualityMetrics,
    classifier_for,
    load_classifier,
    nearest,
)
from ddpm_lightning.networks import FeatureClassifier


class AsTheyAre(nn.Module):
    """Points are their own features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor) -> Tensor:
        return x


def normal(count: int, dims: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dims, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def filled(metric: Metric, real: Tensor, fake: Tensor, sizes: list[int] | None = None) -> Metric:
    for points, is_real in ((real, True), (fake, False)):
        for part in points.split(sizes or len(points)):
            metric.update(part, real=is_real)
    return metric


def values(metric: Metric) -> list[float]:
    result = metric.compute()
    return [float(v) for v in (result.values() if isinstance(result, dict) else [result])]


PAIRS: list[Callable[[int], Metric]] = [
    lambda d: FrechetDistance(AsTheyAre(d)),
    lambda d: KernelDistance(AsTheyAre(d)),
    lambda d: PrecisionRecall(AsTheyAre(d)),
]


# --- Frechet


def with_moments(mean: np.ndarray, cov: np.ndarray, count: int, seed: int) -> Tensor:
    """Points whose sample mean and sample covariance are the given ones exactly."""
    z = normal(count, len(mean), seed).numpy()
    z -= z.mean(0)
    z = z @ np.linalg.inv(np.linalg.cholesky(np.cov(z.T))).T
    return torch.from_numpy(z @ np.linalg.cholesky(cov).T + mean)


def test_frechet_is_the_closed_form_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    d = 6
    (mean_a, mean_b), roots = rng.normal(size=(2, d)), rng.normal(size=(2, d, d))
    cov_a, cov_b = (root @ root.T + 0.1 * np.eye(d) for root in roots)
    square = ((mean_a - mean_b) ** 2).sum()
    expected = square + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    real, fake = with_moments(mean_a, cov_a, 50, 1), with_moments(mean_b, cov_b, 80, 2)
    assert values(filled(FrechetDistance(AsTheyAre(d)), real, fake)) == [pytest.approx(expected, rel=1e-9)]


def test_frechet_of_equal_covariances_is_the_distance_of_the_means() -> None:
    points = normal(40, 5)
    shift = torch.tensor([1.0, 0, 0, 2, 0])
    assert values(filled(FrechetDistance(AsTheyAre(5)), points, points + shift)) == [pytest.approx(5, rel=1e-7)]
    assert abs(values(filled(FrechetDistance(AsTheyAre(5)), points, points))[0]) < 1e-6


# --- kernel distance


def test_kernel_distance_is_the_double_loop() -> None:
    real, fake = normal(9, 3), 1.5 * normal(7, 3, seed=1) + 0.3

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    def within(points: Tensor) -> float:
        n = len(points)
        return sum(k(points[i], points[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))

    between = sum(k(a, b) for a in real for b in fake) / (len(real) * len(fake))
    expected = within(real) + within(fake) - 2 * between
    assert values(filled(KernelDistance(AsTheyAre(3)), real, fake)) == [pytest.approx(expected, rel=1e-12)]


def test_kernel_distance_of_one_distribution_is_0_on_average() -> None:
    draws = torch.tensor(
        [values(filled(KernelDistance(AsTheyAre(4)), *normal(60, 4, seed).chunk(2)))[0] for seed in range(300)]
    )
    assert abs(float(draws.mean())) < 4 * float(draws.std()) / 300**0.5
    shifted = filled(KernelDistance(AsTheyAre(4)), normal(30, 4), normal(30, 4, seed=1) + 2)
    assert values(shifted)[0] > 10 * float(draws.std())


# --- precision and recall


def test_precision_and_recall_of_hand_made_sets() -> None:
    """On a line with k = 1: real balls have radius 1, those of the samples 0.5 and 7."""
    real = torch.tensor([[0.0], [1.0], [2.0], [10.0], [11.0]])
    fake = torch.tensor([[0.5], [1.0], [20.0], [27.0]])
    metric = filled(PrecisionRecall(AsTheyAre(1), k=1), real, fake)
    # of the samples 0.5 and 1 lie in real balls; the balls [0, 1], [0.5, 1.5], [13, 27], [20, 34] hold 0 and 1
    assert {name: float(v) for name, v in metric.compute().items()} == {"precision": 0.5, "recall": 0.4}


def test_the_third_neighbour_is_the_default_radius() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # radii 3, 2, 2, 3: they cover [-3, 6]
    fake = torch.tensor([[-2.9], [-3.1], [5.9], [6.1]])  # radii 9.2, 9.2, 9, 9.2
    result = filled(PrecisionRecall(AsTheyAre(1)), real, fake).compute()
    assert {name: float(v) for name, v in result.items()} == {"precision": 0.5, "recall": 1.0}


def test_a_mode_that_is_missing_costs_recall_and_one_too_many_precision() -> None:
    modes = [normal(50, 2, seed) + 20 * seed for seed in range(3)]
    few, all_ = torch.cat(modes[:1]), torch.cat(modes)
    missing = filled(PrecisionRecall(AsTheyAre(2)), all_, few + 0.01).compute()
    extra = filled(PrecisionRecall(AsTheyAre(2)), few, all_ + 0.01).compute()
    assert float(missing["precision"]) == float(extra["recall"]) == 1
    assert float(missing["recall"]) == float(extra["precision"]) == pytest.approx(1 / 3)


def test_nearest_neighbours() -> None:
    points, queries = normal(1300, 6).float(), normal(700, 6, seed=1).float()
    distances, rows = nearest(queries, points, 3)
    exact = (queries[:, None].double() - points[None].double()).norm(dim=2)
    assert torch.allclose(distances.double(), exact.sort(1).values[:, :3], rtol=1e-5)
    assert torch.allclose(exact.gather(1, rows), distances.double(), rtol=1e-5)
    # a copy is at distance 0, which a matrix product alone would not say
    assert bool((nearest(points[:30] + 100, points + 100)[0] == 0).all())


# --- batches and processes


@pytest.mark.parametrize("make", PAIRS)
def test_figures_depend_on_no_split_into_batches(make: Callable[[int], Metric]) -> None:
    real, fake = normal(40, 3), normal(40, 3, seed=1) + 0.2
    whole = values(filled(make(3), real, fake))
    for sizes in ([1] * 40, [33, 7], [5, 35]):
        assert values(filled(make(3), real, fake, sizes)) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("make", PAIRS)
def test_parts_merge_to_the_whole(make: Callable[[int], Metric]) -> None:
    real, fake = normal(40, 3), normal(40, 3, seed=1) + 0.2
    parts = [filled(make(3), real[rows], fake[rows]) for rows in (slice(0, 11), slice(11, 40))]
    parts[0].merge_state(parts[1])
    assert values(parts[0]) == pytest.approx(values(filled(make(3), real, fake)), rel=1e-9)


@pytest.mark.parametrize("make", PAIRS)
@pytest.mark.parametrize(("real", "fake", "words"), [(1, 9, "real images, and got 1"), (9, 0, "samples, and got 0")])
def test_too_few_images(make: Callable[[int], Metric], real: int, fake: int, words: str) -> None:
    metric = filled(make(2), normal(real, 2), normal(fake, 2)) if fake else make(2)
    if not fake:
        metric.update(normal(real, 2), real=True)
    with pytest.raises(InputError, match=words):
        metric.compute()


# --- classes


class Signs(FeatureClassifier):
    """Features are the first two pixels; the class is 1 where the first is positive."""

    def __init__(self) -> None:
        super().__init__(1, 2, 2, width=1, num_features=2)
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        self.head = nn.Sequential(nn.Linear(2, 2, bias=False))
        with torch.no_grad():
            self.body[1].weight.copy_(torch.eye(2, 4))
            self.head[0].weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_class_figures() -> None:
    pixels = torch.tensor([[1.0, 0], [3, 0], [1, 2], [-1, 5]])
    images = torch.cat([pixels, torch.zeros(4, 2)], 1).view(4, 1, 2, 2)
    metric = ClassMetrics(Signs())
    metric.update(images[:3], torch.tensor([1, 0, 1]))
    metric.update(images[3:], torch.tensor([0]))
    figures = {name: float(value) for name, value in metric.compute().items()}
    # class 1 has features (1, 0), (3, 0), (1, 2), about their mean (5/3, 2/3): squares sum to 8/3 + 8/3
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    expected = {"accuracy": 0.75, "class_entropy": entropy, "spread": math.sqrt(16 / 3 / 4)}
    assert figures == pytest.approx(expected, rel=1e-6)
    unlabelled = ClassMetrics(Signs())
    unlabelled.update(images)
    assert set(unlabelled.compute()) == {"class_entropy", "spread"}
    collapsed = ClassMetrics(Signs())
    collapsed.update(images[:1].expand(5, -1, -1, -1))
    assert [float(v) for v in collapsed.compute().values()] == [0, 0]
    with pytest.warns(UserWarning, match="before"), pytest.raises(InputError, match="at least 1 image"):
        ClassMetrics(Signs()).compute()


# --- classifiers


@pytest.mark.parametrize("name", ["mnist", "digits"])
def test_weights_are_in_the_package_and_small(name: str) -> None:
    resource = files("ddpm_lightning.metrics").joinpath("weights", f"{name}.safetensors")
    assert resource.is_file() and len(resource.read_bytes()) < 2**20


def test_the_digits_classifier_knows_its_test_images() -> None:
    classifier, test = load_classifier("digits"), Digits().split("test")
    predicted = classifier(levels_to_model(test.images, 17)).argmax(1)
    assert float((predicted == test.labels).double().mean()) > 0.98


@pytest.mark.mnist
@real_mnist
def test_the_mnist_classifier_knows_its_test_images() -> None:
    classifier, test = load_classifier("mnist"), MNIST(str(DATA_DIR)).split("test")
    hits = [classifier(levels_to_model(x, 256)).argmax(1) for x in test.images.split(500)]
    assert float((torch.cat(hits) == test.labels).double().mean()) > 0.99


def test_loading_draws_nothing_and_a_file_of_ones_own_does(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    classifier = load_classifier("digits")
    assert torch.equal(torch.get_rng_state(), before)
    assert not classifier.training and not any(p.requires_grad for p in classifier.parameters())
    own = FeatureClassifier(3, 5, 4, width=2, num_features=6)
    args = '{"channels": 3, "size": 5, "num_classes": 4, "width": 2, "num_features": 6}'
    save_file(own.state_dict(), tmp_path / "own.safetensors", metadata={"init_args": args})
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(load_classifier(str(tmp_path / "own.safetensors"))(x), own(x))


def test_features_belong_to_the_image_alone_and_to_the_right_ones() -> None:
    classifier = load_classifier("digits")
    x = levels_to_model(Digits().split("test").images[:9], 17)
    extractor = ClassifierFeatures(classifier)
    assert extractor(x).shape == (9, extractor.num_features) == (9, 64)
    assert torch.allclose(extractor(x)[4:5], extractor(x[4:5]), atol=1e-5)
    assert torch.equal(classifier.head(extractor(x)), classifier(x))
    for wrong in (x[..., 1:], x.expand(-1, 3, -1, -1), Digits().split("test").images):
        with pytest.raises(ValueError, match=r"floating-point images \[B, 1, 8, 8\] in model range"):
            classifier.features(wrong)


def test_classifiers_that_there_are_not(tmp_path: Path) -> None:
    assert (classifier_for((1, 28, 28), 256), classifier_for((1, 8, 8), 17)) == ("mnist", "digits")
    with pytest.raises(InputError, match=r"shape \[1, 28, 28\] with 17 grey levels, only mnist"):
        classifier_for((1, 28, 28), 17)
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(str(files("ddpm_lightning.metrics") / "weights" / "digits.safetensors")), plain)
    for name in ("imagenet", str(plain), __file__):
        with pytest.raises(InputError, match="neither mnist nor digits"):
            load_classifier(name)
    with pytest.raises(ValueError, match="width = 0 must be 1 or more"):
        FeatureClassifier(width=0)


def test_noise_is_worse_than_data_in_every_figure() -> None:
    """All figures at once, on halves of the digits and on shuffled pixels."""
    split = Digits().split("train")
    x, order = levels_to_model(split.images, 17), torch.randperm(64, generator=torch.Generator().manual_seed(0))
    rows = {}
    for name, images in (("data", x[650:]), ("shuffled", x[650:].flatten(2)[..., order].view(-1, 1, 8, 8))):
        figures = QualityMetrics(load_classifier("digits"))
        figures.update(x[:650], real=True)
        figures.update(images, real=False, label=split.labels[650:])
        rows[name] = figures.compute()
    data, shuffled = rows["data"], rows["shuffled"]
    assert set(data) == {"frechet", "kernel", "precision", "recall", "accuracy", "class_entropy", "spread"}
    assert data["frechet"] < 0.1 * shuffled["frechet"] and data["kernel"] < 0.1 * shuffled["kernel"]
    assert data["precision"] > 0.8 > shuffled["precision"] and data["recall"] > 0.8 > shuffled["recall"]
    assert data["accuracy"] > 0.98 > shuffled["accuracy"] and data["class_entropy"] > 0.99 * math.log(10)
