"""FFCV's .beton files: writing them, and loading pictures by key. The only file that imports ffcv.

What is FFCV's: the file format, its writer, the pipeline of operations, the memory map, decoding and resizing. What is
ours: the order of samples, random choices that depend on (seed, key) alone, and the thread that runs ahead, because
FFCV's own can neither be seeded, nor report an error, nor be stopped.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from queue import Empty, SimpleQueue
from traceback import clear_frames
from types import TracebackType
from typing import Any, Literal, Self

import numba.typed
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from arat_dist.data import augment as kernels
from arat_dist.data.loader import Batch
from arat_dist.data.manifest import Manifest, file_sha256, manifest_path
from arat_dist.data.order import Keys
from arat_dist.data.ring import NUM_SLOTS, Producer
from arat_dist.data.sources import Picture, Source
from arat_dist.errors import UserError


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """Undo FFCV's habit of setting torch's thread count, which it does on import."""
    num_threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


@contextmanager
def _plain_dictionaries() -> Iterator[None]:
    """Spare FFCV's import a dictionary of numba's for two strings: compiling it takes 5.2 of the import's 5.6 s."""
    typed: Any = numba.typed
    kept, typed.Dict = typed.Dict, dict
    try:
        yield
    finally:
        typed.Dict = kept


with _torch_threads_kept(), _plain_dictionaries():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import IMAGE_MODES, SimpleRGBImageDecoder
    from ffcv.libffcv import ctypes_imdecode, ctypes_resize
    from ffcv.memory_allocator import MemoryAllocator
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.compiler import Compiler
    from ffcv.pipeline.graph import Graph
    from ffcv.pipeline.pipeline_spec import PipelineSpec
    from ffcv.pipeline.state import State
    from ffcv.reader import Reader
    from ffcv.writer import DatasetWriter, worker_job_indexed_dataset

kernels.link(*(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in (ctypes_imdecode, ctypes_resize)))

Progress = Callable[[int, int], None]
"""Called with the number of pictures done and their total."""

_MIN_PAGE_BYTES = 2**21
_MAX_PAGE_BYTES = 2**31


# Writing ------------------------------------------------------------------------------------------------------------


def write_beton(
    source: Source,
    out: str | Path,
    *,
    max_side: int = 500,
    jpeg_quality: int = 90,
    raw_below: int = 128 * 128,
    num_workers: int = 1,
    on_progress: Progress | None = None,
) -> Manifest:
    """Write a source as OUT.beton with its manifest; on any failure nothing of it is left.

    Args:
        source: the pictures.
        out: file to write, ending in .beton; one that exists is replaced once the new one is complete.
        max_side: shrink pictures whose longer side is longer than this, in pixels.
        jpeg_quality: quality of pictures stored as JPEG, 1 to 100.
        raw_below: store pictures of fewer pixels than this as they are, which loads faster.
        num_workers: processes that read and encode; 1 does it in this process.
        on_progress: called now and then with (done, total).

    Raises:
        UserError: `out` can't be written, or a picture can't be read (named).
    """
    out = Path(out)
    if out.suffix != ".beton":
        raise UserError(f"{out}: the name of a data set ends in .beton")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}") from error
    temp, temp_manifest = (out.with_name(f".{out.name}.{os.getpid()}.{kind}") for kind in ("tmp", "manifest"))
    try:
        page_bytes = 1 << (3 * max(max_side**2, raw_below) - 1).bit_length()
        writer = _Writer(
            str(temp),
            {
                "image": RGBImageField("smart", smart_threshold=3 * raw_below - 1, jpeg_quality=jpeg_quality),
                "label": IntField(),
            },
            page_size=min(max(page_bytes, _MIN_PAGE_BYTES), _MAX_PAGE_BYTES),
            num_workers=min(num_workers, len(source)),
        )
        writer.write(_Shrunk(source, max_side), on_progress or _ignore)
        manifest = _describe(temp, source, max_side=max_side, jpeg_quality=jpeg_quality, raw_below=raw_below)
        temp_manifest.write_text(manifest.model_dump_json(indent=2) + "\n")
        for path in (temp, temp_manifest):
            _sync(path)
        # The manifest goes last: a beton without one is refused, so a crash in between can't pass for a data set.
        manifest_path(out).unlink(missing_ok=True)
        temp.replace(out)
        temp_manifest.replace(manifest_path(out))
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror or error}") from error
    finally:
        temp.unlink(missing_ok=True)
        temp_manifest.unlink(missing_ok=True)
    return manifest


def _ignore(*news: object) -> None:
    """Tell nobody."""


def _sync(path: Path) -> None:
    """Have a file on the disk before it gets its name."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _describe(beton: Path, source: Source, *, max_side: int, jpeg_quality: int, raw_below: int) -> Manifest:
    """The manifest of a file that has just been written, read back from it."""
    metadata = Reader(str(beton)).metadata
    heights, widths = metadata["f0"]["height"], metadata["f0"]["width"]
    return Manifest(
        num_samples=len(metadata),
        class_names=tuple(source.class_names),
        class_counts=tuple(np.bincount(metadata["f1"], minlength=len(source.class_names)).tolist()),
        num_bytes=beton.stat().st_size,
        sha256=file_sha256(beton),
        source=source.description,
        max_side=max_side,
        jpeg_quality=jpeg_quality,
        raw_below=raw_below,
        raw_share=float(np.mean(metadata["f0"]["mode"] == IMAGE_MODES["raw"])),
        min_size=(int(heights.min()), int(widths.min())),
        max_size=(int(heights.max()), int(widths.max())),
    )


@dataclass
class _Shrunk:
    """A source whose pictures are at most max_side pixels long, and whose errors name the picture."""

    source: Source
    max_side: int

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        try:
            picture, label = self.source[index]
            return self._shrink(picture), label
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.source.name_of(index)}: not a readable picture: {reason}") from error

    def _shrink(self, picture: Picture) -> Picture:
        height, width = picture.shape[:2]
        if max(height, width) <= self.max_side:
            return picture
        ratio = self.max_side / max(height, width)
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


@dataclass
class _Watched:
    """Pictures that tell of each one read, and of the error that ends the reading."""

    pictures: _Shrunk
    on_read: Callable[[int], None]
    on_error: Callable[[str], None]

    def __getitem__(self, index: int) -> tuple[Picture, int]:
        try:
            sample = self.pictures[index]
        except UserError as error:
            self.on_error(str(error))
            raise
        self.on_read(int(index) + 1)
        return sample


class _Writer(DatasetWriter):
    """FFCV's writer, that ends when a worker fails: its own `_write_common` waits forever."""

    def write(self, pictures: _Shrunk, on_progress: Progress) -> None:
        """Write all pictures (UserError: one can't be read)."""
        self.num_samples = len(pictures)
        self.prepare()
        shared: Any = self.metadata_sm
        try:
            encode = self._encode_here if self.num_workers <= 1 else self._encode_in_workers
            self.finalize(encode(pictures, on_progress))
        except Exception as error:
            # FFCV's frames hold a view of the shared memory, which couldn't be closed.
            clear_frames(error.__traceback__)
            raise
        finally:
            shared.close()
            shared.unlink()

    def _encode_here(self, pictures: _Shrunk, on_progress: Progress) -> list[Any]:
        """Encode in this process; returns the allocations."""
        todo, allocations = SimpleQueue(), SimpleQueue()
        todo.put([(index, index) for index in range(len(pictures))])
        todo.put(None)

        def on_read(done: int) -> None:
            on_progress(done, len(pictures))

        watched = _Watched(pictures, on_read, _ignore)
        worker_job_indexed_dataset(*self._job(todo, allocations, watched))
        return allocations.get()

    def _encode_in_workers(self, pictures: _Shrunk, on_progress: Progress) -> list[Any]:
        """Encode in forked processes; returns the allocations of all."""
        context = get_context("fork")
        todo, allocations, errors = context.Queue(), context.Queue(), context.SimpleQueue()
        for start in range(0, len(pictures), 100):
            todo.put([(index, index) for index in range(start, min(start + 100, len(pictures)))])
        for _ in range(self.num_workers):
            todo.put(None)
        watched = _Watched(pictures, _ignore, errors.put)
        job = self._job(todo, allocations, watched)
        workers = [
            context.Process(target=_run_worker, args=(errors.put, *job), daemon=True) for _ in range(self.num_workers)
        ]
        try:
            for worker in workers:
                worker.start()
            done_number, found = job[5], []
            for _ in workers:
                found += self._await_worker(
                    workers, allocations, errors, lambda: on_progress(done_number.value, len(pictures))
                )
            return found
        finally:
            todo.cancel_join_thread()
            for worker in workers:
                worker.terminate()
                worker.join()

    def _await_worker(self, workers: list[Any], allocations: Any, errors: Any, tick: Callable[[], None]) -> list[Any]:
        """Allocations of the next worker that is done; an error of any of them is raised at once."""
        while True:
            with suppress(Empty):
                return allocations.get(timeout=0.1)
            tick()
            if not errors.empty():
                raise UserError(errors.get())
            codes = [worker.exitcode for worker in workers if worker.exitcode]
            if codes:
                raise RuntimeError(f"a worker process that encoded pictures died with exit code {codes[0]}")

    def _job(self, todo: Any, allocations: Any, pictures: _Watched) -> tuple[Any, ...]:
        """Arguments of FFCV's worker function."""
        allocator = MemoryAllocator(self.fname, self.data_region_start, self.page_size)
        done_number = get_context("fork").Value("Q", 0)
        shared = self.metadata_sm, self.metadata_type
        return todo, *shared, self.fields, allocator, done_number, allocations, pictures


def _run_worker(on_error: Callable[[str], None], *job: Any) -> None:
    """Body of a writing process: FFCV's, with its errors handed to the parent."""
    try:
        worker_job_indexed_dataset(*job)
    except UserError:
        pass  # Told already, when it happened.
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it.
        on_error(f"encoding failed: {error!r}")


# Loading ------------------------------------------------------------------------------------------------------------


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
        reader, table = _read_contents(self.path)
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

    def _fill(self, memory: dict[int, Any], side_at: Callable[[int], int], at: int, keys: Keys, slot: int) -> Batch:
        """Decode the pictures of `keys`, the share at a position, into a slot of the ring, a part on each thread."""
        count, side = len(keys), side_at(at)
        if count > self.batch_size:
            raise ValueError(f"a share of {count} pictures: the loader's batch_size is {self.batch_size}")
        # Parts smaller than one a thread: pictures differ in size.
        length = count if self._num_threads == 1 else -(-count // (4 * self._num_threads))
        parts = [slice(start, min(start + length, count)) for start in range(0, count, max(1, length))]
        (picture_node, (pictures, readable)), (label_node, labels) = memory.items()
        # The slot holds the largest pictures: smaller ones lie at its beginning.
        pictures = pictures[slot].reshape(-1)[: count * side * side * 3].reshape(count, side, side, 3)
        readable, labels = readable[slot][:count], labels[slot][:count]
        run = partial(self._decode, {picture_node: (pictures, readable), label_node: labels}, keys)
        list(map(run, parts) if self._num_threads == 1 else self._pool.map(run, parts))
        if not readable.all():
            index = int(keys[np.flatnonzero(readable == 0)[0]] % self.num_samples)
            raise UserError(f"{self.path}: picture {index} can't be decoded; write it again with `arat data write`")
        images = torch.from_numpy(pictures).permute(0, 3, 1, 2)
        return Batch(images, torch.from_numpy(labels[:, 0]), torch.from_numpy(keys))

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
        columns = found["ptr"], found["ptr"] + found["size"], pictures["height"], pictures["width"]
        table = np.stack([*columns, pictures["mode"] == IMAGE_MODES["jpg"]], axis=1).astype(np.int64)
        complete = 0 < len(table) == reader.num_samples and np.all(found["ptr"] == pictures["data_ptr"])
        if complete and table[:, 1].max() <= path.stat().st_size:
            return reader, table
    except (AssertionError, IndexError, KeyError, ValueError, OSError):
        pass
    raise UserError(f"{path}: not a complete .beton; write it again with `arat data write`")


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
