"""Loading pictures of a .beton by key.

FFCV's are the file format, the pipeline of operations, the memory map, decoding and resizing. Ours are the order of
samples, random choices that depend on (seed, key) alone, and the thread that runs ahead, because FFCV's own can neither
be seeded, nor report an error, nor be stopped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray

from arat_dist.data import augment as kernels
from arat_dist.data.ffcv_import import (
    IMAGE_MODES,
    AllocationQuery,
    Compiler,
    Graph,
    IntDecoder,
    PipelineSpec,
    Reader,
    SimpleRGBImageDecoder,
    State,
    ctypes_imdecode,
    ctypes_resize,
)
from arat_dist.data.loader import Batch
from arat_dist.data.order import Keys
from arat_dist.data.ring import NUM_SLOTS, Producer
from arat_dist.errors import UserError

kernels.link(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (ctypes_imdecode, ctypes_resize)))


class _LabelDecoder(IntDecoder):
    """Labels by key."""

    def generate_code(self) -> Callable[..., Any]:
        """The pipeline's step: fills labels int64 [B,1]."""
        table = np.ascontiguousarray(self.metadata)

        def decode(keys: Keys, labels: Any, *_: object) -> Any:
            labels[:, 0] = table[keys % len(table)]
            return labels

        return decode


class _PictureDecoder(SimpleRGBImageDecoder):
    """Pictures by key, cropped by one of the kernels.

    Its memory is the pictures uint8 [B,side,side,3] and whether each was readable, uint8 [B,1].
    """

    def __init__(self, kernel: Callable[..., None], side: int, table: NDArray[np.int64], *settings: object) -> None:
        super().__init__()
        self._kernel, self._side, self._table, self._settings = kernel, side, table, settings

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        """Shape of what comes out, and the memory for it."""
        shape, dtype = (self._side, self._side, 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, (AllocationQuery(shape, dtype), AllocationQuery((1,), dtype))

    def generate_code(self) -> Callable[..., Any]:
        """The pipeline's step."""

        def decode(keys: Keys, memory: Any, _: object, storage_state: Any) -> Any:
            pictures, readable = memory
            self._kernel(keys, pictures, readable, storage_state[0], self._table, *self._settings)
            return pictures

        return decode


class BetonLoader:
    """Pictures of a .beton by key, decoded ahead by a thread of its own.

    Bit-identical for any number of threads, any batch size and any world size.
    """

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
            seed: fixes crops and flips together with the keys.
            threads: threads that decode.

        Raises:
            UserError: the file is missing or broken, or pad_crop meets pictures of another size.
        """
        self.path, self.batch_size = Path(path), batch_size
        reader, table = _read_contents(self.path)
        fits = bool(np.all(table[:, 2:4] == image_size))
        if augment == "pad_crop" and not fits:
            raise UserError(
                f"{self.path}: pad_crop needs pictures of {image_size}x{image_size} (data.image_size); "
                "data.augment: random_resized_crop would be right"
            )
        if fits and augment != "random_resized_crop":
            border = padding if augment == "pad_crop" else 0
            decoder = _PictureDecoder(kernels.decode_shifted, image_size, table, seed, flip, border)
        else:
            areas = float(crop_scale[0]), float(crop_scale[1])
            box = augment == "random_resized_crop", *areas, float(val_crop)
            decoder = _PictureDecoder(kernels.decode_boxes, image_size, table, seed, flip, *box)
        self._num_samples = len(table)
        self._metadata = reader.metadata
        self._graph, self._run = _join_decoders(reader, {"image": decoder, "label": _LabelDecoder()})
        self._file = np.memmap(self.path, np.uint8, "r")
        self._num_threads, self._pool = threads, ThreadPoolExecutor(threads, "beton-decode")
        self._producers: set[Producer] = set()

    @property
    def num_samples(self) -> int:
        """Pictures in the set."""
        return self._num_samples

    @property
    def labels(self) -> NDArray[np.int64]:
        """Label of each picture as the file has it, int64 [N]."""
        return np.array(self._metadata["f1"])

    def iterate(self, shares: Sequence[Keys]) -> Iterator[Batch]:
        """Batches in the order of `shares`: the i-th holds exactly the keys int64 [B] of shares[i].

        Shares are asked for one by one, a few batches ahead. Images and labels lie in a ring of buffers: see `Batch`.
        Leaving the loop early stops the thread.

        Raises:
            UserError: a picture can't be decoded.
            Exception: whatever asking for a share raised.
        """
        # Pinned where there is a GPU, and so allocated in this thread, whose current device is the right one.
        memory = self._graph.allocate_memory(self.batch_size, NUM_SLOTS)["operation"]
        producer = Producer(partial(self._fill, memory), shares)
        self._producers.add(producer)
        try:
            yield from producer.batches()
        finally:
            self._producers.discard(producer)

    def close(self) -> None:
        """Stop what still runs; the loader can't be used afterwards."""
        for producer in list(self._producers):
            producer.stop()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def unreadable(self) -> Iterator[tuple[int, Keys]]:
        """Decode every picture, in order; yields the number done so far and the indices int64 [n] of broken ones."""
        memory = self._graph.allocate_memory(self.batch_size, 1)["operation"]
        for start in range(0, self.num_samples, self.batch_size):
            indices = np.arange(start, min(start + self.batch_size, self.num_samples))
            self._decode_parts(memory, indices, 0)
            (_, readable), _ = memory.values()
            yield int(indices[-1]) + 1, indices[readable[0][: len(indices), 0] == 0]

    def _fill(self, memory: dict[int, Any], keys: Keys, slot: int) -> Batch:
        """Decode the pictures of `keys` into a slot of the ring."""
        count = len(keys)
        if count > self.batch_size:
            raise ValueError(f"a share of {count} pictures: the loader's batch_size is {self.batch_size}")
        self._decode_parts(memory, keys, slot)
        (pictures, readable), labels = memory.values()
        if not readable[slot][:count].all():
            index = int(keys[np.flatnonzero(readable[slot][:count] == 0)[0]] % self.num_samples)
            raise UserError(f"{self.path}: picture {index} can't be decoded; write it again with `arat data write`")
        images = torch.from_numpy(pictures[slot][:count]).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(labels[slot][:count, 0]), torch.from_numpy(keys))

    def _decode_parts(self, memory: dict[int, Any], keys: Keys, slot: int) -> None:
        """Run FFCV's pipelines on the keys, a part on each thread."""
        count = len(keys)
        # Parts smaller than one a thread: pictures differ in size.
        length = count if self._num_threads == 1 else -(-count // (4 * self._num_threads))
        parts = [slice(start, min(start + length, count)) for start in range(0, count, max(1, length))]
        run = partial(self._decode, memory, keys, slot)
        list(map(run, parts) if self._num_threads == 1 else self._pool.map(run, parts))

    def _decode(self, memory: dict[int, Any], keys: Keys, slot: int, part: slice) -> None:
        """Run FFCV's pipelines on a part of the keys."""

        def cut(buffer: Any) -> Any:
            return tuple(cut(each) for each in buffer) if isinstance(buffer, tuple) else buffer[slot][part]

        self._run(
            batch_indices=keys[part],
            metadata=self._metadata,
            storage_state=(self._file,),
            **{f"memory_{node}": cut(buffer) for node, buffer in memory.items()},
            **{f"shared_memory_{node}": None for node in memory},
        )


def _read_contents(path: Path) -> tuple[Reader, NDArray[np.int64]]:
    """FFCV's reader of a file, and a table of its pictures as `decode_shifted` takes it, int64 [N,5].

    Raises:
        UserError: the file is missing, or its table of contents doesn't point inside it: FFCV reads wherever it points.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; `arat data write SOURCE {path}` would write it")
    try:
        reader = Reader(str(path))
        pictures, allocations = reader.metadata["f0"], reader.alloc_table[np.argsort(reader.alloc_table["ptr"])]
        found = allocations[np.searchsorted(allocations["ptr"], pictures["data_ptr"])]
        is_jpeg = pictures["mode"] == IMAGE_MODES["jpg"]
        columns = found["ptr"], found["ptr"] + found["size"], pictures["height"], pictures["width"], is_jpeg
        table = np.stack(columns, axis=1).astype(np.int64)
        complete = len(table) == reader.num_samples and np.all(found["ptr"] == pictures["data_ptr"])
        if complete and _is_inside(table, path.stat().st_size):
            return reader, table
    except Exception:  # noqa: BLE001, S110 - FFCV's reader checks nothing: damaged bytes may raise anything.
        pass
    raise UserError(f"{path}: not a complete .beton; write it again with `arat data write`")


def _is_inside(table: NDArray[np.int64], num_bytes: int) -> bool:
    """Whether every picture of a table lies in a file of so many bytes, and each raw one has the bytes of its size."""
    start, stop, height, width, is_jpeg = table.T
    fits = (start > 0) & (start < stop) & (stop <= num_bytes) & (height > 0) & (width > 0)
    return len(table) > 0 and bool(np.all(fits & ((is_jpeg != 0) | (stop - start == 3 * height * width))))


def _join_decoders(reader: Reader, decoders: dict[str, Any]) -> tuple[Graph, Callable[..., Any]]:
    """FFCV's graph of the fields' decoders, and the function that it makes of them.

    Nothing is left for it to compile: the kernels are already. FFCV would compile each loader anew, for seconds, and
    with several threads for numba's thread pool, which two loaders may not enter at the same time; ours share a batch
    among threads of Python. FFCV's own Loader would index the file once more for its memory manager, which takes 700 MB
    and 11 s at the size of ImageNet.
    """
    specs = {name: PipelineSpec(name, decoder) for name, decoder in decoders.items()}
    graph = Graph(specs, reader.handlers, {name: at for at, name in enumerate(reader.handlers)}, reader.metadata, None)
    was_enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        ((run, _),), _ = graph.codegen_all(graph.collect_requirements()[1])
    finally:
        Compiler.set_enabled(was_enabled)
    return graph, run
