"""Writing: complete with its manifest, or not there at all."""

import os
from pathlib import Path

import numpy as np
import pytest
from beton_pictures import Pictures, smooth_picture
from PIL import Image

from arat_dist.data.beton import BetonLoader
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.manifest import check_beton
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError


def folder_of(root: Path, num: int = 6) -> Path:
    """Two class folders of smooth JPEGs of 40x30."""
    rng = np.random.default_rng(0)
    for name in ("n01", "n02"):
        (root / name).mkdir(parents=True)
        for index in range(num):
            Image.fromarray(smooth_picture(rng, 40, 30)).save(root / name / f"{name}_{index}.JPEG")
    return root


def everything_below(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*"))


def test_manifest_tells_what_was_written(tmp_path: Path):
    rng = np.random.default_rng(0)
    shapes = [(20, 30), (600, 300), (128, 128), (3, 1200)]
    source = Pictures([smooth_picture(rng, *shape) for shape in shapes], [0, 2, 2, 0])
    progress = []
    manifest = write_beton(
        source, tmp_path / "a.beton", max_side=500, on_progress=lambda done, total: progress.append((done, total))
    )
    assert manifest == check_beton(tmp_path / "a.beton", hash=True)
    assert manifest.num_samples == 4
    assert manifest.class_names == ("ant", "bee", "cow")
    assert manifest.class_counts == (2, 0, 2)
    # 128x128 is not below 128 * 128 pixels; 3x1200 was shrunk to 1x500, and a side is never 0.
    assert manifest.raw_share == 0.5
    assert (manifest.min_size, manifest.max_size) == ((1, 30), (500, 500))
    assert progress[-1] == (4, 4)
    assert everything_below(tmp_path) == ["a.beton", "a.manifest.json"]


@pytest.mark.parametrize("num_workers", [1, 3])
def test_pictures_keep_their_order_and_their_labels(tmp_path: Path, num_workers: int):
    """More than one chunk of work, so that several workers take part."""
    rng = np.random.default_rng(0)
    source = Pictures(list(rng.integers(0, 256, (450, 8, 8, 3), dtype=np.uint8)), [i % 3 for i in range(450)])
    write_beton(source, tmp_path / "a.beton", num_workers=num_workers)
    with BetonLoader(tmp_path / "a.beton", batch_size=450, image_size=8) as loader:
        batch = next(iter(loader.iterate([np.arange(450)])))
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack(source.pictures))
        assert batch.labels.tolist() == source.labels


@pytest.mark.parametrize("num_workers", [1, 2])
def test_an_unreadable_picture_is_named_and_nothing_is_left(tmp_path: Path, num_workers: int):
    root = folder_of(tmp_path / "in")
    (root / "n02" / "n02_3.JPEG").write_bytes((root / "n02" / "n02_3.JPEG").read_bytes()[:300])
    (tmp_path / "out").mkdir()
    shared_before = set(os.listdir("/dev/shm"))
    with pytest.raises(UserError, match=r"n02_3.JPEG: not a readable picture") as caught:
        write_beton(open_source(f"folder:{root}"), tmp_path / "out" / "a.beton", num_workers=num_workers)
    assert "\n" not in str(caught.value)
    assert everything_below(tmp_path / "out") == []
    assert not [name for name in set(os.listdir("/dev/shm")) - shared_before if name.startswith("psm_")]


def broken_folder(root: Path, num: int = 6, bad: tuple[int, ...] = (0, 4)) -> Path:
    """folder_of, where some pictures of the second class are cut short."""
    folder_of(root, num)
    for index in bad:
        path = root / "n02" / f"n02_{index}.JPEG"
        path.write_bytes(path.read_bytes()[:300])
    return root


@pytest.mark.parametrize("num_workers", [1, 3])
def test_unreadable_pictures_are_left_out_and_listed(tmp_path: Path, num_workers: int):
    """The rest is exactly what a folder without them gives; more than one chunk, with bad ones at both ends of one."""
    bad = (0, 99, 100, 149)
    root = broken_folder(tmp_path / "in", num=150, bad=bad)
    out = tmp_path / "out" / "a.beton"
    manifest = write_beton(open_source(f"folder:{root}"), out, on_error="skip", num_workers=num_workers)
    assert manifest == check_beton(out, hash=True)
    assert (manifest.num_samples, manifest.class_counts) == (296, (150, 146))
    # In the order of their names: n02_0, n02_100, n02_149, n02_99.
    assert [line.split(":")[0] for line in manifest.skipped] == [
        str(root / "n02" / f"n02_{index}.JPEG") for index in (0, 100, 149, 99)
    ]
    assert all("JPEG: not a readable picture: " in line for line in manifest.skipped)
    for index in bad:
        (root / "n02" / f"n02_{index}.JPEG").unlink()
    whole = write_beton(open_source(f"folder:{root}"), tmp_path / "whole.beton")
    assert whole.skipped == ()
    with (
        BetonLoader(out, batch_size=296, image_size=16) as one,
        BetonLoader(tmp_path / "whole.beton", batch_size=296, image_size=16) as other,
    ):
        found, expected = (next(iter(loader.iterate([np.arange(296)]))) for loader in (one, other))
        np.testing.assert_array_equal(found.images.numpy(), expected.images.numpy())
        assert found.labels.tolist() == expected.labels.tolist() == [0] * 150 + [1] * 146


@pytest.mark.parametrize("num_workers", [1, 2])
def test_nothing_but_unreadable_pictures(tmp_path: Path, num_workers: int):
    root = broken_folder(tmp_path / "in", num=2, bad=(0, 1))
    for path in (root / "n01").iterdir():
        path.write_bytes(b"")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"in: none of its pictures can be read; the first: .*n01_0.JPEG: not a ") as it:
        write_beton(open_source(f"folder:{root}"), tmp_path / "out/a.beton", on_error="skip", num_workers=num_workers)
    assert "\n" not in str(it.value)
    assert everything_below(tmp_path / "out") == []


def test_a_failure_leaves_the_file_before_it_alone(tmp_path: Path, small: Pictures, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "a.beton"
    manifest = write_beton(small, out)
    broken = Pictures([*small.pictures[:5], np.zeros((4, 4), np.uint8)], small.labels[:6])
    monkeypatch.setattr(Pictures, "__getitem__", lambda self, index: (Image.new("RGB", (0, 9)), 0), raising=True)
    with pytest.raises(UserError, match="picture-0: not a readable picture"):
        write_beton(broken, out)
    assert check_beton(out, hash=True) == manifest
    assert everything_below(tmp_path) == ["a.beton", "a.manifest.json"]


def test_a_source_without_pictures(tmp_path: Path):
    with pytest.raises(UserError, match="test: no pictures in it"):
        write_beton(Pictures([], []), tmp_path / "a.beton", num_workers=2)
    assert everything_below(tmp_path) == []


def test_only_unreadable_pictures_are_skipped(tmp_path: Path):
    """A label that FFCV can't store is a defect: it must not make a picture disappear."""
    pictures = [np.zeros((8, 8, 3), np.uint8)] * 3
    with pytest.raises((RuntimeError, OverflowError)):
        write_beton(Pictures(pictures, [0, 2**70, 1]), tmp_path / "a.beton", on_error="skip")
    assert everything_below(tmp_path) == []


def test_a_worker_that_dies_does_not_hang_the_writer(tmp_path: Path):
    class Deadly(Pictures):
        def __getitem__(self, index: int):
            os._exit(9)

    with pytest.raises(RuntimeError, match="died with exit code 9"):
        write_beton(Deadly([], [0] * 4), tmp_path / "a.beton", num_workers=2)
    assert everything_below(tmp_path) == []


def test_same_input_gives_the_same_file(tmp_path: Path):
    source = open_source(f"folder:{folder_of(tmp_path / 'in')}")
    one, other = (write_beton(source, tmp_path / f"{name}.beton") for name in "ab")
    assert one.sha256 == other.sha256


def test_a_name_that_is_no_beton(tmp_path: Path, small: Pictures):
    with pytest.raises(UserError, match=r"a.bin: the name of a data set ends in .beton"):
        write_beton(small, tmp_path / "a.bin")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/a.beton: can't be written"):
        write_beton(small, tmp_path / "file" / "a.beton")
