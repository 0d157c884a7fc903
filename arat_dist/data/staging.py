"""Copies of .beton files on a disk of this machine, for sets whose storage is shared and slow.

A copy is named by its SHA-256: one that is there already is used again, and two sets of one name don't meet. Nothing
here deletes a whole copy: who owns the disk does.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import cycle
from pathlib import Path

from arat_dist.config import DataConfig
from arat_dist.data.manifest import Manifest, check_beton, load_manifest, manifest_path
from arat_dist.errors import UserError

LOG_EVERY_S = 10.0
"""Seconds between two lines on how far a copy is."""

_CHUNK_BYTES = 2**26
_LOCK = ".staging.lock"
_PARTIAL = ".beton.partial"
_IN_PLACE = "or null (reading in place), would be right"

logger = logging.getLogger(__name__)


def stage_data(data: DataConfig) -> None:
    """Have both sets where the section says that they are read, the usually smaller one first.

    Raises:
        UserError: as `local_beton`.
    """
    for beton in (data.val, data.train):
        local_beton(beton, data.stage_to)


def local_beton(beton: str | Path, stage_to: str | None) -> Path:
    """The file to read a .beton's pictures from: itself, or its copy, which is made now unless it is there.

    Any number of processes of a machine may ask at once: one copies, the others wait for it.

    Args:
        beton: the file on shared storage, with its manifest.
        stage_to: folder on a disk of this machine; None reads in place.

    Raises:
        UserError: the manifest is missing, the disk has no room or can't be written, or what was read is not what the
            manifest says.
    """
    if stage_to is None:
        return Path(beton)
    manifest, folder = load_manifest(beton), Path(stage_to)
    copy = folder / f"{manifest.sha256}.beton"
    if _is_whole(copy, manifest):
        return copy
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            if not _is_whole(copy, manifest):
                _make(Path(beton), copy, manifest)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_room(beton, folder, manifest) from error
        reason = error.strerror or error
        raise UserError(
            f"data.stage_to: {folder}: {beton} can't be copied there: {reason}; a folder on a disk of each machine, "
            f"{_IN_PLACE}"
        ) from error
    return copy


def _is_whole(copy: Path, manifest: Manifest) -> bool:
    """Whether a copy is complete: its manifest, written last, is there, and it passes the check of any set."""
    with suppress(OSError, UserError):
        return check_beton(copy).sha256 == manifest.sha256
    return False


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep the folder to this process inside the context; the lock goes with the process."""
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process of this machine that copies to %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(beton: Path, copy: Path, manifest: Manifest) -> None:
    """Copy a file and then its manifest; the folder is locked, so whatever is unfinished in it is dead."""
    for dead in (*copy.parent.glob(f".*{_PARTIAL}"), copy, manifest_path(copy)):
        dead.unlink(missing_ok=True)
    if shutil.disk_usage(copy.parent).free < manifest.num_bytes:
        raise _no_room(beton, copy.parent, manifest)
    partial = copy.with_name(f".{copy.stem}{_PARTIAL}")
    try:
        with FileIO(beton) as source, FileIO(partial, "w") as target:
            sha256 = _transfer(source, target, f"copying {beton} to {copy.parent}", manifest.num_bytes)
        if sha256 != manifest.sha256:
            raise UserError(
                f"{beton}: what was read for data.stage_to has SHA-256 {sha256[:12]}..., its manifest says "
                f"{manifest.sha256[:12]}...; try again if `arat data check {beton}` finds it whole, else write it again"
            )
        partial.replace(copy)
        # Last, and itself whole or not at all.
        with partial.open("w") as file:
            file.write(manifest.model_dump_json(indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(manifest_path(copy))
    finally:
        partial.unlink(missing_ok=True)


def _transfer(source: FileIO, target: FileIO, title: str, num_bytes: int) -> str:
    """Copy the bytes onto the disk, with a line of progress now and then; returns their SHA-256 in hexadecimal.

    Args:
        source: open for reading.
        target: open for writing.
        title: begins every line.
        num_bytes: what is expected, for the progress alone.
    """
    digest, done = hashlib.sha256(), 0
    began = said = time.monotonic()
    with ThreadPoolExecutor(1, "staging") as writer:
        written: Future[None] | None = None
        # The next chunk is read and hashed while this one goes to the disk.
        for buffer in cycle(memoryview(bytearray(_CHUNK_BYTES)) for _ in range(2)):
            if not (count := source.readinto(buffer)):
                break
            digest.update(buffer[:count])
            if written is not None:
                written.result()
            written = writer.submit(_write, target, buffer[:count])
            done += count
            if time.monotonic() - said >= LOG_EVERY_S:
                said = time.monotonic()
                _tell(title, done, num_bytes, said - began)
        if written is not None:
            written.result()
    took_s = time.monotonic() - began
    logger.info("%s: %.3g GB in %.1f s, %.0f MB/s", title, done / 1e9, took_s, done / 1e6 / max(took_s, 1e-3))
    return digest.hexdigest()


def _write(target: FileIO, chunk: memoryview) -> None:
    """Have a chunk on the disk: a rate of the page cache would tell nothing, and the end would come all at once."""
    while chunk:
        chunk = chunk[target.write(chunk) :]
    os.fdatasync(target.fileno())


def _tell(title: str, done: int, num_bytes: int, seconds: float) -> None:
    """Log how far a copy is."""
    rate = done / seconds
    left_s = max(0, num_bytes - done) / rate
    logger.info("%s: %.1f of %.1f GB, %.0f MB/s, %.0f s left", title, done / 1e9, num_bytes / 1e9, rate / 1e6, left_s)


def _no_room(beton: str | Path, folder: Path, manifest: Manifest) -> UserError:
    """What to say when the disk is full."""
    free = shutil.disk_usage(folder).free
    return UserError(
        f"data.stage_to: {folder}: {beton} needs {manifest.num_bytes / 1e9:.3f} GB, {free / 1e9:.3f} GB are free; "
        f"another folder, {_IN_PLACE}"
    )
