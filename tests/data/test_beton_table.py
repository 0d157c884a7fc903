"""The table of a .beton against FFCV's own reader, and against files that are none."""

from pathlib import Path

import numpy as np
import pytest

from arat_dist.data.beton_table import read_contents
from arat_dist.data.ffcv_import import IMAGE_MODES, Reader
from arat_dist.data.manifest import check_figures, load_manifest
from arat_dist.errors import UserError


@pytest.mark.parametrize("kind", ["small_beton", "large_beton"])
def test_it_is_what_ffcv_reads(kind: str, request: pytest.FixtureRequest):
    path: Path = request.getfixturevalue(kind)
    (table, labels), reader = read_contents(path), Reader(str(path))
    pictures = reader.metadata["f0"]
    sizes = {int(row["ptr"]): int(row["size"]) for row in reader.alloc_table}
    assert labels.tolist() == reader.metadata["f1"].tolist()
    assert table[:, 0].tolist() == pictures["data_ptr"].tolist()
    assert (table[:, 1] - table[:, 0]).tolist() == [sizes[int(start)] for start in pictures["data_ptr"]]
    assert table[:, 2:4].tolist() == [[int(each["height"]), int(each["width"])] for each in pictures]
    assert table[:, 4].astype(bool).tolist() == (pictures["mode"] == IMAGE_MODES["jpg"]).tolist()
    assert len(table) == reader.num_samples


def test_another_version_and_other_fields_are_refused(small_beton: Path, tmp_path: Path):
    for at, value in ((0, 3), (2, 1)):
        content = np.fromfile(small_beton, np.uint8)
        content[at] = value
        content.tofile(tmp_path / "other.beton")
        with pytest.raises(UserError, match=r"other.beton: not a complete .beton"):
            read_contents(tmp_path / "other.beton")


@pytest.mark.parametrize("kind", ["small_beton", "large_beton"])
def test_figures_of_a_manifest_are_compared_with_the_file(kind: str, request: pytest.FixtureRequest):
    path: Path = request.getfixturevalue(kind)
    manifest = load_manifest(path)
    check_figures(path, manifest)
    wrong = {"class_counts": manifest.class_counts[::-1], "min_size": (5, 5), "max_size": (9, 9), "raw_share": 0.4}
    for key, value in wrong.items():
        with pytest.raises(UserError, match=rf"manifest.json: {key}: not that of the .beton"):
            check_figures(path, manifest.model_copy(update={key: value}))
