"""Picture files as pixels: what Pillow reads, converted to RGB."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from arat_dist.errors import UserError

Picture = NDArray[np.uint8]
"""RGB, uint8 [H,W,3]."""

_MACHINES_FAULTS = {errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENODEV}
"""Errors of reading a file that say nothing of the picture in it."""


class UnreadablePictureError(UserError):
    """A file that is no picture which can be read, whoever reads it."""


def read_picture(path: Path) -> Picture:
    """Read a file as RGB uint8 [H,W,3]: see `to_rgb`; of an animation, the first frame.

    Raises:
        UnreadablePictureError: it isn't a readable picture.
        UserError: the machine can't read it now.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.errno in _MACHINES_FAULTS:
            raise UserError(f"{shown(path)}: can't be read now: {error.strerror}; try again") from error
        raise UnreadablePictureError(f"{shown(path)}: not a readable picture: {_reason(path, error)}") from error


def to_rgb(image: Image.Image) -> Picture:
    """Convert grey, palette, CMYK and 16-bit pictures to RGB uint8 [H,W,3]; transparency is dropped.

    Raises:
        ValueError: its values have no known scale.
    """
    if image.mode == "F":
        raise ValueError("floating-point pixels; 8 or 16 bits a channel would be right")
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits: Pillow clips it at 255, which makes everything but the darkest white."""
    grey = np.asarray(image)
    if grey.max(initial=0) > 65_535:
        raise ValueError("more than 16 bits a channel; 8 or 16 would be right")
    return Image.fromarray(np.rint(np.maximum(grey, 0) / 257).astype(np.uint8))


def _reason(path: Path, error: Exception) -> str:
    """What is wrong with a file, in one line."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture format that is known" if path.stat().st_size else "an empty file"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())


def shown(path: str | Path) -> str:
    """A path as it can be printed and stored: bytes that are no UTF-8, and control characters, escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
