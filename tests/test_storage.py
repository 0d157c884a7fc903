"""The same operations on a plain folder, on file:// and on an object store (fsspec's memory)."""

import errno
import os
import uuid
from pathlib import Path

import pytest

from arat_dist.errors import UserError
from arat_dist.storage import Storage


@pytest.fixture(params=["folder", "file", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    uris = {"folder": str(tmp_path / "a"), "file": f"file://{tmp_path}/a", "memory": f"memory://{uuid.uuid4().hex}"}
    return Storage(uris[request.param])


def test_files_go_in_and_come_out(storage: Storage):
    assert storage.names() == []
    assert not storage.exists()
    assert not storage.exists("x")
    assert storage.read_json("x") == {}
    with pytest.raises(FileNotFoundError):
        storage.read("x")
    storage.write("x", b"one")
    storage.write("x", b"two")
    (storage / "sub").write("y", b"\x00\xff")
    (storage / "sub" / "deep").write_json("z.json", {"a": [1, None]})
    assert storage.read("x") == b"two"
    assert (storage / "sub").read("y") == b"\x00\xff"
    assert storage.names() == ["sub", "x"]
    assert (storage / "sub").names() == ["deep", "y"]
    assert (storage / "sub" / "deep").read_json("z.json") == {"a": [1, None]}
    assert storage.exists()
    assert storage.exists("sub")
    storage.delete("x")
    storage.delete("x")
    storage.delete("sub")
    assert storage.names() == []
    assert not (storage / "sub").exists("y")


def test_append_adds_to_what_is_there_and_begins_what_is_not(storage: Storage):
    storage.append("log", b"a\n")
    storage.append("log", b"b\n")
    assert storage.read("log") == b"a\nb\n"
    assert storage.read_from("log", 0) == b"a\nb\n"
    assert storage.read_from("log", 2) == b"b\n"
    assert storage.read_from("log", 4) == storage.read_from("log", 99) == storage.read_from("none", 0) == b""
    storage.append("log", b"c\n")
    assert storage.read_from("log", 4) == b"c\n"


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    storage = Storage(str(tmp_path))
    storage.write("x", b"old")
    seen = []

    def failing(fd: int) -> None:
        seen.append(sorted(os.listdir(tmp_path)))
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        storage.write("x", b"new and longer")
    assert len(seen[0]) == 2  # there was a temporary file
    assert storage.names() == ["x"]
    assert storage.read("x") == b"old"


def test_a_write_reaches_the_disk_before_the_name_does_and_the_name_before_what_comes_next(tmp_path, monkeypatch):
    """The name of a new folder too: else a power cut might take a checkpoint, but not the deletion of the last one."""
    events = []
    fsync, replace = os.fsync, Path.replace

    def noted(fd: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{fd}").removeprefix(str(tmp_path)))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "replace", lambda self, to: (events.append("rename"), replace(self, to))[1])
    Storage(str(tmp_path / "new")).write("x", b"content")
    assert events == [f"/new/.x.{os.getpid()}", "rename", "/new", ""]
    assert os.listdir(tmp_path / "new") == ["x"]


def test_a_disk_that_syncs_no_folders_is_written_to_all_the_same(tmp_path, monkeypatch):
    fsync = os.fsync

    def refusing(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", refusing)
    storage = Storage(str(tmp_path))
    storage.write("x", b"content")
    assert storage.read("x") == b"content"


def test_a_scheme_without_a_driver_is_the_users_error():
    with pytest.raises(UserError) as caught:
        Storage("nosuch://bucket/runs")
    assert str(caught.value).startswith("cluster.storage: nosuch://bucket/runs")
    assert "\n" not in str(caught.value)


def test_uri_names_the_folder_again(storage: Storage):
    (storage / "sub").write("y", b"1")
    assert Storage((storage / "sub").uri).read("y") == b"1"
    assert storage.is_local != storage.uri.startswith("memory://")
