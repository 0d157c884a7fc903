"""Attacks against PGD written out in float64, and the promises on the ball and on the random start."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import ToyNet, toy_batch

from arat_dist.attacks import PGD, L2Ball, LinfBall, input_gradient, uniform_noise

EPS = 8 / 255


def toy_pixels(count: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    """All 256 values of a byte, 0 and 1 among them."""
    images, _, _ = toy_batch(count)
    return images.to(dtype) / 255


def toy_loss(net: nn.Module, labels: Tensor):
    return lambda x: F.cross_entropy(net(x), labels, reduction="sum")


def quiet_net() -> nn.Module:
    torch.manual_seed(0)
    return ToyNet("group").double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eps", [4 / 255, 8 / 255, 0.3, 1e-3])
def test_linf_stays_in_the_ball_exactly_and_leaves_the_clean_pictures_alone(eps, dtype):
    pixels = toy_pixels(dtype=dtype)
    before = pixels.clone()
    attack = PGD("linf", eps, eps, 3, seed=3)
    direction = torch.randn(pixels.shape, dtype=dtype)
    adversarial = attack(lambda x: (x * direction).sum(), pixels, torch.arange(32))
    assert torch.equal(pixels, before)
    assert not pixels.requires_grad
    assert not adversarial.requires_grad
    # Exactly, not to a place: the difference of two float32 is exact in float64 (that of two float64 isn't).
    slack = 1e-16 if dtype == torch.float64 else 0
    assert (adversarial.double() - pixels.double()).abs().max() <= eps + slack
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    # Not by staying far inside: rounding inwards costs at most one place of the type.
    reach = (adversarial.double() - pixels.double()).abs().amax((1, 2, 3))
    assert reach.max() >= eps - 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("random_start", [True, False])
def test_linf_equals_pgd_written_out(random_start):
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    attack = PGD("linf", EPS, EPS / 3, 5, random_start, seed=7)
    adversarial = attack(toy_loss(net, labels), pixels, keys)

    expected = pixels.clone()
    if random_start:
        expected = pixels + EPS * (2 * uniform_noise(keys, pixels, 7) - 1)
        expected = torch.minimum(torch.maximum(expected, torch.zeros(())), torch.ones(()))
    for _ in range(5):
        moved = []
        for x, clean, label in zip(expected, pixels, labels, strict=True):
            x = x[None].detach().requires_grad_()
            F.cross_entropy(net(x), label[None]).backward()
            assert x.grad is not None
            step = x.detach() + EPS / 3 * torch.sign(x.grad)
            moved.append(torch.clamp(clean + torch.clamp(step - clean, -EPS, EPS), 0, 1)[0])
        expected = torch.stack(moved)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-12)
    assert (adversarial - pixels).abs().max() > EPS / 2
    # Even an attack of no steps gives pictures of its own.
    assert PGD("linf", EPS, EPS, 0, random_start)(toy_loss(net, labels), pixels, keys).data_ptr() != pixels.data_ptr()


def test_l2_equals_pgd_written_out_and_stays_in_the_ball():
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    eps = 0.5
    attack = PGD("l2", eps, 0.2, 6, random_start=False)
    adversarial = attack(toy_loss(net, labels), pixels, keys)
    expected = []
    for clean, label in zip(pixels, labels, strict=True):
        x = clean
        for _ in range(6):
            leaf = x[None].detach().requires_grad_()
            F.cross_entropy(net(leaf), label[None]).backward()
            assert leaf.grad is not None
            gradient = leaf.grad[0]
            x = x + 0.2 * gradient / math.sqrt(float((gradient**2).sum()))
            length = math.sqrt(float(((x - clean) ** 2).sum()))
            x = torch.clamp(clean + (x - clean) * min(1, eps / length), 0, 1)
        expected.append(x)
    torch.testing.assert_close(adversarial, torch.stack(expected), rtol=0, atol=2e-6)
    for dtype in (torch.float32, torch.float64):
        clean = pixels.to(dtype)
        for start in (True, False):
            direction = torch.randn(clean.shape, dtype=dtype)
            moved = PGD("l2", eps, 1.0, 2, start)(lambda x, d=direction: (x * d).sum(), clean, keys)
            norms = (moved.double() - clean.double()).flatten(1).norm(dim=1)
            assert norms.max() <= eps
            assert norms.max() > 0.8 * eps  # what is missing is clipped at 0 and 1
            assert torch.equal(clean, pixels.to(dtype))


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
    pixels = torch.full((count, 3, 2, 2), 0.5, dtype=torch.float64)
    start = L2Ball(pixels, eps).start(uniform_noise(torch.arange(count), pixels, 9)) - pixels
    volumes = (start.flatten(1).norm(dim=1) / eps) ** dim
    assert volumes.max() <= 1
    bins = torch.histc(volumes, 10, 0, 1)
    assert ((bins - count / 10) ** 2 / (count / 10)).sum() < 27.9  # chi-square, 9 degrees, p = 0.001
    directions = start.flatten(1) / start.flatten(1).norm(dim=1, keepdim=True)
    assert directions.mean(0).abs().max() < 4 / math.sqrt(count * dim)
    covariance = directions.T @ directions / count
    torch.testing.assert_close(covariance, torch.eye(dim, dtype=torch.float64) / dim, rtol=0, atol=0.012)


def test_linf_start_is_uniform_in_the_cube_and_the_noise_has_no_pattern():
    count = 1000
    pixels = torch.full((count, 3, 4, 4), 0.5, dtype=torch.float64)
    noise = uniform_noise(torch.arange(count), pixels, 5)
    assert noise.min() >= 0
    assert noise.max() < 1
    values = noise.flatten()
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(values))
    assert abs(values.var() - 1 / 12) < 0.002
    bins = torch.histc(values, 50, 0, 1)
    assert ((bins - len(values) / 50) ** 2 / (len(values) / 50)).sum() < 85.4  # 49 degrees, p = 0.001
    rows = noise.flatten(1)
    rows = (rows - rows.mean()) / rows.std()
    # Neighbouring pixels and neighbouring keys know nothing of each other.
    for a, b in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1]), (rows[2:], rows[:-2])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())
    start = LinfBall(pixels, EPS).start(noise)
    torch.testing.assert_close(start - pixels, EPS * (2 * noise - 1), rtol=0, atol=1e-15)


def test_noise_is_a_function_of_seed_and_key_alone():
    keys = torch.tensor([0, 5, 2**31, 2**32 + 5, 2**40 + 5, 7 * 1_281_167 + 5])
    like = torch.zeros(6, 3, 5, 4)
    noise = uniform_noise(keys, like, 3)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(uniform_noise(keys[order], like, 3), noise[order])
    assert torch.equal(torch.cat([uniform_noise(keys[i : i + 2], like[:2], 3) for i in (0, 2, 4)]), noise)
    last = like.contiguous(memory_format=torch.channels_last)
    strided = uniform_noise(keys, last, 3)
    assert strided.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(strided, noise)
    assert torch.equal(uniform_noise(keys, like.double(), 3), noise.double())
    assert uniform_noise(torch.zeros(1, dtype=torch.int64), like[:1], 0).flatten()[0] > 0  # a counter begins at 0
    # Other keys (above 32 bits too) and other seeds: about no pixel in common.
    flat = noise.flatten(1)
    for i in range(6):
        for j in range(i):
            assert (flat[i] == flat[j]).sum() <= 1
    for seed in (0, 2, 4, 2**31 - 1):
        assert (uniform_noise(keys, like, seed) == noise).sum() <= 2
    torch.manual_seed(0)
    state = torch.get_rng_state()
    uniform_noise(keys, like, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_attack_is_the_same_in_any_split_of_the_batch_and_differs_between_epochs():
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    attack = PGD("linf", EPS, EPS / 4, 2, seed=1)

    def run(part: slice, shift: int = 0) -> Tensor:
        return attack(toy_loss(net, labels[part]), pixels[part], keys[part] + shift)

    whole = run(slice(None))
    torch.testing.assert_close(torch.cat([run(slice(0, 3)), run(slice(3, 8))]), whole, rtol=0, atol=1e-12)
    num_samples = 50_000
    assert ((run(slice(None), num_samples) - whole).abs() > 1e-6).float().mean() > 0.5


def test_input_gradient_leaves_weights_and_callers_gradient_mode_alone():
    net, pixels = quiet_net(), toy_pixels(4)
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        gradient = input_gradient(toy_loss(net, labels), pixels)
        assert not torch.is_grad_enabled()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert pixels.grad is None
    assert not pixels.requires_grad
    # Central differences along a random direction.
    direction = torch.randn_like(pixels)
    loss = toy_loss(net, labels)
    slope = (loss(pixels + 1e-5 * direction) - loss(pixels - 1e-5 * direction)) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("norm", "eps"), [("linf", EPS), ("l2", 0.5)])
def test_the_attack_climbs_the_loss_and_more_steps_climb_further(norm, eps):
    net = quiet_net()
    images, labels, keys = toy_batch(32)
    pixels = images.double() / 255

    def loss_after(steps: int) -> float:
        adversarial = PGD(norm, eps, eps / 3, steps)(toy_loss(net, labels), pixels, keys) if steps else pixels
        return float(toy_loss(net, labels)(adversarial).detach())

    clean, one, many = (loss_after(steps) for steps in (0, 1, 8))
    noise_only = float(toy_loss(net, labels)(PGD(norm, eps, eps, 0)(toy_loss(net, labels), pixels, keys)).detach())
    assert many > one > clean
    assert many - clean > 3 * abs(noise_only - clean)
