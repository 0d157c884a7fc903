"""Compiled arithmetic gives what plain torch gives."""

import pytest
import torch

from arat_dist.attacks import PGD, uniform_noise
from arat_dist.balls import LinfBall
from arat_dist.fusion import fused, fusible
from arat_dist.objectives.base import to_pixels

KEYS = torch.tensor([0, 7, 2**40 + 3, 5])


def images(channels_last: bool = True) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 256, (4, 3, 9, 9), generator=generator, dtype=torch.uint8)
    return drawn.contiguous(memory_format=torch.channels_last) if channels_last else drawn


def energy(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels**2).sum((1, 2, 3))


def test_the_attacks_arithmetic_is_the_same_bit_for_bit():
    pixels = to_pixels(images(), torch.float32)
    gradient = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(1))
    gradient[0] = 0
    noise = uniform_noise(KEYS, pixels, 3)
    ball = LinfBall(pixels, 8 / 255)
    step = ball.ascend(ball.start(noise), gradient, 2 / 255)
    with fused():
        assert torch.equal(to_pixels(images(), torch.float32), pixels)
        own_noise = uniform_noise(KEYS, pixels, 3)
        own_ball = LinfBall(pixels, 8 / 255)
        own_step = own_ball.ascend(own_ball.start(own_noise), gradient, 2 / 255)
    assert torch.equal(own_noise, noise)
    assert own_noise.stride() == noise.stride()
    assert torch.equal(own_ball._low, ball._low)
    assert torch.equal(own_ball._high, ball._high)
    assert torch.equal(own_step, step)
    assert not torch.equal(own_step, pixels)


def test_an_attack_with_compiled_arithmetic_stays_in_every_ball_of_a_warm_up():
    """Each eps of a course runs the same compiled code: a float would be compiled in, and after some given up."""
    from torch._dynamo.utils import counters

    pixels = to_pixels(images(), torch.float32)
    before = pixels.clone()
    courses = [PGD("linf", k / 765, k / 1530, 2) for k in range(1, 12)]
    plain = [attack(energy, pixels, KEYS) for attack in courses]
    with fused():
        PGD("linf", 0.01, 0.004, 1)(energy, pixels, KEYS)
        counters.clear()
        for attack, expected in zip(courses, plain, strict=True):
            attacked = attack(energy, pixels, KEYS)
            assert float((attacked.double() - pixels.double()).abs().max()) <= attack.eps
            assert 0 <= float(attacked.min()) <= float(attacked.max()) <= 1
            assert torch.equal(attacked, expected)
    assert torch.equal(pixels, before)
    assert counters["stats"]["unique_graphs"] == 0


def test_outside_nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled"))
    assert fusible(lambda x, y: x + y)(torch.ones(2), 1.0).tolist() == [2, 2]
