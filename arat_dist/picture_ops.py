"""The operations of RandAugment and ColorJitter on batches, each picture with its own amount.

Pictures are uint8 [n,3,H,W], contiguous, on any device, in grey levels of 0 to 255; amounts are float32 [n,1,1,1].
Every operation returns new pictures, and what becomes of one doesn't depend, to the bit, on the others in the batch:
sums over a picture are of whole numbers, exact in any order, and all else is rounded once a kernel. A product and a sum
in one kernel (`add` with an alpha, `addcmul`, `lerp`) would be rounded once in the middle of a vectorised loop, twice
at its end; sines and powers differ there too. Nothing waits for the device.

Definitions are torchvision's (transforms.v2.functional on uint8 tensors), to a grey level or two; where ours differ,
the operation says so.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PictureOp = Callable[[Tensor, Tensor], Tensor]
"""From pictures uint8 [n,3,H,W] and amounts float32 [n,1,1,1] to new pictures."""


# Colours ------------------------------------------------------------------------------------------------------------


def brightness(pictures: Tensor, factor: Tensor) -> Tensor:
    """All levels times a factor."""
    return _to_levels(pictures * factor)


def contrast(pictures: Tensor, factor: Tensor) -> Tensor:
    """The distance from the picture's mean grey times a factor."""
    num_pixels = pictures.shape[2] * pictures.shape[3]
    mean = _grey(pictures).sum((1, 2, 3), keepdim=True, dtype=torch.float64) / num_pixels
    return _away_from(mean.float(), pictures, factor)


def saturation(pictures: Tensor, factor: Tensor) -> Tensor:
    """The distance from each pixel's own grey times a factor; RandAugment calls it Color."""
    return _away_from(_grey(pictures), pictures, factor)


def hue(pictures: Tensor, turns: Tensor) -> Tensor:
    """The hue moved around the circle of HSV, in turns; rounded, where torchvision cuts off 1.0039 times the level.

    Back to RGB by a trapezoid a channel instead of six cases: value - chroma * clamp(min(k, 4 - k), 0, 1), k being the
    hue in sixths of a turn plus 5, 3, 1, modulo 6.
    """
    red, green, blue = (channel.float() for channel in pictures.split(1, 1))
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    divisor = chroma.clamp_min(1)  # of a grey pixel, whose hue has no effect
    sixths = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, (blue - red) / divisor + 2, (red - green) / divisor + 4),
    )
    k = sixths + turns * 6 + torch.arange(5, 0, -2, device=pictures.device).view(3, 1, 1)
    k -= (k / 6).floor_() * 6
    return (value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)).round_().to(torch.uint8)


def posterize(pictures: Tensor, width: Tensor) -> Tensor:
    """Levels down to a multiple of a width, a power of 2 from 1 to 128: torchvision's 8 - log2(width) bits."""
    return pictures & (256 - width).to(torch.uint8)


def solarize(pictures: Tensor, threshold: Tensor) -> Tensor:
    """Levels at or above a threshold inverted."""
    return torch.where(pictures >= threshold, 255 - pictures, pictures)


def autocontrast(pictures: Tensor, _: Tensor) -> Tensor:
    """Each channel stretched to 0 to 255; one that is even stays."""
    lowest, highest = (reduce(pictures, (2, 3), keepdim=True).float() for reduce in (torch.amin, torch.amax))
    is_even = lowest == highest
    lowest = lowest.masked_fill(is_even, 0)
    span = (highest - lowest).masked_fill_(is_even, 255)
    # A whole number over a whole number: its integral part is exact, as that of a product with 255/span is not.
    return _to_levels((pictures - lowest).mul_(255).div_(span))


def equalize(pictures: Tensor, _: Tensor) -> Tensor:
    """Each channel's histogram made even, in PIL's integer arithmetic; one with too few levels for it stays."""
    count, channels, height, width = pictures.shape
    entries = pictures.view(count, channels, -1).long()
    ones = torch.ones((), dtype=torch.int32, device=pictures.device)
    histogram = ones.new_zeros(count, channels, 256).scatter_add_(2, entries, ones.expand(entries.shape))
    highest = pictures.amax((2, 3)).long()[..., None]
    step = (height * width - histogram.gather(2, highest)) // 255
    below = histogram.cumsum(2) - histogram
    table = torch.where(
        step == 0,
        torch.arange(256, device=pictures.device),
        ((below + step // 2) // step.clamp_min(1)).clamp_max_(255),
    )
    return table.to(torch.uint8).gather(2, entries).view_as(pictures)


def sharpness(pictures: Tensor, factor: Tensor) -> Tensor:
    """The distance from PIL's smoothed picture (weights of 1 around 5, over 13) times a factor; the border stays."""
    levels = pictures.to(torch.int16)
    across = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
    inner = levels[..., 1:-1, 1:-1]
    total = across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :] + 4 * inner
    smooth = (total * 2 + 13) // 26  # total/13 to the nearest; it never lies half way
    result = pictures.clone()
    result[..., 1:-1, 1:-1] = _away_from(smooth, inner, factor)
    return result


# Places: the nearest source pixel, black outside ------------------------------------------------------------------


def shear_x(pictures: Tensor, slope: Tensor) -> Tensor:
    """Rows moved to the left by a slope times their distance from the upper edge."""
    row, column = _places(pictures)
    return _taken_from(pictures, row, column + slope[..., 0] * (row + 0.5))


def shear_y(pictures: Tensor, slope: Tensor) -> Tensor:
    """Columns moved up by a slope times their distance from the left edge."""
    row, column = _places(pictures)
    return _taken_from(pictures, row + slope[..., 0] * (column + 0.5), column)


def translate_x(pictures: Tensor, distance: Tensor) -> Tensor:
    """Moved to the right by whole pixels."""
    row, column = _places(pictures)
    return _taken_from(pictures, row, column - distance[..., 0])


def translate_y(pictures: Tensor, distance: Tensor) -> Tensor:
    """Moved down by whole pixels."""
    row, column = _places(pictures)
    return _taken_from(pictures, row - distance[..., 0], column)


def rotate(pictures: Tensor, sine: Tensor) -> Tensor:
    """Turned counter-clockwise around the centre by less than a quarter turn, given as the sine of the angle."""
    row, column = _places(pictures)
    y, x = row - (len(row) - 1) / 2, column - (len(column) - 1) / 2
    sine = sine[..., 0]
    cosine = (1 - sine * sine).sqrt()
    return _taken_from(
        pictures,
        (sine * x + cosine * y) + (len(row) - 1) / 2,
        (cosine * x - sine * y) + (len(column) - 1) / 2,
    )


PICTURE_OPS: dict[str, PictureOp] = {
    "shear_x": shear_x,
    "shear_y": shear_y,
    "translate_x": translate_x,
    "translate_y": translate_y,
    "rotate": rotate,
    "brightness": brightness,
    "saturation": saturation,
    "contrast": contrast,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "hue": hue,
}
"""All of them by name."""


def _to_levels(values: Tensor) -> Tensor:
    """Numbers to levels, in place: clamped, fractions cut off as PIL and torchvision do."""
    return values.clamp_(0, 255).to(torch.uint8)


def _away_from(origin: Tensor, levels: Tensor, factor: Tensor) -> Tensor:
    """Levels at `factor` times their distance from an origin; a level that is the origin stays."""
    return _to_levels((levels - origin).mul(factor).add_(origin))


def _grey(pictures: Tensor) -> Tensor:
    """Luma by PIL's integer weights, cut off: float32 [n,1,H,W]; white is 255, which torchvision's weights miss by 1.

    Every product and sum is a whole number below 2^24, which float32 has exactly.
    """
    red, green, blue = pictures.split(1, 1)
    return (red * 19595.0).add_(green, alpha=38470).add_(blue, alpha=7471).mul_(2.0**-16).floor_()


def _places(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the rows [H,1] and of the columns [W], float32."""
    height, width = pictures.shape[-2:]
    rows, columns = (torch.arange(n, dtype=torch.float32, device=pictures.device) for n in (height, width))
    return rows[:, None], columns


def _taken_from(pictures: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Pictures whose pixels come from the places nearest to row and column, which broadcast to [n,H,W]."""
    count, channels, height, width = pictures.shape
    row, column = row.round(), column.round()
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # Whole numbers before they are joined: float32 counts pixels up to 2^24 alone.
    place = row.clamp(0, height - 1).long() * width + column.clamp(0, width - 1).long()
    place = place.expand(count, -1, -1).reshape(count, 1, -1).expand(-1, channels, -1)
    taken = pictures.view(count, channels, -1).gather(2, place).view_as(pictures)
    return taken.mul_(inside.view(-1, 1, height, width))
