"""Where runs live: a folder or any fsspec URI, with the few operations that a run needs.

On a local disk a file appears whole or not at all (temporary name, fsync, rename), and in the order of writing, also
after a power cut; object stores do so by themselves.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from arat_dist.errors import UserError


class Storage:
    """A folder under a URI.

    Args:
        uri: local path, file://, s3://, gs:// ...

    Raises:
        UserError: the URI's scheme has no fsspec driver.
    """

    def __init__(self, uri: str | Path):
        try:
            self._fs, self._root = fsspec.url_to_fs(str(uri))
        except (ValueError, ImportError) as error:
            raise UserError(f"cluster.storage: {uri}: {error}") from error
        self.uri = self._root if self.is_local else str(uri).rstrip("/")

    @property
    def is_local(self) -> bool:
        """Whether this is a folder on a disk of this machine (or one mounted on it)."""
        return isinstance(self._fs, LocalFileSystem)

    def __truediv__(self, name: str) -> Storage:
        return Storage(f"{self.uri}/{name}")

    def path(self, name: str) -> str:
        """Path of a file in the folder, as the driver takes it."""
        return f"{self._root}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there; without a name, the folder itself."""
        return self._fs.exists(self.path(name) if name else self._root)

    def names(self) -> list[str]:
        """Names of the files and folders in it, sorted; empty where it doesn't exist."""
        self._fs.invalidate_cache(self._root)
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            return sorted(str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=False))
        return []

    def read(self, name: str) -> bytes:
        """A file's bytes (FileNotFoundError)."""
        return self._fs.cat_file(self.path(name))

    def read_from(self, name: str, offset: int) -> bytes:
        """A file's bytes from an offset on; empty where there are none."""
        with contextlib.suppress(FileNotFoundError):
            return self._fs.cat_file(self.path(name), start=offset) if self._size(name) > offset else b""
        return b""

    def write(self, name: str, content: bytes) -> None:
        """Write a file so that it is there whole or not at all, also after a power cut."""
        if not self.is_local:
            self._fs.pipe_file(self.path(name), content)
            return
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
        # Its name, and that of its folder, which may be new: what is deleted next must not be gone without them.
        for folder in (target.parent, target.parent.parent):
            _sync_names(folder)

    def append(self, name: str, content: bytes) -> None:
        """Add to a file, all or nothing. Object stores can't add: there the whole file is written again."""
        if self.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            size = target.stat().st_size if target.exists() else 0
            try:
                with target.open("ab") as file:
                    file.write(content)
            except OSError:  # a full disk takes a part; half a line would join the next one
                with contextlib.suppress(OSError):
                    os.truncate(target, size)
                raise
        else:
            self.write(name, (self.read(name) if self.exists(name) else b"") + content)

    def delete(self, name: str) -> None:
        """Remove a file or a folder and all in it, if it is there."""
        if self.exists(name):
            self._fs.rm(self.path(name), recursive=True)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty where the file isn't there."""
        try:
            return json.loads(self.read(name))
        except (FileNotFoundError, NotADirectoryError):
            return {}

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON object."""
        self.write(name, json.dumps(content, indent=2).encode() + b"\n")

    def _size(self, name: str) -> int:
        self._fs.invalidate_cache(self._root)
        return self._fs.size(self.path(name))


def _sync_names(folder: Path) -> None:
    """Have the names in a folder reach the disk; some network file systems know no such thing."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def absolute_path(path: str) -> str:
    """A path or URI as a process in another working directory needs it."""
    return path if "://" in path else str(Path(path).absolute())
