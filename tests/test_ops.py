"""Broadcasting, sums per image, and random draws that belong to an image."""

from decimal import Decimal, localcontext

import pytest
import torch
from oracles import assert_mean, assert_moments
from torch import Tensor

from ddpm_lightning.errors import InputError
from ddpm_lightning.ops import (
    BatchGenerator,
    as_times,
    expand_to,
    image_generators,
    log1mexp,
    rand,
    randn_like,
    shuffled_places,
    sum_per_image,
    sum_per_image_of,
)


def test_expand_to_appends_dimensions_when_batch_equals_width() -> None:
    images = torch.zeros(4, 4, 4, 4)
    values = torch.arange(4.0)
    product = expand_to(values, images) * torch.ones_like(images)
    for k in range(4):
        assert bool((product[k] == k).all())
    assert expand_to(torch.tensor(2.0), images).shape == (1, 1, 1, 1)
    assert expand_to(images, images).shape == images.shape


def test_as_times() -> None:
    images = torch.zeros(3, 1, 2, 2)
    assert as_times(0.1, images).dtype == torch.float64
    assert as_times(0.1, images).item() == 0.1
    assert as_times(torch.tensor([0.25, 0.5, 1.0]), images).tolist() == [0.25, 0.5, 1.0]
    for wrong in (torch.zeros(2), torch.zeros(1), torch.zeros(3, 1), torch.zeros(3, 1, 1, 1)):
        with pytest.raises(ValueError, match="one time for each of 3 images"):
            as_times(wrong, images)


def test_sum_per_image_accumulates_in_float64() -> None:
    values = torch.full((2, 1, 100, 100), 0.1)
    assert sum_per_image(values).dtype == torch.float64
    expected = 10_000 * float(torch.tensor(0.1))
    assert sum_per_image(values).tolist() == pytest.approx([expected] * 2, rel=1e-13)


@pytest.mark.parametrize("shape", [(4, 1, 1, 1), (1, 1, 1, 1), (4, 4, 4, 4), (4, 4, 1, 1), (1, 4, 4, 4), (4, 1, 4, 4)])
def test_sum_per_image_of_broadcasts(shape: tuple[int, ...]) -> None:
    like = torch.zeros(4, 4, 4, 4)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = values.expand_as(like).flatten(1).sum(1)
    torch.testing.assert_close(sum_per_image_of(values, like), expected, rtol=1e-12, atol=1e-12)


def test_log1mexp_is_accurate_at_both_ends() -> None:
    xs = [1e-300, 1e-20, 1e-10, 1e-3, 0.5, 0.6931471, 0.6931472, 1.0, 10.0, 40.0, 500.0]
    with localcontext() as context:
        context.prec = 400
        expected = [float((1 - (-Decimal(x)).exp()).ln()) for x in xs]
    actual = log1mexp(torch.tensor(xs, dtype=torch.float64)).tolist()
    assert actual == pytest.approx(expected, rel=1e-13, abs=0)
    assert log1mexp(torch.tensor(torch.inf)).item() == 0
    assert log1mexp(torch.tensor(0.0)).item() == -torch.inf


# --- random draws


def test_image_generators_depend_on_seed_and_index_only() -> None:
    def draws(seed: int, indices: list[int] | Tensor) -> list[float]:
        return [torch.rand((), generator=g, dtype=torch.float64).item() for g in image_generators(seed, indices)]

    assert draws(3, [7, 0, 5]) == [draws(3, [i])[0] for i in (7, 0, 5)]
    assert draws(3, torch.tensor([7, 5])) == draws(3, [7, 5])
    several = [draw for seed in range(20) for draw in draws(seed, list(range(200)))]
    assert len(set(several)) == len(several)
    assert draws(-1, [0]) != draws(1, [0])


def test_noise_of_an_image_does_not_depend_on_the_batch() -> None:
    whole = randn_like(torch.zeros(5, 2, 3, 3), image_generators(1, range(5)))
    for order in ([4, 1], [2], [3, 0, 4, 2]):
        part = randn_like(torch.zeros(len(order), 2, 3, 3), image_generators(1, order))
        assert torch.equal(part, whole[order])
    assert len(whole.unique()) == whole.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("per_image", [False, True])
def test_randn_like_is_standard_normal(dtype: torch.dtype, per_image: bool) -> None:
    like = torch.zeros(50, 1, 20, 20, dtype=dtype)
    noise = randn_like(like, image_generators(0, range(50)) if per_image else torch.Generator().manual_seed(0))
    assert noise.dtype == dtype and noise.shape == like.shape
    assert_moments(noise, 0.0, 1.0)
    assert_mean(noise[0] * noise[1], 0.0, max_se=0.06)


@pytest.mark.parametrize("per_image", [False, True])
def test_uniform_draws(per_image: bool) -> None:
    like = torch.zeros(4000, 1, 1, 1)

    def generators() -> list[torch.Generator] | torch.Generator:
        return image_generators(0, range(4000)) if per_image else torch.Generator().manual_seed(0)

    uniform = rand(like, generators())
    assert uniform.dtype == torch.float64 and uniform.shape == (4000,)
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1
    assert_mean(uniform, 0.5, max_se=0.005)
    assert_mean(uniform**2, 1 / 3, max_se=0.005)
    for value in range(7):
        assert_mean(((7 * uniform).long() == value).double(), 1 / 7, max_se=0.006)


def test_draws_follow_the_global_seed_without_a_generator() -> None:
    like = torch.zeros(2, 1, 2, 2)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = (randn_like(like, None), rand(like, None))
        torch.manual_seed(5)
        second = (randn_like(like, None), rand(like, None))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_one_generator_for_each_image() -> None:
    like = torch.zeros(3, 1, 2, 2)
    for draw in (randn_like, rand):
        with pytest.raises(InputError, match="2 generators for a batch of 3 images"):
            draw(like, image_generators(0, range(2)))


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_parts_of_a_batch_draw_what_the_whole_would(parts: int) -> None:
    like = torch.zeros(6, 1, 3, 3)

    def draws(like: torch.Tensor, part: int, parts: int) -> list[torch.Tensor]:
        generator = BatchGenerator(torch.Generator().manual_seed(5), part, parts)
        place, count = shuffled_places(like, generator)
        assert count == 6
        return [place, rand(like, generator), randn_like(like, generator), rand(like, generator)]

    plain = torch.Generator().manual_seed(5)
    place, count = shuffled_places(like, plain)
    whole = [place, rand(like, plain), randn_like(like, plain), rand(like, plain)]
    assert count == 6 and sorted(place.tolist()) == list(range(6))
    each = [draws(like[: 6 // parts], part, parts) for part in range(parts)]
    for expected, *got in zip(whole, *each, strict=True):
        assert torch.equal(torch.cat(got), expected) and got[0].dtype == expected.dtype
