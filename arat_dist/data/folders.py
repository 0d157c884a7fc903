"""Folders of pictures: one a class, or a flat one with a list of labels."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arat_dist.data.manifest import load_manifest
from arat_dist.data.pictures import Picture, read_picture, shown
from arat_dist.errors import UserError

SUFFIXES = {b".jpg", b".jpeg", b".png", b".bmp", b".ppm", b".pgm", b".tif", b".tiff", b".webp", b".gif"}

# How people's lists of the labels of ILSVRC's flat val folder are called.
LIST_NAMES = (
    "LOC_val_solution.csv",
    "val_labels.txt",
    "val_annotations.txt",
    "labels.txt",
    "labels.csv",
    "val.txt",
)


@dataclass(frozen=True)
class PackedNames:
    """Many names in two arrays: a list of a million paths takes 500 MB, once more in each process that counts uses."""

    text: bytes
    """All names, one behind the other."""
    stops: NDArray[np.int64]
    """Where each ends, [N]."""

    @classmethod
    def of(cls, groups: Iterable[Sequence[bytes]]) -> PackedNames:
        """Pack names that come in groups, of which one at a time is in memory."""
        text, lengths = bytearray(), [np.zeros(0, np.int64)]
        for names in groups:
            text += b"".join(names)
            lengths.append(np.fromiter(map(len, names), np.int64, len(names)))
        return cls(bytes(text), np.cumsum(np.concatenate(lengths)))

    def __len__(self) -> int:
        return len(self.stops)

    def __getitem__(self, index: int) -> bytes:
        return self.text[self.stops[index - 1] if index else 0 : self.stops[index]]


@dataclass
class FolderSource:
    """Picture files with their labels."""

    description: str
    class_names: Sequence[str]
    root: Path
    names: PackedNames
    """Of the files, below the root, in the file system's own bytes."""
    labels: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        return read_picture(self.path_of(index)), int(self.labels[index])

    def path_of(self, index: int) -> Path:
        """Where a picture lies."""
        return self.root / os.fsdecode(self.names[index])

    def name_of(self, index: int) -> str:
        """Path of the file, printable."""
        return shown(self.path_of(index))


def open_folder(source: str, root: Path, labels: str | Path | None, classes_from: str | Path | None) -> FolderSource:
    """Class folders, or a flat folder with a list of labels."""
    if not root.is_dir():
        raise UserError(f"{source}: {root}: no such folder")
    with os.scandir(root) as entries:
        class_folders = sorted(each.name for each in entries if each.is_dir() and not each.name.startswith("."))
    # Tiny ImageNet's val has its pictures in one folder beside their list: that folder is no class.
    is_flat = labels is not None or not class_folders or (len(class_folders) == 1 and _list_in(root) is not None)
    if not is_flat:
        return _open_class_folders(source, root, class_folders)
    list_path = _find_list(source, root, labels)
    known = load_manifest(classes_from).class_names if classes_from is not None else None
    return _open_flat(source, root, list_path, known)


def _open_class_folders(source: str, root: Path, class_names: list[str]) -> FolderSource:
    """One folder a class, in the order of their names; pictures may lie deeper in it."""
    counts = []

    def names_of(name: str) -> list[bytes]:
        if shown(name) != name:
            raise UserError(f"{shown(root / name)}: the name of a class is printable UTF-8; rename this folder")
        found = _pictures_below(root / name)
        if not found:
            raise UserError(f"{root / name}: no pictures in this class folder; fill it or remove it")
        counts.append(len(found))
        return [os.path.join(name.encode(), each) for each in found]

    names = PackedNames.of(map(names_of, class_names))
    labels = np.repeat(np.arange(len(class_names), dtype=np.int32), counts)
    return FolderSource(shown(source), class_names, root, names, labels)


def _pictures_below(folder: Path) -> list[bytes]:
    """Names below a folder of the picture files at any depth, sorted part by part (UserError: it can't be read)."""
    top, found, todo = os.fsencode(folder), [], [b""]
    try:
        while todo:
            inside = todo.pop()
            with os.scandir(os.path.join(top, inside)) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        todo.append(os.path.join(inside, entry.name))
                    elif _is_picture(entry.name) and entry.is_file():
                        found.append(os.path.join(inside, entry.name))
    except OSError as error:
        raise UserError(f"{shown(os.fsdecode(error.filename))}: can't be read: {error.strerror}") from error
    return sorted(found, key=lambda name: name.split(b"/"))


def _is_picture(name: bytes) -> bool:
    """Whether a file is called like a picture; those that begin with a dot are the system's."""
    return os.path.splitext(name)[1].lower() in SUFFIXES and not name.startswith(b".")


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
    by_stem = {_stem(name): name for name in found}
    if not found:
        raise UserError(f"{source}: {root}: no pictures in it")
    if len(by_stem) < len(found):
        twice = next(name for name in found if by_stem[_stem(name)] != name)
        one, other = (shown(root / os.fsdecode(name)) for name in (twice, by_stem[_stem(twice)]))
        raise UserError(f"{one}: {other} has the same name; the list can't tell them apart")
    to_label = _label_reader(list_path, [label for _, label in named], known)
    names = []
    for name, _ in named:
        file = by_stem.pop(_stem(os.fsencode(name)), None)
        if file is None:
            raise UserError(f"{list_path}: names {name!r} once too often, or it is not among the pictures of {root}")
        names.append(file)
    if by_stem:
        unnamed = shown(root / os.fsdecode(next(iter(by_stem.values()))))
        raise UserError(f"{unnamed}: {list_path} has no label for it")
    labels = np.array([to_label[label] for _, label in named], np.int32)
    return FolderSource(shown(source), to_label.class_names, root, PackedNames.of([names]), labels)


def _stem(name: bytes) -> bytes:
    """A file's name without folder and suffix."""
    return os.path.splitext(os.path.basename(name))[0]


class _Labels(dict[str, int]):
    """Label of each text in a list, and the names of the classes."""

    class_names: Sequence[str]


def _read_list(path: Path) -> list[tuple[str, str]]:
    """(name, label) of each line: 'NAME LABEL ...', or 'NAME,LABEL ...' in a .csv.

    A label alone is refused: ILSVRC's own ground truth is such a list, and numbers the classes in another order.
    """
    rows = []
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
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
        if shown(text) != text:
            raise UserError(f"{path}: label {text!r}: printable UTF-8 would be right")
        if text in index_of:
            result[text] = index_of[text]
        elif numbers and int(text) < len(class_names):
            result[text] = int(text)
        else:
            raise UserError(f"{path}: label {text!r}: a class name or an index from 0 to {len(class_names) - 1}")
    return result
