"""Picture files of every kind against pixels that are known beforehand, and what is said of broken ones."""

import errno
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from beton_pictures import smooth_picture
from numpy.typing import NDArray
from PIL import Image

from arat_dist.data.pictures import UnreadablePictureError, read_picture, shown
from arat_dist.errors import UserError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (6, 5, 3), dtype=np.uint8)
OTHER = 255 - RGB


# PNG by its specification: what Pillow doesn't write can be tried, and what it does is not its own judge ------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def deflated(values: NDArray[np.unsignedinteger]) -> bytes:
    """Values [H,W,C] as PNG's compressed rows, each behind the byte of its filter."""
    rows = values.astype(values.dtype.newbyteorder(">"))
    return zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))


def png(values: NDArray[np.unsignedinteger], colour: int, before: bytes = b"", behind: bytes = b"") -> bytes:
    """A PNG of values [H,W,C] of 8 or 16 bits, with chunks before and behind its pixels."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 8 * values.dtype.itemsize, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header), before, chunk(b"IDAT", deflated(values)), behind, chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
CHANNELS = {GREY: 1, COLOUR: 3, GREY_ALPHA: 2, COLOUR_ALPHA: 4}


def read_bytes(folder: Path, content: bytes, name: str = "a.png") -> NDArray[np.uint8]:
    (folder / name).write_bytes(content)
    picture = read_picture(folder / name)
    assert picture.dtype == np.uint8
    return picture


@pytest.mark.parametrize("colour", CHANNELS)
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_png_of_8_and_16_bits(tmp_path: Path, colour: int, dtype: type[np.unsignedinteger]):
    most = np.iinfo(dtype).max
    values = RNG.integers(0, most + 1, (6, 5, CHANNELS[colour]), dtype=dtype)
    values[0, 0], values[0, 1] = 0, most
    picture = read_bytes(tmp_path, png(values, colour))
    opaque = values[:, :, :1] if colour in (GREY, GREY_ALPHA) else values[:, :, :3]
    exact = np.broadcast_to(opaque.astype(np.float64) * 255 / most, (6, 5, 3))
    # Of 16 bits in several channels Pillow keeps the upper eight: up to one step below the exact value.
    allowed = 0.5 if dtype is np.uint8 or colour == GREY else 1.0
    assert np.abs(picture - exact).max() <= allowed
    assert (picture[0, 0].max(), picture[0, 1].min()) == (0, 255)


@pytest.mark.parametrize("transparency", [b"", chunk(b"tRNS", bytes([0, 128, 255]))])
def test_palette(tmp_path: Path, transparency: bytes):
    """Every index is a colour of its own, and transparent ones keep theirs."""
    palette = RNG.integers(0, 256, (7, 3), dtype=np.uint8)
    indices = RNG.integers(0, 7, (6, 5, 1), dtype=np.uint8)
    picture = read_bytes(tmp_path, png(indices, PALETTE, chunk(b"PLTE", palette.tobytes()) + transparency))
    np.testing.assert_array_equal(picture, palette[indices[:, :, 0]])


def test_an_animated_png_gives_its_first_frame(tmp_path: Path):
    def frame_control(number: int) -> bytes:
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 5, 6, 0, 0, 1, 10, 0, 0))

    second = chunk(b"fdAT", struct.pack(">I", 2) + deflated(OTHER))
    control = chunk(b"acTL", struct.pack(">II", 2, 0)) + frame_control(0)
    content = png(RGB, COLOUR, control, frame_control(1) + second)
    np.testing.assert_array_equal(read_bytes(tmp_path, content), RGB)
    with Image.open(tmp_path / "a.png") as image:
        assert getattr(image, "n_frames", 1) == 2, "it is an animation"


@pytest.mark.parametrize(("kind", "options"), [("gif", {}), ("webp", {"lossless": True, "exact": True})])
def test_an_animation_gives_its_first_frame(tmp_path: Path, kind: str, options: dict):
    """Few colours, so that a GIF keeps them exactly."""
    frames = [(pixels // 128 * 255).astype(np.uint8) for pixels in (RGB, OTHER)]
    path = tmp_path / f"a.{kind}"
    first, second = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=[second], duration=100, **options)
    with Image.open(path) as image:
        assert getattr(image, "n_frames", 1) == 2, "it is an animation"
    np.testing.assert_array_equal(read_picture(path), frames[0])


# Other formats ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 255, 1000, 65_535])
def test_grey_maps_of_any_depth(tmp_path: Path, most: int):
    """PGM says what white is."""
    values = RNG.integers(0, most + 1, (6, 5))
    values[0, :2] = 0, most
    content = b"P5 5 6 %d\n" % most + values.astype(">u2" if most > 255 else "u1").tobytes()
    exact = np.repeat(values[:, :, None] * 255 / most, 3, axis=2)
    assert np.abs(read_bytes(tmp_path, content, "a.pgm") - exact).max() <= 0.51


@pytest.mark.parametrize("order", ["<", ">"])
def test_16_bit_tiff_in_both_byte_orders(tmp_path: Path, order: str):
    """Written by hand: Pillow writes its machine's order only."""
    values = RNG.integers(0, 65_536, (6, 5), dtype=np.uint16)
    tags = [(256, 5), (257, 6), (258, 16), (259, 1), (262, 1), (273, 8), (278, 6), (279, 60)]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        directory += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 68)
    content = head + values.astype(f"{order}u2").tobytes() + directory + bytes(4)
    exact = np.repeat(values[:, :, None] / 257, 3, axis=2)
    assert np.abs(read_bytes(tmp_path, content, "a.tif") - exact).max() <= 0.5


def test_cmyk(tmp_path: Path):
    """Each ink takes away its share of the light, black of all; stored without loss."""
    inks = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    Image.fromarray(inks, "CMYK").save(tmp_path / "a.tif")
    light = 255 - inks.astype(np.float64)
    exact = light[:, :, :3] * light[:, :, 3:] / 255
    assert np.abs(read_picture(tmp_path / "a.tif") - exact).max() <= 1


def test_cmyk_jpeg(tmp_path: Path):
    """As in ImageNet: Adobe's, which stores the inks inverted."""
    Image.new("RGB", (8, 8), (250, 120, 10)).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert b"Adobe" in (tmp_path / "a.jpg").read_bytes()
    assert np.abs(read_picture(tmp_path / "a.jpg").astype(int) - (250, 120, 10)).max() < 8


def test_grey_jpeg(tmp_path: Path):
    grey = smooth_picture(RNG, 40, 30)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "a.jpg", quality=95)
    picture = read_picture(tmp_path / "a.jpg")
    assert picture.shape == (40, 30, 3)
    assert np.abs(picture.astype(int) - grey[:, :, None]).max() <= 3


def test_one_bit(tmp_path: Path):
    bits = RNG.integers(0, 2, (6, 5)).astype(bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_picture(tmp_path / "a.png"), np.repeat(bits[:, :, None] * 255, 3, axis=2))


# What can't be read -------------------------------------------------------------------------------------------------


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_picture(path)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{shown(path)}: not a readable picture: ")
    return text


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp", "ppm"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.95])
def test_truncated_files(tmp_path: Path, suffix: str, share: float):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    refusal(path)


def test_files_that_are_no_pictures(tmp_path: Path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"")
    assert refusal(path).endswith(": an empty file")
    path.write_bytes(b"<html>not found</html>")
    assert refusal(path).endswith(": no picture format that is known")
    assert refusal(tmp_path / "missing.jpg").endswith(": No such file or directory")
    assert refusal(tmp_path).endswith(": Is a directory")


def test_a_decompression_bomb(tmp_path: Path):
    """A file of 70 bytes that says it is a picture of 10 GB."""
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, COLOUR, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    (tmp_path / "a.png").write_bytes(content)
    assert "3600000000 pixels" in refusal(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("dtype", "match"), [(np.float32, "floating-point pixels; 8 or 16 bits"), (np.int32, "more than 16 bits a channel")]
)
def test_values_without_a_scale(tmp_path: Path, dtype: type, match: str):
    """Pillow would clip them: black or white pictures."""
    Image.fromarray(np.full((6, 5), 70_000, dtype)).save(tmp_path / "a.tif")
    assert match in refusal(tmp_path / "a.tif")


def test_names_are_printable(tmp_path: Path):
    assert shown("a\nb/\udcffä") == "a\\nb/\\xffä"
    assert shown(tmp_path / "plain") == str(tmp_path / "plain")
    refusal(tmp_path / "two\nlines.png")


def test_what_the_machine_can_not_read_is_no_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Else `--on-error skip` would leave good pictures out."""
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"not a picture")
    with pytest.raises(UnreadablePictureError):
        read_picture(tmp_path / "b.png")

    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(UserError, match=r"a.png: can't be read now: Too many open files; try again$") as caught:
        read_picture(tmp_path / "a.png")
    assert not isinstance(caught.value, UnreadablePictureError)
