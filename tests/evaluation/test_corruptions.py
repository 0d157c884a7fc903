"""Common corruptions: a function of the picture, the kind and the severity alone."""

from typing import Any

import numpy as np
import pytest

from arat_dist.errors import UserError
from arat_dist.evaluation.corruptions import COMMON, EXTRA, SEVERITIES, Corruption, parse_corruptions


def picture(seed: int = 0) -> np.ndarray:
    """A smooth one of 32x32 with an edge."""
    y, x = np.mgrid[0:32, 0:32] / 31
    base = np.stack([x, y, (x + y > 1).astype(float)], 2) * 200 + 20
    return (base + np.random.default_rng(seed).normal(0, 3, base.shape)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("name", COMMON + EXTRA)
def test_a_corruption_is_the_same_each_time_and_another_for_each_sample(name):
    state: Any = np.random.get_state()  # noqa: NPY002
    for severity in SEVERITIES:
        corruption = Corruption(name, severity)
        once = corruption(picture(), 7)
        assert once.shape == (32, 32, 3)
        assert once.dtype == np.uint8
        assert np.array_equal(once, corruption(picture(), 7))
        assert not np.array_equal(once, picture())
    corruption, once = Corruption(name, 5), Corruption(name, 5)(picture(), 7)
    random = name not in ("defocus_blur", "zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression")
    if random and name not in ("gaussian_blur", "saturate"):
        assert not np.array_equal(once, corruption(picture(), 8))
        assert not np.array_equal(once, Corruption(name, 5, seed=1)(picture(), 7))
    after: Any = np.random.get_state()  # noqa: NPY002
    assert np.array_equal(state[1], after[1]), "numpy's generator is not the corruption's to move"


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "contrast", "brightness"])
def test_a_higher_severity_is_further_from_the_picture(name):
    far = [np.abs(Corruption(name, s)(picture(), 3).astype(int) - picture()).mean() for s in SEVERITIES]
    assert far == sorted(far)
    assert far[0] > 0


def test_gaussian_noise_has_the_published_strength():
    """Hendrycks & Dietterich 2019: standard deviations of 0.08 to 0.38 of the range."""
    grey = np.full((64, 64, 3), 128, np.uint8)
    for severity, expected in zip(SEVERITIES[:3], (0.08, 0.12, 0.18), strict=True):
        noisy = Corruption("gaussian_noise", severity)(grey, 0).astype(float) / 255
        assert noisy.std() == pytest.approx(expected, rel=0.05)


def test_all_are_the_fifteen_at_five_severities():
    chosen = parse_corruptions("all", None, 0)
    assert len(chosen) == len(set(chosen)) == 75
    assert [each.name for each in parse_corruptions("fog,snow", 3, 0)] == ["fog", "snow"]
    assert {each.severity for each in parse_corruptions("fog,snow", 3, 0)} == {3}


@pytest.mark.parametrize("names", ["rain", "fog,rain", "", "fog,", "all,fog"])
def test_an_unknown_corruption_is_refused(names):
    with pytest.raises(UserError, match=r"--corruptions: .*: all, or some of gaussian_noise, "):
        parse_corruptions(names, None, 0)


def test_a_corruption_named_twice_is_refused():
    with pytest.raises(UserError, match="each of them once"):
        parse_corruptions("fog,fog", None, 0)
