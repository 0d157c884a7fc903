"""Loading pictures of a .beton by key.

FFCV's are the file format, the pipeline of operations, the memory map, decoding and resizing. Ours are the order of
samples, random choices that depend on (seed, key) alone, and the thread that runs ahead, because FFCV's own can neither
be seeded, nor report an error, nor be stopped.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from arat_dist.data import augment as kernels
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
from arat_dist.data.opened import Box, OpenedBeton, Shift
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
    """Pictures by key, cropped by the kernel of their side.

    Its memory is the pictures uint8 [B,side,side,3] and whether each was readable, uint8 [B,1].

    Args:
        cuts: how pictures of each side, in pixels, are cut.
        table: where each picture lies, int64 [N,5].
    """

    def __init__(self, cuts: Mapping[int, Shift | Box], table: NDArray[np.int64]) -> None:
        super().__init__()
        self._cuts, self._table = cuts, table

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, Any]:
        """Shape of the largest pictures that come out, and the memory for them."""
        shape, dtype = (max(self._cuts), max(self._cuts), 3), np.dtype("u1")
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=dtype)
        return state, (AllocationQuery(shape, dtype), AllocationQuery((1,), dtype))

    def generate_code(self) -> Callable[..., Any]:
        """The pipeline's step."""

        def decode(keys: Keys, memory: Any, _: object, storage_state: Any) -> Any:
            pictures, readable = memory
            cut = self._cuts[pictures.shape[1]]
            kernel = kernels.decode_shifted if isinstance(cut, Shift) else kernels.decode_boxes
            kernel(keys, pictures, readable, storage_state[0], self._table, *cut)
            return pictures

        return decode


class BetonLoader(OpenedBeton):
    """Pictures by FFCV, decoded ahead by a thread that shares each batch among others.

    Images and labels lie in a ring of buffers: see `Batch`.
    """

    def _prepare(self) -> None:
        reader = Reader(str(self.path))
        decoder = _PictureDecoder(self.cuts, self.contents.table)
        self._metadata = reader.metadata
        self._graph, self._run = _join_decoders(reader, {"image": decoder, "label": _LabelDecoder()})
        self._file = np.memmap(self.path, np.uint8, "r")
        self._pool = ThreadPoolExecutor(self.threads, "beton-decode")
        self._producers: set[Producer] = set()

    def iterate(self, shares: Sequence[Keys], side_at: Callable[[int], int] | None = None) -> Iterator[Batch]:
        """See `OpenedBeton`; where the side changes, the thread goes on in the same buffers."""
        # Pinned where there is a GPU, and so allocated in this thread, whose current device is the right one.
        memory = self._graph.allocate_memory(self.batch_size, NUM_SLOTS)["operation"]
        producer = Producer(partial(self._fill, memory, side_at or (lambda _: self.image_size)), shares)
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

    def unreadable(self) -> Iterator[tuple[int, Keys]]:
        """Decode every picture, in order; yields the number done so far and the indices int64 [n] of broken ones."""
        memory = self._graph.allocate_memory(self.batch_size, 1)["operation"]
        for start in range(0, self.num_samples, self.batch_size):
            indices = np.arange(start, min(start + self.batch_size, self.num_samples))
            _, readable, _ = self._decode_parts(memory, indices, 0, self.image_size)
            yield int(indices[-1]) + 1, indices[readable[:, 0] == 0]

    def _fill(self, memory: dict[int, Any], side_at: Callable[[int], int], at: int, keys: Keys, slot: int) -> Batch:
        """Decode the pictures of `keys`, the share at a position, into a slot of the ring."""
        if len(keys) > self.batch_size:
            raise ValueError(f"a share of {len(keys)} pictures: the loader's batch_size is {self.batch_size}")
        pictures, readable, labels = self._decode_parts(memory, keys, slot, side_at(at))
        if not readable.all():
            index = int(keys[np.flatnonzero(readable == 0)[0]] % self.num_samples)
            raise UserError(self._undecodable(index))
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(labels[:, 0]), torch.from_numpy(keys))

    def _decode_parts(self, memory: dict[int, Any], keys: Keys, slot: int, side: int) -> tuple[Any, Any, Any]:
        """Run FFCV's pipelines on the keys, a part on each thread.

        Returns:
            Pictures uint8 [B,side,side,3], whether each was readable, uint8 [B,1], and labels int64 [B,1].
        """
        count = len(keys)
        # Parts smaller than one a thread: pictures differ in size.
        length = count if self.threads == 1 else -(-count // (4 * self.threads))
        parts = [slice(start, min(start + length, count)) for start in range(0, count, max(1, length))]
        (picture_node, (pictures, readable)), (label_node, labels) = memory.items()
        # The slot holds the largest pictures: smaller ones lie at its beginning.
        pictures = pictures[slot].reshape(-1)[: count * side * side * 3].reshape(count, side, side, 3)
        readable, labels = readable[slot][:count], labels[slot][:count]
        run = partial(self._decode, {picture_node: (pictures, readable), label_node: labels}, keys)
        list(map(run, parts) if self.threads == 1 else self._pool.map(run, parts))
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
