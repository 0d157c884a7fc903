"""What the trainer and the evaluation know of loading pictures; importing this doesn't import ffcv."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

from torch import Tensor

from arat_dist.data.manifest import check_augment, load_manifest
from arat_dist.data.staging import local_beton

if TYPE_CHECKING:
    from arat_dist.config import DataConfig
    from arat_dist.data.beton import BetonLoader
    from arat_dist.data.fallback import FallbackLoader
    from arat_dist.data.order import Keys


class Batch(NamedTuple):
    """Pictures of one step on one rank, in host memory.

    `images` and `labels` lie in a buffer that is used again: they hold until the next batch is asked for, and copies to
    a GPU that were queued on the current stream by then still get the right pixels. Clone what is kept longer.
    """

    images: Tensor
    """uint8 [B,3,H,W], channels-last in memory."""
    labels: Tensor
    """int64 [B]."""
    keys: Tensor
    """int64 [B]: epoch * num_samples + index of each picture."""


class Loader(Protocol):
    """Pictures by key: one data set with one way of cropping."""

    @property
    def num_samples(self) -> int:
        """Pictures in the set."""
        ...

    def iterate(self, shares: Sequence[Keys], side_at: Callable[[int], int] | None = None) -> Iterator[Batch]:
        """Batches in the order of `shares`: the i-th holds exactly the keys int64 [B] of shares[i].

        Its pictures have the side side_at(i), in pixels; by default, the loader's own.
        """
        ...

    def close(self) -> None:
        """Stop what still runs; the loader can't be used afterwards."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def train_loader(data: DataConfig, seed: int, max_share: int) -> Loader:
    """Training pictures, cropped and flipped as the recipe says.

    Args:
        data: the recipe's section.
        seed: fixes crops and flips, together with the keys.
        max_share: pictures of the largest batch that this rank gets (`SampleOrder.largest_share`).

    Raises:
        UserError: the manifest is missing, the pictures don't fit data.augment, data.loader is out of reach, or they
            can't be copied to data.stage_to.
    """
    check_augment(data, load_manifest(data.train))
    return loader_class(data)(
        local_beton(data.train, data.stage_to),
        batch_size=max_share,
        image_size=data.image_size,
        augment=data.augment,
        padding=data.padding,
        crop_scale=data.crop_scale,
        flip=data.flip,
        val_crop=_centre(data),
        sides=data.training_sizes,
        seed=seed,
        threads=data.loader_threads,
    )


def val_loader(data: DataConfig, batch_size: int) -> Loader:
    """Validation pictures: the centre crop, nothing random. Keys are indices (`eval_shares`).

    Raises:
        UserError: the file is missing or broken, data.loader is out of reach, or it can't be copied to data.stage_to.
    """
    return loader_class(data)(
        local_beton(data.val, data.stage_to),
        batch_size=batch_size,
        image_size=data.image_size,
        val_crop=_centre(data),
        threads=data.loader_threads,
    )


def _centre(data: DataConfig) -> float:
    """Side of the centre crop as a fraction of the shorter side: all of it, unless a net or a recipe says otherwise."""
    return 1.0 if data.val_crop is None else data.val_crop


def loader_class(data: DataConfig) -> type[BetonLoader] | type[FallbackLoader]:
    """What the recipe asks for; the other is never taken in its place, since its pixels differ.

    Raises:
        UserError: ffcv is asked for and can't be imported.
    """
    # ffcv, numba and opencv take about a second to import: only who loads pictures pays.
    if data.loader == "torchvision":
        from arat_dist.data.fallback import FallbackLoader

        return FallbackLoader
    from arat_dist.data.beton import BetonLoader

    return BetonLoader
