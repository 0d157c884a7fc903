"""Loading pictures of a .beton by key.

FFCV's are the file format, the pipeline of operations, the memory map, decoding and resizing. Ours are the order of
samples, random choices that depend on (seed, key) alone, and the thread that runs ahead, because FFCV's own can neither
be seeded, nor report an error, nor be stopped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
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
from arat_dist.data.beton_table import read_contents
from arat_dist.data.ffcv_import import (
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


_Cut = tuple[Callable[..., None], tuple[object, ...]]
"""A kernel that decodes and crops, and what it takes behind the table."""


class _PictureDecoder(SimpleRGBImageDecoder):
    """Pictures by key, cropped by the kernel of their side.

    Its memory is the pictures uint8 [B,side,side,3] and whether each was readable, uint8 [B,1].

    Args:
        kernels: for each side in pixels, what fills the memory.
        table: where each picture lies, int64 [N,5].
    """

    def __init__(self, kernels: Mapping[int, _Cut], table: NDArray[np.int64]) -> None:
        super().__init__()
        self._kernels, self._table = kernels, table

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        """Shape of the largest pictures that come out, and the memory for them."""
        shape, dtype = (max(self._kernels), max(self._kernels), 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, (AllocationQuery(shape, dtype), AllocationQuery((1,), dtype))

    def generate_code(self) -> Callable[..., Any]:
        """The pipeline's step."""

        def decode(keys: Keys, memory: Any, _: object, storage_state: Any) -> Any:
            pictures, readable = memory
            kernel, settings = self._kernels[pictures.shape[1]]
            kernel(keys, pictures, readable, storage_state[0], self._table, *settings)
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
            threads: threads that decode.

        Raises:
            UserError: the file is missing or broken, or pad_crop meets pictures of another size.
        """
        self.path, self.batch_size = Path(path), batch_size
        table = read_contents(self.path).table
        reader = Reader(str(self.path))
        fits = bool(np.all(table[:, 2:4] == image_size))
        if augment == "pad_crop" and not fits:
            raise UserError(
                f"{self.path}: pad_crop needs pictures of {image_size}x{image_size} (data.image_size); "
                "data.augment: random_resized_crop would be right"
            )
        assert augment != "pad_crop" or set(sides) <= {image_size}
        # Pictures that are taken whole at image_size are so at other sizes.
        box = augment == "random_resized_crop", *map(float, crop_scale), 1.0 if fits else float(val_crop)
        cuts: Mapping[int, _Cut] = dict.fromkeys({image_size, *sides}, (kernels.decode_boxes, (seed, flip, *box)))
        if fits and augment != "random_resized_crop":
            border = padding if augment == "pad_crop" else 0
            cuts = {**cuts, image_size: (kernels.decode_shifted, (seed, flip, border))}
        decoder = _PictureDecoder(cuts, table)
        self._image_size = image_size
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

    def iterate(self, shares: Sequence[Keys], side_at: Callable[[int], int] | None = None) -> Iterator[Batch]:
        """Batches in the order of `shares`: the i-th holds exactly the keys int64 [B] of shares[i].

        Its pictures have the side side_at(i), in pixels, by default image_size; where that changes, the thread goes on
        in the same buffers. Shares are asked for one by one, a few batches ahead. Images and labels lie in a ring of
        buffers: see `Batch`. Leaving the loop early stops the thread.

        Raises:
            UserError: a picture can't be decoded.
            Exception: whatever asking for a share raised.
        """
        # Pinned where there is a GPU, and so allocated in this thread, whose current device is the right one.
        memory = self._graph.allocate_memory(self.batch_size, NUM_SLOTS)["operation"]
        producer = Producer(partial(self._fill, memory, side_at or (lambda _: self._image_size)), shares)
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
            _, readable, _ = self._decode_parts(memory, indices, 0, self._image_size)
            yield int(indices[-1]) + 1, indices[readable[:, 0] == 0]

    def _fill(self, memory: dict[int, Any], side_at: Callable[[int], int], at: int, keys: Keys, slot: int) -> Batch:
        """Decode the pictures of `keys`, the share at a position, into a slot of the ring."""
        if len(keys) > self.batch_size:
            raise ValueError(f"a share of {len(keys)} pictures: the loader's batch_size is {self.batch_size}")
        pictures, readable, labels = self._decode_parts(memory, keys, slot, side_at(at))
        if not readable.all():
            index = int(keys[np.flatnonzero(readable == 0)[0]] % self.num_samples)
            raise UserError(f"{self.path}: picture {index} can't be decoded; write it again with `arat data write`")
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(labels[:, 0]), torch.from_numpy(keys))

    def _decode_parts(self, memory: dict[int, Any], keys: Keys, slot: int, side: int) -> tuple[Any, Any, Any]:
        """Run FFCV's pipelines on the keys, a part on each thread.

        Returns:
            Pictures uint8 [B,side,side,3], whether each was readable, uint8 [B,1], and labels int64 [B,1].
        """
        count = len(keys)
        # Parts smaller than one a thread: pictures differ in size.
        length = count if self._num_threads == 1 else -(-count // (4 * self._num_threads))
        parts = [slice(start, min(start + length, count)) for start in range(0, count, max(1, length))]
        (picture_node, (pictures, readable)), (label_node, labels) = memory.items()
        # The slot holds the largest pictures: smaller ones lie at its beginning.
        pictures = pictures[slot].reshape(-1)[: count * side * side * 3].reshape(count, side, side, 3)
        readable, labels = readable[slot][:count], labels[slot][:count]
        run = partial(self._decode, {picture_node: (pictures, readable), label_node: labels}, keys)
        list(map(run, parts) if self._num_threads == 1 else self._pool.map(run, parts))
        return pictures, readable, labels

    def _decode(self, memory: dict[int, Any], keys: Keys, part: slice) -> None:
        """Run FFCV's pipelines on a part of the keys, with the memory for all of them."""

        def cut(buffer: Any) -> Any:
            return tuple(cut(each) for each in buffer) if isinstance(buffer, tuple) else buffer[part]

        self._run(
            batch_indices=keys[part],
            metadata=self._metadata,
            storage_state=(self._file,),
            **{f"memory_{node}": cut(buffer) for node, buffer in memory.items()},
            **{f"shared_memory_{node}": None for node in memory},
        )


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
