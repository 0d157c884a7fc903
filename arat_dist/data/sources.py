"""Where pictures come from: the SOURCE strings of `arat data write`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arat_dist.data.folders import open_folder
from arat_dist.data.pictures import Picture, to_rgb
from arat_dist.errors import UserError

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
        return open_folder(source, Path(rest), labels, classes_from)
    if scheme == "torchvision" and rest:
        return _open_torchvision(source, rest)
    if scheme == "digits" and rest in ("train", "val"):
        return _open_digits(source, rest)
    raise UserError(f"{source}: not a SOURCE; {_SCHEMES} would be right")


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
