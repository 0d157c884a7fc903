"""Where pictures come from: the SOURCE strings of `arat data write`."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arat_dist.data.manifest import load_manifest
from arat_dist.errors import UserError

Picture = NDArray[np.uint8]
"""RGB, uint8 [H,W,3]."""

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp", ".gif"}

# How people's lists of the labels of ILSVRC's flat val folder are called.
LIST_NAMES = (
    "LOC_val_solution.csv",
    "val_labels.txt",
    "val_annotations.txt",
    "labels.txt",
    "labels.csv",
    "val.txt",
)

_SCHEMES = "folder:PATH, torchvision:CIFAR10:PATH[:train|val], digits:train or digits:val"


class Source(Protocol):
    """Labelled pictures by index; must be picklable or survive a fork."""

    description: str
    """The SOURCE string."""
    class_names: Sequence[str]
    """Name of each class; a label is an index into them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> tuple[Picture, int]: ...
    def name_of(self, index: int) -> str:
        """What an error calls this picture."""
        ...


def open_source(source: str, *, labels: str | Path | None = None, classes_from: str | Path | None = None) -> Source:
    """Open a SOURCE string.

    Args:
        source: folder:PATH, torchvision:CLASS:PATH[:train|val], digits:train or digits:val.
        labels: for a flat folder, its list of labels; default: looked for beside the pictures under its usual names.
        classes_from: for a flat folder, the .beton of the training set whose classes it has.

    Raises:
        UserError: one line that says what is wrong with it.
    """
    scheme, _, rest = source.partition(":")
    if scheme != "folder" and (labels is not None or classes_from is not None):
        raise UserError(f"{source}: a list of labels goes with folder:PATH only")
    if scheme == "folder" and rest:
        return _open_folder(source, Path(rest), labels, classes_from)
    if scheme == "torchvision" and rest:
        return _open_torchvision(source, rest)
    if scheme == "digits" and rest in ("train", "val"):
        return _open_digits(source, rest)
    raise UserError(f"{source}: not a SOURCE; {_SCHEMES} would be right")


# Folders ------------------------------------------------------------------------------------------------------------


@dataclass
class FolderSource:
    """Picture files with their labels."""

    description: str
    class_names: Sequence[str]
    files: list[tuple[Path, int]]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        path, label = self.files[index]
        return read_picture(path), label

    def name_of(self, index: int) -> str:
        """Path of the file."""
        return str(self.files[index][0])


def read_picture(path: Path) -> Picture:
    """Read a file as RGB uint8 [H,W,3]; grey, palette, CMYK and 16-bit pictures are converted.

    Raises:
        UserError: it isn't a readable picture.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable picture: {reason}") from error


def to_rgb(image: Image.Image) -> Picture:
    """Convert to RGB uint8 [H,W,3]; transparency is dropped."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey at 255 instead of scaling it: everything but the darkest would be white.
        grey = np.asarray(image).astype(np.float64) / 257
        image = Image.fromarray(np.clip(np.rint(grey), 0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return np.array(image.convert("RGB"))


def _open_folder(source: str, root: Path, labels: str | Path | None, classes_from: str | Path | None) -> FolderSource:
    """Class folders, or a flat folder with a list of labels."""
    if not root.is_dir():
        raise UserError(f"{source}: {root}: no such folder")
    class_folders = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    # Tiny ImageNet's val has its pictures in one folder beside their list: that folder is no class.
    is_flat = labels is not None or not class_folders or (len(class_folders) == 1 and _list_in(root) is not None)
    if not is_flat:
        return _open_class_folders(source, root, class_folders)
    list_path = _find_list(source, root, labels)
    known = load_manifest(classes_from).class_names if classes_from is not None else None
    return _open_flat(source, root, list_path, known)


def _open_class_folders(source: str, root: Path, class_names: list[str]) -> FolderSource:
    """One folder a class, in the order of their names; pictures may lie deeper in it."""
    files = []
    for label, name in enumerate(class_names):
        found = _pictures_below(root / name)
        if not found:
            raise UserError(f"{root / name}: no pictures in this class folder; fill it or remove it")
        files += [(path, label) for path in found]
    return FolderSource(source, class_names, files)


def _pictures_below(folder: Path) -> list[Path]:
    """Picture files at any depth, sorted."""
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith("."))
    return sorted(path for path in found if path.is_file())


def _list_in(folder: Path) -> Path | None:
    """A list of labels under one of its usual names."""
    return next((folder / name for name in LIST_NAMES if (folder / name).is_file()), None)


def _find_list(source: str, root: Path, labels: str | Path | None) -> Path:
    """The list of labels of a flat folder."""
    if labels is not None:
        if not Path(labels).is_file():
            raise UserError(f"{labels}: no such list of labels")
        return Path(labels)
    found = _list_in(root) or _list_in(root.parent)
    if found is not None:
        return found
    raise UserError(
        f"{source}: {root} has no class folders, and no list of labels lies in or beside it; "
        "folders named after the classes, or a list of lines 'NAME LABEL', would be right"
    )


def _open_flat(source: str, root: Path, list_path: Path, known: Sequence[str] | None) -> FolderSource:
    """Pictures of one folder, labelled by a list; the list's order is kept."""
    named = _read_list(list_path)
    found = _pictures_below(root)
    paths = {path.stem: path for path in found}
    if not paths:
        raise UserError(f"{source}: {root}: no pictures in it")
    if len(paths) < len(found):
        twice = next(path for path in found if paths[path.stem] != path)
        raise UserError(f"{twice}: {paths[twice.stem]} has the same name; the list can't tell them apart")
    to_label = _label_reader(list_path, [label for _, label in named], known)
    files = []
    for name, label in named:
        if Path(name).stem not in paths:
            raise UserError(f"{list_path}: names {name!r} once too often, or it is not among the pictures of {root}")
        files.append((paths.pop(Path(name).stem), to_label[label]))
    if paths:
        raise UserError(f"{next(iter(paths.values()))}: {list_path} has no label for it")
    return FolderSource(source, to_label.class_names, files)


class _Labels(dict[str, int]):
    """Label of each text in a list, and the names of the classes."""

    class_names: Sequence[str]


def _read_list(path: Path) -> list[tuple[str, str]]:
    """(name, label) of each line: 'NAME LABEL ...', or 'NAME,LABEL ...' in a .csv.

    A label alone is refused: ILSVRC's own ground truth is such a list, and numbers the classes in another order.
    """
    rows = []
    with path.open(newline="") as file:
        for line in csv.reader(file) if path.suffix == ".csv" else map(str.split, file):
            if not line or [cell.strip().lower() for cell in line[:2]] in _HEADERS:
                continue
            if len(line) < 2 or not line[1].split():
                raise UserError(f"{path}: line {' '.join(line)!r}: 'NAME LABEL' would be right")
            # Kaggle's second column is the class and a box, again and again.
            rows.append((line[0].strip(), line[1].split()[0]))
    if not rows:
        raise UserError(f"{path}: an empty list; lines 'NAME LABEL' would be right")
    return rows


_HEADERS = (["imageid", "predictionstring"], ["name", "label"], ["filename", "label"], ["image", "label"])


def _label_reader(path: Path, labels: list[str], known: Sequence[str] | None) -> _Labels:
    """Map the texts of a list to labels: names of classes, or indices into the sorted ones counted from 0."""
    texts = sorted(set(labels))
    numbers = all(text.isdecimal() for text in texts)
    if known is None and numbers:
        raise UserError(f"{path}: its labels are numbers; the .beton of the training set is needed to name the classes")
    class_names = list(known) if known is not None else texts
    result = _Labels()
    result.class_names = class_names
    index_of = {name: index for index, name in enumerate(class_names)}
    for text in texts:
        if text in index_of:
            result[text] = index_of[text]
        elif numbers and int(text) < len(class_names):
            result[text] = int(text)
        else:
            raise UserError(f"{path}: label {text!r}: a class name or an index from 0 to {len(class_names) - 1}")
    return result


# torchvision and scikit-learn ---------------------------------------------------------------------------------------


@dataclass
class TorchvisionSource:
    """A torchvision data set of (PIL image, label)."""

    description: str
    class_names: Sequence[str]
    dataset: Any

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        image, label = self.dataset[int(index)]
        return to_rgb(image), int(label)

    def name_of(self, index: int) -> str:
        """The SOURCE and the index."""
        return f"{self.description}, picture {index}"


def _open_torchvision(source: str, rest: str) -> TorchvisionSource:
    """torchvision:CLASS:PATH[:train|val], already downloaded."""
    from torchvision import datasets

    name, _, path = rest.partition(":")
    split = "train"
    for choice in ("train", "val"):
        if path.endswith(f":{choice}"):
            path, split = path.removesuffix(f":{choice}"), choice
    kind = getattr(datasets, name, None)
    if kind is None or not isinstance(kind, type) or not path:
        raise UserError(f"{source}: not a SOURCE; torchvision:CIFAR10:PATH[:train|val] would be right")
    if not Path(path).is_dir():
        raise UserError(f"{source}: {path}: no such folder")
    try:
        dataset: Any = kind(path, train=split == "train", download=False)
    except TypeError as error:
        raise UserError(
            f"{source}: torchvision's {name} has no train flag; CIFAR10 or CIFAR100 would be right"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"{source}: {path}: torchvision finds no {name} there: {' '.join(str(error).split())}"
        ) from error
    class_names = getattr(dataset, "classes", None)
    if class_names is None:
        class_names = [str(label) for label in sorted({int(label) for _, label in dataset})]
    return TorchvisionSource(source, [str(each) for each in class_names], dataset)


@dataclass
class ArraySource:
    """Pictures in memory, uint8 [N,H,W,3]."""

    description: str
    class_names: Sequence[str]
    pictures: Picture
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return self.pictures[index], int(self.labels[index])

    def name_of(self, index: int) -> str:
        """The SOURCE and the index."""
        return f"{self.description}, picture {index}"


def _open_digits(source: str, split: str) -> ArraySource:
    """scikit-learn's 1,797 digits, 8x8 of 0..16, as 32x32 RGB; 1,437 for training and 360 for validation."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits: Any = load_digits()
    parts = train_test_split(np.arange(1797), test_size=360, random_state=0, stratify=digits.target)
    rows = np.sort(parts[0] if split == "train" else parts[1])
    pictures = np.stack([_enlarge(digits.images[row]) for row in rows])
    return ArraySource(source, [str(digit) for digit in range(10)], pictures, digits.target[rows].astype(np.int64))


def _enlarge(digit: NDArray[np.float64]) -> Picture:
    """8x8 of 0..16 to RGB uint8 [32,32,3], smoothly."""
    grey = Image.fromarray((digit * (255 / 16)).astype(np.float32)).resize((32, 32), Image.Resampling.BICUBIC)
    values = np.clip(np.rint(np.asarray(grey)), 0, 255).astype(np.uint8)
    return np.repeat(values[:, :, None], 3, axis=2)
