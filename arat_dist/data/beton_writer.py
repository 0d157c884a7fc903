"""Writing .beton files: complete with their manifest, or not there at all.

FFCV's are the file format, the encoding of a sample and the packing of samples into pages. Ours is the loop around
them: FFCV's waits forever for a worker that failed, can leave no picture out, takes a page that was written in part for
a whole one, and keeps some 400 bytes of Python objects a picture.
"""

from __future__ import annotations

import io
import mmap
import os
import secrets
import signal
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arat_dist.data.ffcv_import import (
    ALLOC_TABLE_TYPE,
    CURRENT_VERSION,
    IMAGE_MODES,
    TYPE_ID_HANDLER,
    FieldDescType,
    HeaderType,
    IntField,
    MemoryAllocator,
    Reader,
    RGBImageField,
    get_metadata_type,
    handle_sample,
)
from arat_dist.data.manifest import Manifest, file_sha256, manifest_path
from arat_dist.data.pictures import Picture, UnreadablePictureError
from arat_dist.data.sources import Source
from arat_dist.errors import UserError

Progress = Callable[[int, int], None]
"""Called with the number of pictures done and their total."""

_MIN_PAGE_BYTES = 2**21
_MAX_PAGE_BYTES = 2**31
_CHUNK = 100
"""Pictures in a row that one process takes at a time."""


def write_beton(
    source: Source,
    out: str | Path,
    *,
    max_side: int = 500,
    jpeg_quality: int = 90,
    raw_below: int = 128 * 128,
    on_error: Literal["fail", "skip"] = "fail",
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
        on_error: what an unreadable picture does: `fail` ends the writing, `skip` leaves it out and lists it in the
            manifest.
        num_workers: processes that read and encode; 1 does it in this process.
        on_progress: called now and then with (done, total).

    Raises:
        UserError: `out` can't be written, a picture can't be read (named), or with `skip` none of them can.
    """
    out = Path(out)
    if out.suffix != ".beton":
        raise UserError(f"{out}: the name of a data set ends in .beton")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: can't be written: {error.strerror}") from error
    # Not the process's number: in containers it is often the same, and what a killed one left lies there still.
    token = secrets.token_hex(4)
    temp, temp_manifest = (out.with_name(f".{out.name}.{token}.{kind}") for kind in ("tmp", "manifest"))
    try:
        image = RGBImageField("smart", smart_threshold=3 * raw_below - 1, jpeg_quality=jpeg_quality)
        page_bytes = 1 << (3 * max(max_side**2, raw_below) - 1).bit_length()
        skipped = _write_samples(
            temp,
            _Shrunk(source, max_side),
            {"image": image, "label": IntField()},
            page_bytes=min(max(page_bytes, _MIN_PAGE_BYTES), _MAX_PAGE_BYTES),
            skip=on_error == "skip",
            num_workers=min(num_workers, len(source)),
            on_progress=on_progress or _ignore,
        )
        manifest = _describe(temp, source, skipped, max_side=max_side, jpeg_quality=jpeg_quality, raw_below=raw_below)
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


def _describe(
    beton: Path, source: Source, skipped: tuple[str, ...], *, max_side: int, jpeg_quality: int, raw_below: int
) -> Manifest:
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
        skipped=skipped,
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
        except (UserError, MemoryError):
            raise
        except Exception as error:
            reason = " ".join(str(error).split())
            raise UnreadablePictureError(f"{self.source.name_of(index)}: not a readable picture: {reason}") from error

    def _shrink(self, picture: Picture) -> Picture:
        height, width = picture.shape[:2]
        if max(height, width) <= self.max_side:
            return picture
        ratio = self.max_side / max(height, width)
        size = max(1, round(width * ratio)), max(1, round(height * ratio))
        return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BOX))


# The file -----------------------------------------------------------------------------------------------------------


def _write_samples(
    path: Path,
    pictures: _Shrunk,
    fields: dict[str, Any],
    *,
    page_bytes: int,
    skip: bool,
    num_workers: int,
    on_progress: Progress,
) -> tuple[str, ...]:
    """Write all pictures; returns what was wrong with each that was skipped.

    Raises:
        UserError: a picture can't be read, or with `skip` none of them can.
        OSError: the file can't be written.
    """
    num_samples, row_type = len(pictures), get_metadata_type(list(fields.values()))
    if not num_samples:
        raise UserError(f"{pictures.source.description}: no pictures in it")
    # Memory that forked processes share and that has no name: /dev/shm is 64 MB in a container, and may be left full.
    rows = np.frombuffer(mmap.mmap(-1, num_samples * row_type.itemsize), row_type)
    table = np.zeros(num_samples, ALLOC_TABLE_TYPE)
    tables_bytes = HeaderType.itemsize + len(fields) * FieldDescType.itemsize + rows.nbytes
    pages = _Pages(str(path), tables_bytes, page_bytes)
    job = _Job(pictures, fields, rows, pages, get_context("fork").Value("q", 0), skip)
    unreadable: dict[int, list[str]] = {}
    num_done = 0

    def take(chunk: _Chunk) -> None:
        nonlocal num_done
        table["size"][chunk.start : chunk.start + len(chunk.sizes)] = chunk.sizes
        unreadable[chunk.start] = chunk.unreadable
        num_done += len(chunk.sizes)
        on_progress(num_done, num_samples)

    if num_workers <= 1:
        job.run(take)
    else:
        _run_in_workers(job, num_workers, take)
    skipped = tuple(line for start in sorted(unreadable) for line in unreadable[start])
    if len(skipped) == num_samples:
        raise UserError(f"{pictures.source.description}: none of its pictures can be read; the first: {skipped[0]}")
    if skipped:
        is_kept = table["size"] > 0
        rows, table = rows[is_kept], table[is_kept]
    _write_tables(path, fields, page_bytes, rows, table)
    return skipped


def _write_tables(path: Path, fields: dict[str, Any], page_bytes: int, rows: NDArray[Any], table: NDArray[Any]) -> None:
    """Put what finds the samples around their pages: header, fields and rows before them, the sizes [N] behind."""
    table["sample_id"], table["ptr"] = np.arange(len(rows)), rows["f0"]["data_ptr"]
    type_ids = {kind: number for number, kind in TYPE_ID_HANDLER.items()}
    described = np.zeros(len(fields), FieldDescType)
    for line, (name, field) in zip(described, fields.items(), strict=True):
        line["type_id"] = type_ids[type(field)]
        line["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        line["arguments"][:] = field.to_binary()[0]
    with path.open("r+b") as file:
        header = np.zeros(1, HeaderType)
        header["version"], header["num_fields"], header["page_size"] = CURRENT_VERSION, len(fields), page_bytes
        header["num_samples"], header["alloc_table_ptr"] = len(rows), file.seek(0, os.SEEK_END)
        file.write(table.view(np.uint8).data)
        file.seek(0)
        for part in (header, described, rows):
            file.write(part.view(np.uint8).data)


class _Pages(MemoryAllocator):
    """FFCV's pages in a file that takes them whole, and takes none any more after an error."""

    def __enter__(self) -> None:
        self.fp = _WholeFile(self.fname, "a")

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is None:
            # Waits for its turn among the other processes: for ever, if one of them has failed.
            self.flush_page()
        self.fp.close()

    def take_size(self) -> int:
        """Bytes of the sample that was written last; forgotten here, where FFCV would keep a list of all."""
        ((_, _, size),) = self.allocations
        self.allocations.clear()
        return size


class _WholeFile(io.FileIO):
    """A file that writes everything or raises OSError: on a disk nearly full, a raw one may write a part and say so."""

    def write(self, data: Any, /) -> int:
        """Write all of it; returns its number of bytes."""
        rest = memoryview(data)
        while rest:
            rest = rest[super().write(rest) :]
        return len(data)


# The work -----------------------------------------------------------------------------------------------------------


class _Chunk(NamedTuple):
    """What became of a few pictures in a row."""

    start: int
    """Index of the first."""
    sizes: NDArray[np.int64]
    """Bytes that each takes in the file, [n]; 0: skipped."""
    unreadable: list[str]
    """What was wrong with each that was skipped."""


@dataclass
class _Job:
    """What each process that encodes works on: it takes chunks until none is left."""

    pictures: _Shrunk
    fields: dict[str, Any]
    rows: NDArray[Any]
    """FFCV's description of each sample, shared among the processes, [N]."""
    pages: _Pages
    num_taken: Any
    """Pictures that some process has taken, shared: a multiprocessing.Value."""
    skip: bool

    def run(self, tell: Callable[[_Chunk], None]) -> None:
        """Encode pictures until none is left (UserError: one can't be read; OSError: the file can't be written)."""
        with self.pages:
            while chunk := self._take():
                tell(self._encode(chunk))

    def _take(self) -> range:
        """The next pictures that nobody has taken."""
        with self.num_taken.get_lock():
            start = self.num_taken.value
            self.num_taken.value = stop = min(start + _CHUNK, len(self.pictures))
        return range(start, stop)

    def _encode(self, indices: range) -> _Chunk:
        done = _Chunk(indices.start, np.zeros(len(indices), np.int64), [])
        for index in indices:
            try:
                sample = self.pictures[index]
            except UnreadablePictureError as error:
                if not self.skip:
                    raise
                done.unreadable.append(str(error))
                continue
            handle_sample(sample, index, self.rows.dtype.names, self.rows, self.pages, self.fields)
            done.sizes[index - indices.start] = self.pages.take_size()
        return done


def _run_in_workers(job: _Job, num_workers: int, take: Callable[[_Chunk], None]) -> None:
    """Run a job in forked processes; the first error of any of them is raised here, and none outlives this."""
    context = get_context("fork")
    # A pipe each: what a process that is killed leaves half-written or locked then concerns nobody else.
    workers: dict[Connection, Any] = {}
    try:
        for _ in range(num_workers):
            reader, writer = context.Pipe(duplex=False)
            worker = context.Process(target=_work, args=(job, writer, [*workers, reader]), daemon=True)
            worker.start()
            writer.close()
            workers[reader] = worker
        running = dict(workers)
        while running:
            for reader in wait(list(running)):
                assert isinstance(reader, Connection)
                news = _receive(reader, running[reader])
                if news is None:
                    del running[reader]
                elif isinstance(news, Exception):
                    raise news
                else:
                    take(news)
    finally:
        for reader, worker in workers.items():
            worker.kill()
            worker.join()
            reader.close()


def _receive(reader: Connection, worker: Any) -> _Chunk | Exception | None:
    """The next message of a worker; None: it is done."""
    try:
        return reader.recv()
    except (EOFError, OSError):  # Its end, between two messages or within one.
        worker.join()
    if worker.exitcode:
        return RuntimeError(f"a worker process that encoded pictures died with exit code {worker.exitcode}")
    return None


def _work(job: _Job, writer: Connection, readers: list[Connection]) -> None:
    """Body of a process that encodes; its errors are the parent's to raise."""
    # Ctrl-C reaches all processes of a terminal: the parent's business.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for reader in readers:
        # Else they would hold each other's pipes open, and outlive a parent that was killed.
        reader.close()
    try:
        job.run(writer.send)
    except (UserError, OSError) as error:
        writer.send(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent has to hear of it.
        writer.send(RuntimeError(f"encoding failed: {error!r}"))
