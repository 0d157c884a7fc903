"""Each ball: never left, the nearest point found, the distribution of starts, the direction and length of steps."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize
from torch import Tensor
from toys import toy_batch

from arat_dist.attacks import uniform_noise
from arat_dist.balls import BALLS, L1Ball, L2Ball, LinfBall, normal

EPS = 8 / 255
MARGIN = 1 - 1e-6
"""Of the l1 ball's radius: what the projection aims at."""


def toy_pixels(count: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    """All 256 values of a byte, 0 and 1 among them."""
    images, _, _ = toy_batch(count)
    return images.to(dtype) / 255


def norms(delta: Tensor, norm: str) -> Tensor:
    return delta.double().flatten(1).norm(p={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)


# --- all balls


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5), ("l1", 5.0), ("l1", 200.0)])
def test_whatever_is_projected_comes_into_the_ball_and_the_box(norm, eps, dtype):
    pixels = toy_pixels(dtype=dtype)
    before = pixels.clone()
    ball = BALLS[norm](pixels, eps)
    for scale in (1e-3, 0.05, 1.0, 30.0):
        moved = pixels + scale * torch.randn_like(pixels)
        kept = moved.clone()
        inside = ball.project(moved)
        assert torch.equal(moved, kept)
        assert inside.dtype == dtype
        assert inside.min() >= 0
        assert inside.max() <= 1
        assert (norms(inside.double() - pixels.double(), norm) <= eps + (1e-16 if norm == "linf" else 0)).all()
        # What is inside already stays, but for rounding.
        torch.testing.assert_close(ball.project(inside), inside, rtol=0, atol=2 * torch.finfo(dtype).eps)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_each_sample_may_have_a_step_size_of_its_own(norm):
    pixels = toy_pixels(3)
    gradient = torch.randn_like(pixels)
    ball = BALLS[norm](pixels, 5.0)
    sizes = torch.tensor([0.1, 0.01, 0.5], dtype=torch.float64)
    together = ball.ascend(pixels, gradient, sizes.view(3, 1, 1, 1))
    for i, size in enumerate(sizes.tolist()):
        alone = BALLS[norm](pixels[i : i + 1], 5.0).ascend(pixels[i : i + 1], gradient[i : i + 1], size)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-15)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_memory_format_is_kept(norm):
    pixels = toy_pixels(4).contiguous(memory_format=torch.channels_last)
    gradient = torch.randn_like(pixels)
    ball = BALLS[norm](pixels, 0.5)
    plain = BALLS[norm](pixels.contiguous(), 0.5)
    noise = uniform_noise(torch.arange(4), pixels, 3)
    for here, there in (
        (ball.start(noise), plain.start(noise.contiguous())),
        (ball.ascend(pixels, gradient, 0.1), plain.ascend(pixels.contiguous(), gradient.contiguous(), 0.1)),
        (ball.project(pixels + gradient), plain.project((pixels + gradient).contiguous())),
    ):
        assert here.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(here.contiguous(), there, rtol=0, atol=1e-15)


def test_normal_numbers():
    values = normal(uniform_noise(torch.arange(100), torch.zeros(100, 3, 20, 20), 4)).double().flatten()
    for low, high in ((-9, -2), (-2, -1), (-1, 0), (0, 0.5), (0.5, 1.5), (1.5, 9)):
        share = 0.5 * (math.erf(high / math.sqrt(2)) - math.erf(low / math.sqrt(2)))
        found = ((values >= low) & (values < high)).double().mean()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / len(values))
    ends = normal(torch.tensor([0.0, 1 - 2**-24]))
    assert ends.isfinite().all()
    assert (ends.abs() > 5).all()


# --- linf


def test_linf_start_is_uniform_in_the_cube():
    pixels = torch.full((10, 3, 4, 4), 0.5, dtype=torch.float64)
    noise = uniform_noise(torch.arange(10), pixels, 5)
    start = LinfBall(pixels, EPS).start(noise)
    torch.testing.assert_close(start - pixels, EPS * (2 * noise - 1), rtol=0, atol=1e-15)


# --- l2


def test_l2_step_goes_along_the_gradient_of_each_sample_alone():
    pixels = torch.full((3, 3, 4, 4), 0.5, dtype=torch.float64)
    ball = L2Ball(pixels, 10.0)
    gradient = torch.randn(3, 3, 4, 4, dtype=torch.float64) * torch.tensor([1e-9, 1.0, 0.0]).view(3, 1, 1, 1)
    delta = ball.ascend(pixels, gradient, 0.1) - pixels
    lengths = delta.flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.tensor([0.1, 0.1, 0.0], dtype=torch.float64))
    cosine = F.cosine_similarity(delta[:2].flatten(1), gradient[:2].flatten(1), eps=1e-30)
    torch.testing.assert_close(cosine, torch.ones(2, dtype=torch.float64))


def test_l2_start_is_uniform_in_the_ball():
    """(radius/eps)**d is uniform in [0,1] for a uniform point of a ball in d dimensions; directions have no mean."""
    count, dim, eps = 4000, 3 * 2 * 2, 0.1
    start = starts(L2Ball, count, eps)
    check_volumes(norms(start, "l2"), dim, eps)
    directions = start.flatten(1) / start.flatten(1).norm(dim=1, keepdim=True)
    assert directions.mean(0).abs().max() < 4 / math.sqrt(count * dim)
    covariance = directions.T @ directions / count
    torch.testing.assert_close(covariance, torch.eye(dim, dtype=torch.float64) / dim, rtol=0, atol=0.012)


def starts(kind: type[L1Ball | L2Ball], count: int, eps: float) -> Tensor:
    """Starts around grey, in 12 dimensions, far from the box."""
    pixels = torch.full((count, 3, 2, 2), 0.5, dtype=torch.float64)
    return kind(pixels, eps).start(uniform_noise(torch.arange(count), pixels, 9)) - pixels


def check_volumes(radii: Tensor, dim: int, eps: float) -> None:
    volumes = (radii / eps) ** dim
    assert volumes.max() <= 1
    check_uniform(volumes)


def check_uniform(values: Tensor) -> None:
    bins = torch.histc(values, 10, 0, 1)
    expected = len(values) / 10
    assert ((bins - expected) ** 2 / expected).sum() < 27.9  # chi-square, 9 degrees, p = 0.001


# --- l1


def most_of(slope: Tensor, pixels: Tensor, eps: float) -> float:
    """Largest sum(slope * d) over all d with |d|_1 <= eps and pixels + d in [0,1]: steepest first, each to its limit.

    A point p of this set is the nearest one to u exactly if (u - p) * (d - p) sums to at most 0 for every d of it.
    """
    left, total = eps, 0.0
    for size, room in sorted(
        zip(slope.abs().tolist(), torch.where(slope > 0, 1 - pixels, pixels).tolist(), strict=True), reverse=True
    ):
        total += size * min(room, left)
        left -= min(room, left)
    return total


@pytest.mark.parametrize(("dtype", "places"), [(torch.float64, 1e-11), (torch.float32, 3e-5)])
@pytest.mark.parametrize(("eps", "scale"), [(0.5, 0.01), (3, 0.1), (3, 1), (40, 0.5), (12, 20), (1e-3, 1)])
def test_l1_projection_is_the_nearest_point(eps, scale, dtype, places):
    pixels = toy_pixels(6, dtype)
    moved = pixels + scale * torch.randn_like(pixels) ** 3
    found = L1Ball(pixels, eps).project(moved)
    for x, u, p in zip(pixels, moved, found, strict=True):
        x, wanted, d = (t.double().flatten() for t in (x, u.double() - x.double(), p.double() - x.double()))
        rest = wanted - d
        gap = most_of(rest, x, eps * MARGIN) - float((rest * d).sum())
        assert abs(gap) <= places * max(1, float(rest.abs().max())) * max(1, eps)


def test_l1_projection_agrees_with_a_general_solver():
    """Twelve numbers, split into what is added and what is taken away, so that all constraints are straight."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.rand(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    moved = pixels + 0.7 * torch.randn(3, 3, 2, 2, generator=generator, dtype=torch.float64)
    found = L1Ball(pixels, 1.5).project(moved)
    split = np.concatenate([np.eye(12), -np.eye(12)], 1)
    for x, u, p in zip(pixels.flatten(1).numpy(), moved.flatten(1).numpy(), found.flatten(1).numpy(), strict=True):
        solved = minimize(
            lambda d, u=u, x=x: ((x + split @ d - u) ** 2).sum(),
            np.full(24, 0.01),
            jac=lambda d, u=u, x=x: 2 * split.T @ (x + split @ d - u),
            bounds=[(0, 1 - v) for v in x] + [(0, v) for v in x],
            constraints={"type": "ineq", "fun": lambda d: 1.5 * MARGIN - d.sum(), "jac": lambda d: -np.ones(24)},
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert solved.success
        assert abs(x + split @ solved.x - p).max() < 1e-5


def test_l1_leaves_alone_what_is_inside():
    """Bit for bit, with numbers that add up without rounding."""
    pixels = torch.arange(96).view(2, 3, 4, 4) / 128
    moved = pixels + torch.arange(96).sub(48).view(2, 3, 4, 4) / 4096
    assert torch.equal(L1Ball(pixels, 1.0).project(moved), moved.clamp(0, 1))


def test_l1_norm_is_kept_exactly_where_rounding_is_all_there_is():
    """37,632 numbers of float32, each rounded by up to 3e-8: without rounding inwards small radii are overrun."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (6, 3, 112, 112), generator=generator) / 255
    noise = uniform_noise(torch.arange(6), pixels, 0)
    for eps in (0.02, 0.3, 75.0):
        ball = L1Ball(pixels, eps)
        assert norms(ball.start(noise).double() - pixels.double(), "l1").max() <= eps
        for spread in (1, eps / 1000):
            moved = ball.project(pixels + spread * torch.randn(pixels.shape, generator=generator))
            reach = norms(moved.double() - pixels.double(), "l1")
            assert 0.99 * eps < reach.min() <= reach.max() <= eps


def test_l1_start_is_uniform_in_the_ball():
    """The volume within a radius is uniform; of the sphere's coordinates, any one's share s has (1 - s)**(d-1) so."""
    count, dim, eps = 4000, 3 * 2 * 2, 0.1
    start = starts(L1Ball, count, eps).flatten(1)
    check_volumes(start.abs().sum(1) / MARGIN, dim, eps)
    shares = start / start.abs().sum(1, keepdim=True)
    for i in (0, 5, 11):
        check_uniform((1 - shares[:, i].abs()) ** (dim - 1))
    assert shares.mean(0).abs().max() < 4 * math.sqrt(2 / (dim * (dim + 1)) / count)
    products = shares.T @ shares / count
    torch.testing.assert_close(
        products, torch.eye(dim, dtype=torch.float64) * 2 / (dim * (dim + 1)), rtol=0, atol=0.0015
    )


def test_l1_step_is_dealt_evenly_to_the_largest_gradients():
    pixels = 0.25 + toy_pixels(5) / 2
    gradient = torch.randn_like(pixels) * torch.tensor([1.0, 1e-9, 1e6, 1.0, 0.0]).view(5, 1, 1, 1)
    gradient[3].view(-1)[7:] = 0
    ball = L1Ball(pixels, 50.0)
    shares = torch.tensor([0.1, 0.5, 0.0, 1.0, 0.5]).view(5, 1, 1, 1)
    for share, counts in ((0.01, [2, 2, 2, 2, 0]), (0.2, [38, 38, 38, 7, 0]), (shares, [19, 96, 1, 7, 0])):
        delta = (ball.ascend(pixels, gradient, 0.2, share) - pixels).flatten(1)
        for row, slope, count in zip(delta, gradient.flatten(1), counts, strict=True):
            top = slope.abs().argsort(descending=True)[:count]
            expected = torch.zeros_like(row)
            expected[top] = slope[top].sign() * 0.2 / max(count, 1)
            torch.testing.assert_close(row, expected, rtol=0, atol=1e-15)
    assert torch.equal(ball.ascend(pixels, gradient, 0.2), ball.ascend(pixels, gradient, 0.2, 0.01))


def test_l1_step_passes_over_what_the_box_holds():
    pixels = torch.full((1, 3, 2, 2), 0.5, dtype=torch.float64)
    flat = pixels.view(-1)
    flat[:4] = torch.tensor([0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    gradient = torch.linspace(2, 1, 12, dtype=torch.float64).view_as(pixels).clone()
    gradient.view(-1)[[0, 3]] *= -1
    # 0 wants to fall below 0 and 1 above 1: they are stuck; 2 and 3 go the other way.
    delta = L1Ball(pixels, 5.0).ascend(pixels, gradient, 0.3, 3 / 12) - pixels
    expected = torch.zeros(12, dtype=torch.float64)
    expected[[2, 3, 4]] = torch.tensor([0.1, -0.1, 0.1], dtype=torch.float64)
    torch.testing.assert_close(delta.view(-1), expected, rtol=0, atol=1e-15)
