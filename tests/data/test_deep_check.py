"""Decoding every picture: each broken one is found, the whole ones are not."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from beton_pictures import Pictures, smooth_picture

from arat_dist.data.beton_writer import write_beton
from arat_dist.data.deep_check import check_samples
from arat_dist.data.manifest import check_beton, file_sha256, manifest_path
from arat_dist.errors import UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """300 pictures, every third stored as JPEG."""
    rng = np.random.default_rng(0)
    pictures = [smooth_picture(rng, 130, 130 + i % 5) if i % 3 == 0 else smooth_picture(rng, 9, 9) for i in range(300)]
    path = tmp_path_factory.mktemp("deep") / "a.beton"
    write_beton(Pictures(pictures, [i % 3 for i in range(300)]), path)
    return path


def with_new_hash(path: Path) -> Path:
    """As if the damage had been done before the manifest was written."""
    tree = json.loads(manifest_path(path).read_text())
    manifest_path(path).write_text(json.dumps(tree | {"sha256": file_sha256(path)}))
    return path


def damaged(whole: Path, folder: Path, jpegs: list[int]) -> Path:
    """A copy in which some of the JPEGs, counted among themselves, have lost their headers."""
    for path in (whole, manifest_path(whole)):
        shutil.copy(path, folder)
    path = folder / whole.name
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 100
    for number in jpegs:
        content[starts[number] : starts[number] + 64] = bytes(64)
    path.write_bytes(content)
    return with_new_hash(path)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_whole_file_passes(whole: Path, threads: int):
    done: list[int] = []
    check_samples(whole, check_beton(whole), threads=threads, on_progress=done.append)
    assert done == [256, 300]


@pytest.mark.parametrize("threads", [1, 2])
def test_every_broken_picture_is_named(whole: Path, tmp_path: Path, threads: int):
    path = damaged(whole, tmp_path, [0, 33, 99])
    with pytest.raises(UserError) as caught:
        check_samples(path, check_beton(path, hash=True), threads=threads)
    assert str(caught.value) == (
        f"{path}: 3 of 300 pictures are broken: 0, 99, 297; write it again with `arat data write`"
    )


def test_many_are_counted(whole: Path, tmp_path: Path):
    path = damaged(whole, tmp_path, list(range(25)))
    with pytest.raises(UserError) as caught:
        check_samples(path, check_beton(path))
    named = ", ".join(str(3 * number) for number in range(20))
    assert f"25 of 300 pictures are broken: {named} and 5 more; " in str(caught.value)


def test_a_label_that_is_no_class(whole: Path, tmp_path: Path):
    path = damaged(whole, tmp_path, [])
    tree = json.loads(manifest_path(path).read_text())
    counts = [tree["class_counts"][0] + tree["class_counts"][2], tree["class_counts"][1]]
    manifest_path(path).write_text(json.dumps(tree | {"class_names": ["ant", "bee"], "class_counts": counts}))
    with pytest.raises(UserError, match=r"100 of 300 pictures are broken: 2, 5, 8, .* and 80 more"):
        check_samples(path, check_beton(path))
