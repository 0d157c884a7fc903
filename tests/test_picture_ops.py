"""Every operation against torchvision's, picture by picture, and no picture changed by its neighbours."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from arat_dist.picture_ops import PICTURE_OPS

SIDES = (30, 41)


def pictures(count: int = 6) -> Tensor:
    """Soft blotches with noise, in a range of levels that differs by picture; the last one has an even channel."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    soft = F.interpolate(coarse, size=SIDES, mode="bicubic") + 0.05 * torch.randn(count, 3, *SIDES, generator=generator)
    scale = torch.linspace(120, 300, count).view(-1, 1, 1, 1)
    levels = (soft * scale + 10).clamp(0, 255).to(torch.uint8)
    levels[-1, 1] = 77
    return levels


def affine(picture: Tensor, *, x: float = 0, y: float = 0, shear: tuple[float, float] = (0, 0)) -> Tensor:
    """torchvision's, as its RandAugment calls it."""
    degrees = [math.degrees(math.atan(slope)) for slope in shear]
    center = [0.0, 0.0] if any(shear) else None
    return reference.affine(picture, angle=0.0, translate=[x, y], scale=1.0, shear=degrees, center=center)


PLACES: dict[str, tuple[Callable[[Tensor, float], Tensor], list[float]]] = {
    "shear_x": (lambda p, v: affine(p, shear=(v, 0)), [-0.3, 0.07, 0.21]),
    "shear_y": (lambda p, v: affine(p, shear=(0, v)), [-0.3, 0.07, 0.21]),
    "translate_x": (lambda p, v: affine(p, x=v), [-13, 0, 5]),
    "translate_y": (lambda p, v: affine(p, y=v), [-13, 0, 5]),
    "rotate": (lambda p, v: reference.rotate(p, math.degrees(math.asin(v))), [-0.5, 0.0, 0.31]),
}
FACTORS = [0.0, 0.1, 0.73, 1.0, 1.27, 1.9]
COLOURS: dict[str, tuple[Callable[[Tensor, float], Tensor], list[float], int]] = {
    "brightness": (reference.adjust_brightness, FACTORS, 0),
    "contrast": (reference.adjust_contrast, FACTORS, 1),
    "saturation": (reference.adjust_saturation, FACTORS, 1),
    "sharpness": (reference.adjust_sharpness, FACTORS, 0),
    "hue": (reference.adjust_hue, [-0.5, -0.21, 0.0, 0.1, 0.5], 1),
    "posterize": (lambda p, v: reference.posterize(p, 8 - int(math.log2(v))), [1, 2, 4, 8, 16], 0),
    "solarize": (reference.solarize, [0, 25.5, 128, 255], 0),
    "autocontrast": (lambda p, v: reference.autocontrast(p), [0], 1),
    "equalize": (lambda p, v: reference.equalize(p), [0], 0),
}
"""Of each operation torchvision's, amounts, and the grey levels that may lie between them.

Theirs and ours cut fractions off, so numbers that differ in their last bits may fall on either side of a level; grey is
weighed by 0.2989, 0.587 and 0.114 there, with a sum of 0.9999, and by PIL's whole numbers here; hue is rounded here and
mostly cut off there.
"""


def amounts(values: list[float], count: int) -> Tensor:
    return torch.tensor([values[i % len(values)] for i in range(count)], dtype=torch.float32).view(-1, 1, 1, 1)


def test_the_table_is_complete():
    assert PICTURE_OPS.keys() == PLACES.keys() | COLOURS.keys()


@pytest.mark.parametrize("name", COLOURS)
def test_colours_are_torchvisions(name):
    theirs, values, tolerance = COLOURS[name]
    before = pictures()
    for value in values:
        ours = PICTURE_OPS[name](before, amounts([value], len(before)))
        expected = torch.stack([theirs(picture, value) for picture in before])
        assert ours.dtype == torch.uint8
        difference = (ours.int() - expected.int()).abs()
        assert difference.max() <= tolerance, f"{name} of {value}"
        # Rounding, not another definition.
        assert difference.float().mean() < 0.1, f"{name} of {value}"
    assert torch.equal(before, pictures())


@pytest.mark.parametrize("name", PLACES)
def test_places_are_torchvisions(name):
    """But where a source place lies half way between two pixels, as far as the last bits can tell."""
    theirs, values = PLACES[name]
    before = pictures()
    for value in values:
        ours = PICTURE_OPS[name](before, amounts([value], len(before)))
        expected = torch.stack([theirs(picture, value) for picture in before])
        assert (ours != expected).float().mean() < 0.003, f"{name} of {value}"
    assert torch.equal(before, pictures())


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_a_factor_of_one_changes_nothing(name):
    before = pictures()
    assert torch.equal(PICTURE_OPS[name](before, amounts([1], len(before))), before)


def test_greys_keep_their_level_at_any_saturation():
    """Cut off, products of parts that sum to 1 would lose one."""
    before = pictures()
    grey = before[:, :1].expand(-1, 3, -1, -1).contiguous()
    for value in FACTORS:
        assert torch.equal(PICTURE_OPS["saturation"](grey, amounts([value], len(grey))), grey)


@pytest.mark.parametrize("turns", [0.0, 1 / 3, -1 / 3, 0.5])
def test_hue_goes_around_the_circle(turns):
    """By thirds of a turn red becomes green becomes blue, and greys stay."""
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9], [0, 0, 0], [255, 255, 255]])
    shifted = {0.0: [0, 1, 2], 1 / 3: [1, 2, 0], -1 / 3: [2, 0, 1]}.get(turns)
    after = PICTURE_OPS["hue"](colours.to(torch.uint8).view(-1, 3, 1, 1), amounts([turns], 6)).view(-1, 3)
    expected = 255 - colours[:3] if shifted is None else colours[shifted]
    assert after.tolist() == expected.tolist() + colours[3:].tolist()


@pytest.mark.parametrize("name", PICTURE_OPS)
def test_a_picture_is_alike_in_any_batch(name):
    """To the bit, at batch sizes whose ends no vector register fits."""
    values = (COLOURS.get(name) or PLACES[name])[1]
    before, given = pictures(13), amounts(values, 13)
    whole = PICTURE_OPS[name](before, given)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(0))
    assert torch.equal(PICTURE_OPS[name](before[order], given[order]), whole[order])
    for i in range(13):
        assert torch.equal(PICTURE_OPS[name](before[i : i + 1], given[i : i + 1])[0], whole[i])


@pytest.mark.parametrize("name", PICTURE_OPS)
def test_the_smallest_picture_goes_through(name):
    values = (COLOURS.get(name) or PLACES[name])[1]
    tiny = torch.tensor([200, 30, 90], dtype=torch.uint8).view(1, 3, 1, 1)
    assert PICTURE_OPS[name](tiny, amounts(values, 1)).shape == tiny.shape


def test_rotation_turns_counter_clockwise():
    picture = torch.zeros(1, 3, 21, 21, dtype=torch.uint8)
    picture[:, :, 10, 18] = 255
    turned = PICTURE_OPS["rotate"](picture, amounts([0.5], 1))
    assert turned[0, 0, :10].any()
    assert not turned[0, 0, 10:].any()
    same_way = reference.rotate(picture, 30, interpolation=InterpolationMode.NEAREST)
    assert torch.equal(turned, same_way)
