"""Pictures of a .beton by torchvision and torch's DataLoader, for machines where FFCV does not build.

The order, the boxes and the flips are those of `beton.py`, by the same kernels. The pixels of a resized picture differ
a little: torchvision decodes and resizes in its own way. So a run stays with one of the two from its first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resized_crop

from arat_dist.data import augment as kernels
from arat_dist.data.beton_table import Contents
from arat_dist.data.loader import Batch
from arat_dist.data.opened import Box, OpenedBeton, Shift
from arat_dist.data.order import Keys
from arat_dist.errors import UserError


class FallbackLoader(OpenedBeton):
    """Pictures by torchvision, decoded ahead by processes; each batch lies in memory of its own."""

    def _prepare(self) -> None:
        self._running: set[Iterator[Batch]] = set()
        self._is_closed = False

    def iterate(self, shares: Sequence[Keys], side_at: Callable[[int], int] | None = None) -> Iterator[Batch]:
        """See `OpenedBeton`."""
        batches = self._batches(_Checked(shares, self.batch_size, side_at or (lambda _: self.image_size)))
        self._running.add(batches)
        try:
            yield from batches
            if self._is_closed:
                raise RuntimeError("the loader was closed while its batches were being read")
        finally:
            self._running.discard(batches)

    def close(self) -> None:
        """Stop what still runs; the loader can't be used afterwards."""
        self._is_closed = True
        for batches in list(self._running):
            batches.close()  # pyright: ignore[reportAttributeAccessIssue]  (a generator)

    def _batches(self, checked: _Checked) -> Iterator[Batch]:
        loader = DataLoader(
            _Pictures(self.path, self.contents, self.cuts),
            batch_sampler=checked,  # pyright: ignore[reportArgumentType]
            num_workers=self.threads,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, int):
                raise UserError(self._undecodable(batch))
            yield Batch(*batch)
        if checked.error is not None:
            raise checked.error


class _Checked:
    """Shares one by one, as lists, with the side of their pictures; none larger than a loader's batch.

    They are asked for ahead of their batches. What went wrong ends them, and is kept until those before have come.
    """

    def __init__(self, shares: Sequence[Keys], batch_size: int, side_at: Callable[[int], int]) -> None:
        self._shares, self._batch_size, self._side_at = shares, batch_size, side_at
        self.error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        try:
            # Not a for loop over the shares: that takes an IndexError among them for their end.
            for step in range(len(self._shares)):
                yield self._side_at(step), self._keys(step)
        except Exception as error:  # noqa: BLE001 - raised again in the consumer.
            self.error = error

    def _keys(self, step: int) -> list[int]:
        keys = np.asarray(self._shares[step]).tolist()
        if len(keys) > self._batch_size:
            raise ValueError(f"a share of {len(keys)} pictures: the loader's batch_size is {self._batch_size}")
        return keys


def _as_is(batch: Any) -> Any:
    """What `__getitems__` returns is a batch already."""
    return batch


class _Pictures(Dataset[Any]):
    """Batches by their keys; each process opens the file for itself."""

    def __init__(self, path: Path, contents: Contents, cuts: Mapping[int, Shift | Box]) -> None:
        self._path, self._contents, self._cuts = path, contents, cuts

    @cached_property
    def _file(self) -> NDArray[np.uint8]:
        return np.memmap(self._path, np.uint8, "r")

    def __getitems__(self, share: tuple[int, list[int]]) -> tuple[Tensor, Tensor, Tensor] | int:
        """Images uint8 [B,3,side,side] channels-last, labels, keys int64 [B]; or the index of what can't be decoded."""
        (side, keys), (table, labels) = share, self._contents
        images = torch.empty(len(keys), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        indices, cut = [key % len(table) for key in keys], self._cuts[side]
        for image, key, index in zip(images, keys, indices, strict=True):
            try:
                picture = self._read(*table[index].tolist())
            except (RuntimeError, ValueError):
                return index
            image.copy_(_shifted(picture, key, cut) if isinstance(cut, Shift) else _boxed(picture, key, side, cut))
            if cut.flip and kernels.is_flipped(cut.seed, key):
                image.copy_(image.flip(2))
        return images, torch.from_numpy(labels[indices]), torch.tensor(keys, dtype=torch.int64)

    def _read(self, start: int, stop: int, height: int, width: int, is_jpeg: int) -> NDArray[np.uint8]:
        """A stored picture, uint8 [H,W,3] (RuntimeError, ValueError: its bytes can't be one)."""
        data = np.array(self._file[start:stop])
        if not is_jpeg:
            return data.reshape(height, width, 3)
        picture: Any = decode_jpeg(torch.from_numpy(data), ImageReadMode.RGB)
        if picture.shape != (3, height, width):
            raise ValueError("another size than the table's")
        return picture.permute(1, 2, 0).numpy()


def _shifted(picture: NDArray[np.uint8], key: int, cut: Shift) -> Tensor:
    """uint8 [H,W,3] -> uint8 [3,H,W]."""
    moved = np.empty_like(picture)
    kernels.copy_shifted(picture, moved, *kernels.shift(cut.seed, key, cut.border))
    return torch.from_numpy(moved).permute(2, 0, 1)


def _boxed(picture: NDArray[np.uint8], key: int, side: int, cut: Box) -> Tensor:
    """uint8 [H,W,3] -> uint8 [3,side,side]."""
    height, width = picture.shape[:2]
    if cut.is_random:
        box = kernels.random_resized_box(cut.seed, key, height, width, cut.min_area, cut.max_area)
    else:
        box = kernels.centre_box(height, width, cut.centre)
    return resized_crop(torch.from_numpy(picture).permute(2, 0, 1), *map(int, box), size=[side, side], antialias=True)
