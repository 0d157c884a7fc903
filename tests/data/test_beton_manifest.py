"""Manifests: a file that isn't what was written is refused, in one line that names it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from beton_pictures import Pictures

from arat_dist.config import DataConfig
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.loader import train_loader
from arat_dist.data.manifest import check_beton, check_data, load_manifest, manifest_path
from arat_dist.errors import UserError


@pytest.fixture
def beton(small_beton: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    for path in (small_beton, manifest_path(small_beton)):
        shutil.copy(path, tmp_path / path.name)
    return tmp_path / small_beton.name


def assert_refused(path: Path, match: str, hash: bool | None = None) -> None:  # noqa: A002
    with pytest.raises(UserError, match=match) as caught:
        check_beton(path, hash=hash)
    assert "\n" not in str(caught.value)
    assert path.stem in str(caught.value)


def test_an_intact_file_passes(beton: Path):
    assert check_beton(beton) == check_beton(beton, hash=True) == load_manifest(beton)


def test_a_manifest_of_before_there_was_skipping(beton: Path):
    tree = json.loads(manifest_path(beton).read_text())
    assert tree.pop("skipped") == []
    manifest_path(beton).write_text(json.dumps(tree))
    assert check_beton(beton, hash=True).skipped == ()


def test_missing_files(beton: Path):
    assert_refused(beton.with_name("other.beton"), "other.beton: no such file; `arat data write")
    manifest_path(beton).unlink()
    assert_refused(beton, "small.manifest.json: missing")


def test_a_truncated_file(beton: Path):
    beton.write_bytes(beton.read_bytes()[:-1])
    assert_refused(beton, r"small.beton: [0-9,]+ bytes, its manifest says [0-9,]+", hash=False)


def test_a_flipped_byte(beton: Path):
    content = bytearray(beton.read_bytes())
    content[-30_000] ^= 1
    beton.write_bytes(content)
    assert_refused(beton, "small.beton: damaged: SHA-256")
    check_beton(beton, hash=False)


def test_another_file_of_the_same_size(beton: Path, small: Pictures):
    """Its header tells, where hashing is too much."""
    write_beton(Pictures(small.pictures[:36], small.labels[:36]), beton.with_name("other.beton"))
    size = beton.stat().st_size
    beton.write_bytes(beton.with_name("other.beton").read_bytes().ljust(size, b"\0"))
    assert_refused(beton, "small.beton: 36 pictures, its manifest says 37", hash=False)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 2}, "format_version: 2: 1 is what can be read here"),
        ({"num_samples": "many"}, "not a manifest: num_samples"),
        ({"colour": "red"}, "not a manifest: colour"),
        ({"class_counts": [1, 2, 3]}, "class_counts: they don't add up"),
    ],
)
def test_a_manifest_that_is_none(beton: Path, change: dict, match: str):
    tree = json.loads(manifest_path(beton).read_text())
    manifest_path(beton).write_text(json.dumps(tree | change))
    assert_refused(beton, match)


def test_a_manifest_that_is_no_json(beton: Path):
    manifest_path(beton).write_text("{")
    assert_refused(beton, "small.manifest.json: not a manifest: ")


def test_check_data(small_beton: Path, large_beton: Path, tmp_path: Path):
    def check(**changes: object):
        base = {"train": str(small_beton), "val": str(large_beton), "num_classes": 3, "image_size": 32}
        return check_data(DataConfig.model_validate(base | changes))

    train, val = check(augment="pad_crop")
    assert (train.num_samples, val.num_samples) == (37, 13)
    with pytest.raises(UserError, match=r"data.num_classes: 10: data.train .* has 3 classes"):
        check(num_classes=10)
    with pytest.raises(UserError, match=r"data.augment: pad_crop: needs pictures of 32x32.* are 131x60 to 400x400"):
        check(train=str(large_beton), augment="pad_crop")
    check(train=str(large_beton), augment="random_resized_crop")
    other = Pictures([np.zeros((8, 8, 3), np.uint8)] * 3, [0, 1, 2], class_names=("ant", "bug", "cow"))
    write_beton(other, tmp_path / "other.beton")
    with pytest.raises(UserError, match=r"data.val: .*other.beton: class 1 is 'bug', in data.train .* it is 'bee'"):
        check(val=str(tmp_path / "other.beton"))


def test_train_loader_refuses_what_does_not_fit(large_beton: Path):
    data = DataConfig(train=str(large_beton), val="x", num_classes=3, image_size=32, augment="pad_crop")
    with pytest.raises(UserError, match="random_resized_crop would be right"):
        train_loader(data, seed=0, max_share=4)
