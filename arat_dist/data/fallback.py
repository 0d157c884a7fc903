"""Pictures of a .beton by torchvision and torch's DataLoader, for machines where FFCV does not build.

The order, the boxes and the flips are those of `beton.py`, by the same kernels. The pixels of a resized picture differ
a little: torchvision decodes and resizes in its own way. So a run stays with one of the two from its first step on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2.functional import resized_crop

from arat_dist.data import augment as kernels
from arat_dist.data.beton_table import Contents, read_contents
from arat_dist.data.loader import Batch
from arat_dist.data.order import Keys
from arat_dist.errors import UserError

Crop = Callable[[NDArray[np.uint8], int, int], Tensor]
"""From a picture uint8 [H,W,3], its key and a side to what comes out, uint8 [3,side,side]."""


class FallbackLoader:
    """`BetonLoader` without FFCV; the same arguments, the same batches but for the pixels of resized pictures."""

    def __init__(
        self,
        path: str | Path,
        *,
        batch_size: int,
        image_size: int,
        augment: Literal["none", "pad_crop", "random_resized_crop"] = "none",
        padding: int = 4,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        flip: bool = False,
        val_crop: float = 1.0,
        sides: Collection[int] = (),
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        """Open a .beton; `threads` is the number of processes that decode. See `BetonLoader`.

        Raises:
            UserError: the file is missing or broken, or pad_crop meets pictures of another size.
        """
        self.path, self.batch_size = Path(path), batch_size
        contents = read_contents(self.path)
        table = contents.table
        fits = bool(np.all(table[:, 2:4] == image_size))
        if augment == "pad_crop" and not fits:
            raise UserError(
                f"{self.path}: pad_crop needs pictures of {image_size}x{image_size} (data.image_size); "
                "data.augment: random_resized_crop would be right"
            )
        assert augment != "pad_crop" or set(sides) <= {image_size}
        area = crop_scale if augment == "random_resized_crop" else None
        # Pictures that are taken whole at image_size are so at other sizes.
        crops: dict[int, Crop] = dict.fromkeys({image_size, *sides}, _Box(seed, flip, area, 1.0 if fits else val_crop))
        if fits and augment != "random_resized_crop":
            crops[image_size] = _Shift(seed, flip, padding if augment == "pad_crop" else 0)
        self._num_samples, self._image_size, self._threads = len(table), image_size, threads
        self._pictures = _Pictures(self.path, contents, crops)
        self._running: set[Iterator[Batch]] = set()
        self._is_closed = False

    @property
    def num_samples(self) -> int:
        """Pictures in the set."""
        return self._num_samples

    def iterate(self, shares: Sequence[Keys], side_at: Callable[[int], int] | None = None) -> Iterator[Batch]:
        """Batches in the order of `shares`, decoded ahead, each in its own memory; leaving the loop ends all processes.

        Pictures have the side side_at(i), in pixels, by default image_size.

        Raises:
            UserError: a picture can't be decoded.
            Exception: whatever asking for a share raised.
        """
        batches = self._batches(_Checked(shares, self.batch_size, side_at or (lambda _: self._image_size)))
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

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def _batches(self, checked: _Checked) -> Iterator[Batch]:
        loader = DataLoader(
            self._pictures,
            batch_sampler=checked,  # pyright: ignore[reportArgumentType]
            num_workers=self._threads,
            collate_fn=_as_is,
            pin_memory=torch.cuda.is_available(),
        )
        for batch in loader:
            if isinstance(batch, str):
                raise UserError(batch)
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

    def __init__(self, path: Path, contents: Contents, crops: Mapping[int, Crop]) -> None:
        self._path, self._contents, self._crops = path, contents, crops

    @cached_property
    def _file(self) -> NDArray[np.uint8]:
        return np.memmap(self._path, np.uint8, "r")

    def __getitems__(self, share: tuple[int, list[int]]) -> tuple[Tensor, Tensor, Tensor] | str:
        """Images uint8 [B,3,side,side] channels-last, labels, keys int64 [B]; or the line that says what is wrong."""
        (side, keys), (table, labels) = share, self._contents
        images = torch.empty(len(keys), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        indices = [key % len(table) for key in keys]
        for image, key, index in zip(images, keys, indices, strict=True):
            try:
                image.copy_(self._crops[side](self._read(*table[index].tolist()), key, side))
            except (RuntimeError, ValueError):
                return f"{self._path}: picture {index} can't be decoded; write it again with `arat data write`"
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


class _Shift:
    """Pictures of the right size, shifted within a black border."""

    def __init__(self, seed: int, flip: bool, padding: int) -> None:
        self._seed, self._flip, self._padding = seed, flip, padding

    def __call__(self, picture: NDArray[np.uint8], key: int, side: int) -> Tensor:
        """See `Crop`."""
        cut = np.empty((side, side, 3), np.uint8)
        kernels.copy_shifted(picture, cut, *kernels.shift(self._seed, key, self._padding))
        return _finished(torch.from_numpy(cut).permute(2, 0, 1), self._flip and kernels.is_flipped(self._seed, key))


class _Box:
    """A box of a picture of any size, resized; `area` None takes the centre."""

    def __init__(self, seed: int, flip: bool, area: tuple[float, float] | None, centre: float) -> None:
        self._seed, self._flip, self._area, self._centre = seed, flip, area, centre

    def __call__(self, picture: NDArray[np.uint8], key: int, side: int) -> Tensor:
        """See `Crop`."""
        size = picture.shape[:2]
        if self._area is None:
            box = kernels.centre_box(*size, self._centre)
        else:
            box = kernels.random_resized_box(self._seed, key, *size, *map(float, self._area))
        image = torch.from_numpy(picture).permute(2, 0, 1)
        cut = resized_crop(image, *map(int, box), size=[side, side], antialias=True)
        return _finished(cut, self._flip and kernels.is_flipped(self._seed, key))


def _finished(image: Tensor, is_flipped: bool) -> Tensor:
    return image.flip(2) if is_flipped else image
