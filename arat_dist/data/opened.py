"""A .beton opened, with the way in which its pictures are cut: what both loaders begin from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from arat_dist.data.beton_table import read_contents
from arat_dist.data.loader import Batch
from arat_dist.data.order import Keys
from arat_dist.errors import UserError


class Shift(NamedTuple):
    """Pictures that have the right size already, shifted within a black border; as `decode_shifted` takes it."""

    seed: int
    flip: bool
    border: int
    """In pixels; 0 takes the pictures as they are."""


class Box(NamedTuple):
    """A box of pictures of any size, resized; as `decode_boxes` takes it."""

    seed: int
    flip: bool
    is_random: bool
    """Or the centre."""
    min_area: float
    max_area: float
    centre: float
    """Side of the centre, as a fraction of the shorter side."""


class OpenedBeton(ABC):
    """Pictures of a .beton by key. Bit-identical for any number of threads, any batch size and any world size."""

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
        """Open a .beton.

        Args:
            path: the file; `check_beton` is the caller's to call.
            batch_size: pictures of the largest batch that will be asked for.
            image_size: side of the pictures that come out, in pixels.
            augment: pad_crop shifts a picture of image_size within a black border; random_resized_crop resizes a
                random box; none resizes the centre, or takes pictures that all have image_size as they are.
            padding: border of pad_crop, in pixels.
            crop_scale: range of the area of random_resized_crop, as a fraction of the picture's.
            flip: mirror half of the visits left to right.
            val_crop: side of the centre of `none`, as a fraction of the shorter side.
            sides: further sides that `iterate` may be asked for, in pixels; not with pad_crop.
            seed: fixes crops and flips together with the keys.
            threads: threads, or processes, that decode.

        Raises:
            UserError: the file is missing or broken, or pad_crop meets pictures of another size.
        """
        self.path, self.batch_size, self.image_size, self.threads = Path(path), batch_size, image_size, threads
        self.contents = read_contents(self.path)
        fits = bool(np.all(self.contents.table[:, 2:4] == image_size))
        if augment == "pad_crop" and not fits:
            raise UserError(
                f"{self.path}: pad_crop needs pictures of {image_size}x{image_size} (data.image_size); "
                "data.augment: random_resized_crop would be right"
            )
        assert augment != "pad_crop" or set(sides) <= {image_size}
        low, high = map(float, crop_scale)
        # Pictures that are taken whole at image_size are so at other sizes.
        box = Box(seed, flip, augment == "random_resized_crop", low, high, 1.0 if fits else float(val_crop))
        self.cuts: dict[int, Shift | Box] = dict.fromkeys({image_size, *sides}, box)
        if fits and augment != "random_resized_crop":
            self.cuts[image_size] = Shift(seed, flip, padding if augment == "pad_crop" else 0)
        self._prepare()

    @property
    def num_samples(self) -> int:
        """Pictures in the set."""
        return len(self.contents.labels)

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of each picture as the file has it, int64 [N]."""
        return self.contents.labels

    @abstractmethod
    def iterate(self, shares: Sequence[Keys], side_at: Callable[[int], int] | None = None) -> Iterator[Batch]:
        """Batches in the order of `shares`: the i-th holds exactly the keys int64 [B] of shares[i].

        Shares are asked for one by one, a few batches ahead. Leaving the loop early ends what runs ahead.

        Args:
            shares: keys of each batch.
            side_at: side of the pictures of each batch, in pixels; default: image_size.

        Raises:
            UserError: a picture can't be decoded.
            Exception: whatever asking for a share raised.
        """

    @abstractmethod
    def close(self) -> None:
        """Stop what still runs; the loader can't be used afterwards."""

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    @abstractmethod
    def _prepare(self) -> None:
        """What a kind of loader needs before it can iterate."""

    def _undecodable(self, index: int) -> str:
        """What to say of a picture whose bytes are none."""
        return f"{self.path}: picture {index} can't be decoded; write it again with `arat data write`"
