"""Random choices of the training augmentation, and decoding by key, compiled by numba; ffcv isn't imported.

Each choice is a hash of (seed, key, draw): counter-based, so the pixels of a visit are the same for any number of
threads and any world size, and after any resume. Nothing here holds state, and floating point is float64 without
fastmath.

Compiled code is kept on disk, where numba keeps it (NUMBA_CACHE_DIR, else beside this file, else in the user's cache):
compiling takes seconds in every process, reading it back a fraction of one. numba looks at the time of a function's own
file alone, so everything that is compiled stands in this one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding
from numba import njit, types

Integer = int | np.integer[Any]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_S27, _S30, _S31, _S11 = np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(11)

# Number of the draw that decides each choice; random_resized_box takes four a try from _BOX on.
_FLIP, _ROW, _COLUMN, _BOX = 0, 1, 2, 3
_BOX_TRIES = 10
_MIN_ASPECT, _MAX_ASPECT = 3 / 4, 4 / 3


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile without the GIL; keep the code on disk where some folder for it can be written."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:
        return njit(nogil=True, error_model="numpy")(function)


# Random choices -----------------------------------------------------------------------------------------------------


@_compiled
def _mix(word: np.uint64) -> np.uint64:
    """The finalizer of SplitMix64 (Steele et al., OOPSLA 2014), uint64 to uint64."""
    word = (word ^ (word >> _S30)) * _MIX_1
    word = (word ^ (word >> _S27)) * _MIX_2
    return word ^ (word >> _S31)


@_compiled
def random_word(seed: Integer, key: Integer, draw: Integer) -> np.uint64:
    """64 random bits that depend on (seed, key, draw) alone."""
    # numba turns a sum of int64 and uint64 into float64: every operand is uint64 here.
    word = _mix(np.uint64(seed) + _GOLDEN)
    word = _mix(word + np.uint64(key) * _GOLDEN)
    return _mix(word + np.uint64(draw + 1) * _GOLDEN)


@_compiled
def random_unit(seed: Integer, key: Integer, draw: Integer) -> float:
    """A float64 in [0,1), with 53 random bits."""
    return np.int64(random_word(seed, key, draw) >> _S11) * 2.0**-53


@_compiled
def random_below(seed: Integer, key: Integer, draw: Integer, stop: Integer) -> Integer:
    """An int64 in [0, stop); the bias of the remainder is under stop / 2^64."""
    return np.int64(random_word(seed, key, draw) % np.uint64(stop))


@_compiled
def is_flipped(seed: Integer, key: Integer) -> bool:
    """Whether this visit sees the picture mirrored left to right."""
    return random_below(seed, key, _FLIP, 2) == 1


@_compiled
def shift(seed: Integer, key: Integer, padding: Integer) -> tuple[Integer, Integer]:
    """(rows, columns) in [-padding, padding] by which pad_crop's window is off the picture, in pixels."""
    rows = random_below(seed, key, _ROW, 2 * padding + 1) - padding
    return rows, random_below(seed, key, _COLUMN, 2 * padding + 1) - padding


@_compiled
def random_resized_box(
    seed: Integer, key: Integer, height: Integer, width: Integer, min_area: float, max_area: float
) -> tuple[Integer, Integer, Integer, Integer]:
    """Box (top, left, height, width) in pixels, inside the picture.

    The area is uniform in [min_area, max_area] of the picture's, the aspect log-uniform in [3/4, 4/3] (Szegedy 2015);
    after ten boxes that don't fit, the largest centred one whose aspect is in that range.
    """
    low, high = math.log(_MIN_ASPECT), math.log(_MAX_ASPECT)
    for attempt in range(_BOX_TRIES):
        draw = _BOX + 4 * attempt
        area = height * width * (min_area + (max_area - min_area) * random_unit(seed, key, draw))
        aspect = math.exp(low + (high - low) * random_unit(seed, key, draw + 1))
        w = np.int64(math.sqrt(area * aspect) + 0.5)
        h = np.int64(math.sqrt(area / aspect) + 0.5)
        if 0 < w <= width and 0 < h <= height:
            top = random_below(seed, key, draw + 2, height - h + 1)
            return top, random_below(seed, key, draw + 3, width - w + 1), h, w
    h = min(height, np.int64(width / _MIN_ASPECT + 0.5))
    w = min(width, np.int64(height * _MAX_ASPECT + 0.5))
    return (height - h) // 2, (width - w) // 2, h, w


@_compiled
def centre_box(height: Integer, width: Integer, fraction: float) -> tuple[Integer, Integer, Integer, Integer]:
    """Box (top, left, side, side) in pixels: the centred square of `fraction` of the shorter side."""
    side = max(1, np.int64(fraction * min(height, width) + 0.5))
    return (height - side) // 2, (width - side) // 2, side, side


# Pixels -------------------------------------------------------------------------------------------------------------


@_compiled
def copy_shifted(source: np.ndarray, target: np.ndarray, rows: Integer, columns: Integer) -> None:
    """Fill target uint8 [H,W,3] with source [H,W,3], the window moved by (rows, columns); black outside the source."""
    height, width = target.shape[0], target.shape[1]
    target[:] = 0
    for y in range(max(0, -rows), min(height, height - rows)):
        for x in range(max(0, -columns), min(width, width - columns)):
            for channel in range(3):
                target[y, x, channel] = source[y + rows, x + columns, channel]


@_compiled
def mirror(picture: np.ndarray) -> None:
    """Mirror uint8 [H,W,3] left to right, in place."""
    height, width = picture.shape[0], picture.shape[1]
    for y in range(height):
        for x in range(width // 2):
            for channel in range(3):
                left = picture[y, x, channel]
                picture[y, x, channel] = picture[y, width - 1 - x, channel]
                picture[y, width - 1 - x, channel] = left


# Decoding -----------------------------------------------------------------------------------------------------------

# C functions by name: unlike ctypes' pointers, names can stand in code that is kept on disk.
_INT, _SIZE, _FLAG = types.int64, types.uint32, types.uint32
_jpeg_decode = types.ExternalFunction(
    "arat_jpeg_decode", types.int32(_INT, types.uint64, *[_SIZE] * 2, _INT, *[_SIZE] * 6, *[_FLAG] * 2)
)
_resize = types.ExternalFunction("arat_resize", types.void(*[_INT] * 11))


def link(jpeg_decode: int, resize: int) -> None:
    """Give the addresses of libffcv's `imdecode` and `resize`, before anything is decoded."""
    binding.add_symbol("arat_jpeg_decode", jpeg_decode)
    binding.add_symbol("arat_resize", resize)


@_compiled
def _read(data: np.ndarray, is_jpeg: bool, picture: np.ndarray) -> bool:
    """Decode or copy stored bytes uint8 [n] into a picture uint8 [H,W,3]; False if they can't be one."""
    height, width = np.uint32(picture.shape[0]), np.uint32(picture.shape[1])
    if is_jpeg:
        zero, one, target = np.uint32(0), np.uint32(1), picture.ctypes.data
        size = np.uint64(data.size)
        return (
            _jpeg_decode(data.ctypes.data, size, height, width, target, height, width, zero, zero, one, one, zero, zero)
            == 0
        )
    if data.size != picture.size:
        return False
    picture.reshape(-1)[:] = data
    return True


@_compiled
def decode_shifted(
    keys: np.ndarray,
    pictures: np.ndarray,
    readable: np.ndarray,
    file: np.ndarray,
    table: np.ndarray,
    seed: Integer,
    flip: bool,
    padding: Integer,
) -> None:
    """Pictures that have the right size already: shifted within a black border of `padding` pixels.

    Args:
        keys: int64 [B]; key % len(table) is the row of the table.
        pictures: filled, uint8 [B,side,side,3].
        readable: filled, uint8 [B,1]: 0 where the bytes weren't a picture.
        file: the whole file, uint8 [n].
        table: int64 [N,5]: start and stop of the bytes in the file, height, width, whether they are JPEG.
        seed: fixes shifts and flips together with the keys.
        flip: mirror half of the visits.
        padding: 0 takes the pictures as they are.
    """
    stored = np.empty(pictures.shape[1:], np.uint8)
    for at in range(len(keys)):
        start, stop, _, _, is_jpeg = table[keys[at] % len(table)]
        readable[at, 0] = _read(file[start:stop], is_jpeg != 0, stored)
        rows, columns = shift(seed, keys[at], padding)
        copy_shifted(stored, pictures[at], rows, columns)
        if flip and is_flipped(seed, keys[at]):
            mirror(pictures[at])


@_compiled
def decode_boxes(
    keys: np.ndarray,
    pictures: np.ndarray,
    readable: np.ndarray,
    file: np.ndarray,
    table: np.ndarray,
    seed: Integer,
    flip: bool,
    is_random: bool,
    min_area: float,
    max_area: float,
    centre: float,
) -> None:
    """Pictures of any size: a box of each, resized.

    Arguments as of decode_shifted, and:
        is_random: take random_resized_box with min_area and max_area, else centre_box with the fraction `centre`.
    """
    side = pictures.shape[1]
    for at in range(len(keys)):
        start, stop, height, width, is_jpeg = table[keys[at] % len(table)]
        stored = np.empty((height, width, 3), np.uint8)
        readable[at, 0] = _read(file[start:stop], is_jpeg != 0, stored)
        if is_random:
            top, left, rows, columns = random_resized_box(seed, keys[at], height, width, min_area, max_area)
        else:
            top, left, rows, columns = centre_box(height, width, centre)
        target = pictures[at].ctypes.data
        _resize(0, stored.ctypes.data, height, width, top, top + rows, left, left + columns, target, side, side)
        if flip and is_flipped(seed, keys[at]):
            mirror(pictures[at])
