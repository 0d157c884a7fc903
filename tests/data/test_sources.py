"""Sources: what people's folders look like, and what is said when they don't."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arat_dist.data.beton_writer import write_beton
from arat_dist.data.folders import PackedNames
from arat_dist.data.manifest import load_manifest
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError

WNIDS = ["n01440764", "n01443537", "n01484850"]


def save(path: Path, grey: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 7), (grey, grey, grey)).save(path, format="PNG")
    return path


@pytest.fixture
def train(tmp_path: Path) -> Path:
    """ILSVRC's train folder: WNID/WNID_n.JPEG, one class with a folder deeper, and what doesn't belong there."""
    for label, wnid in enumerate(WNIDS):
        for index in range(2):
            save(tmp_path / "train" / wnid / f"{wnid}_{index}.JPEG", 10 * label + index)
    save(tmp_path / "train" / WNIDS[2] / "images" / "deep.JPEG", 99)
    (tmp_path / "train" / WNIDS[0] / "boxes.txt").write_text("no picture")
    save(tmp_path / "train" / WNIDS[0] / "._hidden.JPEG")
    return tmp_path / "train"


@pytest.fixture
def val(tmp_path: Path) -> Path:
    """ILSVRC's val folder as it is distributed: flat."""
    for index in range(4):
        save(tmp_path / "val" / f"ILSVRC2012_val_0000000{index + 1}.JPEG", index)
    return tmp_path / "val"


def labels_of(source) -> list[int]:
    """Labels in the order of the pictures' names."""
    by_name = {Path(source.name_of(index)).stem: source[index][1] for index in range(len(source))}
    return [by_name[name] for name in sorted(by_name)]


def test_class_folders(train: Path):
    source = open_source(f"folder:{train}")
    assert source.class_names == WNIDS
    assert [source[index][1] for index in range(len(source))] == [0, 0, 1, 1, 2, 2, 2]
    assert Path(source.name_of(3)).name == "n01443537_1.JPEG"
    assert source[3][0].shape == (7, 9, 3)
    assert (source[3][0] == 11).all()
    assert "deep.JPEG" in {Path(source.name_of(index)).name for index in (4, 5, 6)}
    assert len(pickle.loads(pickle.dumps(source))) == 7


def test_names_of_any_bytes(tmp_path: Path):
    """Names that are no UTF-8 come from old archives; file systems that refuse them can't hold the test either."""
    names = ["plain.png", "\u00fc-\u6f22\u5b57.png", os.fsdecode(b"caf\xe9.png"), "two\nlines.png", "b.png.jpg"]
    try:
        for grey, name in enumerate(names):
            save(tmp_path / "\u00e4nt" / name, grey)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    source = open_source(f"folder:{tmp_path}")
    assert source.class_names == ["\u00e4nt"]
    expected = [names.index(name) for name in sorted(names, key=os.fsencode)]
    assert [int(source[index][0].max()) for index in range(5)] == expected
    shown = {source.name_of(index).rpartition("/")[2] for index in range(5)}
    assert shown == {"plain.png", "\u00fc-\u6f22\u5b57.png", "caf\\xe9.png", "two\\nlines.png", "b.png.jpg"}
    (tmp_path / "\u00e4nt" / names[2]).write_bytes(b"")
    manifest = write_beton(source, tmp_path / "a.beton", on_error="skip")
    assert manifest == load_manifest(tmp_path / "a.beton")
    assert manifest.skipped == (f"{tmp_path}/\u00e4nt/caf\\xe9.png: not a readable picture: an empty file",)


def test_a_class_whose_name_can_not_be_printed(tmp_path: Path):
    try:
        save(tmp_path / os.fsdecode(b"\xe9cole") / "a.png")
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    with pytest.raises(UserError, match=r"cole: the name of a class is printable UTF-8; rename this folder"):
        open_source(f"folder:{tmp_path}")


def test_lists_with_names_of_any_bytes_and_a_byte_order_mark(tmp_path: Path):
    try:
        save(tmp_path / "val" / os.fsdecode(b"caf\xe9.png"), 1)
    except OSError:
        pytest.skip("the file system takes UTF-8 only")
    save(tmp_path / "val" / "b.png", 2)
    (tmp_path / "val.txt").write_bytes(b"\xef\xbb\xbfb.png n02\ncaf\xe9.png n01\n")
    source = open_source(f"folder:{tmp_path / 'val'}")
    assert [(int(source[index][0].max()), source[index][1]) for index in range(2)] == [(2, 1), (1, 0)]


def test_a_folder_costs_little_more_than_its_names(tmp_path: Path):
    """Forked processes copy what counts its uses: names and labels are arrays."""
    names = [b"n%08d/n%08d_%d.JPEG" % (index // 100, index // 100, index) for index in range(3000)]
    packed = PackedNames.of([names[:1000], [], names[1000:]])
    assert [packed[index] for index in range(len(packed))] == names
    assert len(pickle.dumps(packed)) < sum(map(len, names)) + 8 * len(names) + 1000


@pytest.mark.parametrize("beside", [True, False])
def test_flat_val_with_a_list_of_wnids(val: Path, beside: bool):
    lines = [f"ILSVRC2012_val_0000000{i + 1}{'.JPEG' * (i % 2)} {WNIDS[(2 * i) % 3]}" for i in range(4)]
    (val.parent if beside else val).joinpath("val_labels.txt").write_text("\n".join(lines))
    source = open_source(f"folder:{val}")
    assert source.class_names == WNIDS
    assert labels_of(source) == [0, 2, 1, 0]


def test_flat_val_with_kaggles_list(val: Path):
    rows = [f"ILSVRC2012_val_0000000{i + 1},{WNIDS[i % 3]} 1 2 3 4 {WNIDS[i % 3]} 5 6 7 8 " for i in (3, 1, 0, 2)]
    (val.parent / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    source = open_source(f"folder:{val}")
    assert source.class_names == WNIDS
    assert labels_of(source) == [0, 1, 2, 0]


def test_flat_val_with_indices_takes_the_classes_of_the_training_set(val: Path, train: Path, tmp_path: Path):
    beton = tmp_path / "train.beton"
    write_beton(open_source(f"folder:{train}"), beton)
    listing = tmp_path / "mine.lst"
    listing.write_text("\n".join(f"ILSVRC2012_val_0000000{i + 1}.JPEG {label}" for i, label in enumerate([2, 0, 0, 2])))
    source = open_source(f"folder:{val}", labels=listing, classes_from=beton)
    assert source.class_names == WNIDS, "class 1 is in no line, and yet a class"
    assert labels_of(source) == [2, 0, 0, 2]
    with pytest.raises(UserError, match=r"mine.lst: its labels are numbers; the .beton of the training set"):
        open_source(f"folder:{val}", labels=listing)
    listing.write_text(listing.read_text().replace("JPEG 2", "JPEG 3"))
    with pytest.raises(UserError, match=r"mine.lst: label '3': a class name or an index from 0 to 2"):
        open_source(f"folder:{val}", labels=listing, classes_from=beton)


def test_one_folder_of_pictures_beside_its_list_is_no_class(tmp_path: Path):
    """Tiny ImageNet's val."""
    for index in range(2):
        save(tmp_path / "val" / "images" / f"val_{index}.JPEG")
    (tmp_path / "val" / "val_annotations.txt").write_text(
        "val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t52\t55\t57\t59\n"
    )
    source = open_source(f"folder:{tmp_path / 'val'}")
    assert source.class_names == ["n01", "n02"]
    assert labels_of(source) == [1, 0]


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["ILSVRC2012_val_00000001 n01"] * 2, "'ILSVRC2012_val_00000001' once too often"),
        (["ILSVRC2012_val_00000009 n01"], "names 'ILSVRC2012_val_00000009'"),
        (["ILSVRC2012_val_00000001 n01"], "ILSVRC2012_val_00000002.JPEG: .*val.txt has no label for it"),
        (["490", "361", "171", "822"], "val.txt: line '490': 'NAME LABEL' would be right"),
        ([], "val.txt: an empty list"),
    ],
)
def test_lists_that_do_not_fit(val: Path, lines: list[str], match: str):
    (val.parent / "val.txt").write_text("\n".join(lines))
    with pytest.raises(UserError, match=match):
        open_source(f"folder:{val}")


def test_folders_that_are_none(train: Path, val: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"folder:.*/nowhere: .*/nowhere: no such folder"):
        open_source(f"folder:{tmp_path / 'nowhere'}")
    with pytest.raises(UserError, match=r"val has no class folders, and no list of labels"):
        open_source(f"folder:{val}")
    with pytest.raises(UserError, match=r"nolist: no such list of labels"):
        open_source(f"folder:{val}", labels=tmp_path / "nolist")
    (train / "n09").mkdir()
    with pytest.raises(UserError, match=r"train/n09: no pictures in this class folder"):
        open_source(f"folder:{train}")


@pytest.mark.parametrize(
    "source", ["", "nonsense", "folder:", "digits:", "digits:test", "torchvision:Nothing:/tmp", "torchvision:CIFAR10"]
)
def test_what_is_no_source(source: str):
    with pytest.raises(UserError, match=r"not a SOURCE; .* would be right"):
        open_source(source)
    with pytest.raises(UserError, match="goes with folder:PATH only"):
        open_source("digits:train", labels="x")


def test_digits():
    train, val = open_source("digits:train"), open_source("digits:val")
    assert (len(train), len(val)) == (1437, 360)
    assert train.class_names == [str(digit) for digit in range(10)]
    counts = np.bincount([val[index][1] for index in range(360)])
    assert counts.min() >= 34, "stratified"
    assert counts.max() <= 38
    picture, _ = train[0]
    assert (picture.shape, picture.dtype) == ((32, 32, 3), np.uint8)
    assert picture.max() > 200
    seen = {train[index][0].tobytes() for index in range(1437)}
    assert not [index for index in range(360) if val[index][0].tobytes() in seen]


def cifar(root: Path) -> Path:
    """A CIFAR-10 folder of two pictures a file, past torchvision's check of its hashes."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for number, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data = np.full((2, 3072), 40 * number, np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels": [number, 9]}))
    names = {"label_names": [f"class{i}" for i in range(10)]}
    (folder / "batches.meta").write_bytes(pickle.dumps(names))
    return root


def test_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="torchvision finds no CIFAR10 there"):
        open_source(f"torchvision:CIFAR10:{tmp_path}")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_source(f"torchvision:CIFAR10:{tmp_path}/nowhere")
    with pytest.raises(UserError, match="SVHN has no train flag"):
        open_source(f"torchvision:SVHN:{tmp_path}")
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    root = cifar(tmp_path / "data")
    train, val = open_source(f"torchvision:CIFAR10:{root}"), open_source(f"torchvision:CIFAR10:{root}:val")
    assert (len(train), len(val)) == (10, 2)
    assert len(open_source(f"torchvision:CIFAR10:{root}:train")) == 10
    assert train.class_names[3] == "class3"
    assert train[2][1] == 1
    assert (train[2][0] == 40).all()
    assert (val[0][0] == 200).all()
    assert val.name_of(1).endswith(":val, picture 1")
