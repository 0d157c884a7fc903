"""Copies on the local disk: one for all processes of a machine, whole or not there at all."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from beton_pictures import Pictures

from arat_dist.config import DataConfig
from arat_dist.data import staging
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.loader import train_loader, val_loader
from arat_dist.data.manifest import check_beton, load_manifest, manifest_path
from arat_dist.data.staging import local_beton, stage_data
from arat_dist.errors import UserError


@pytest.fixture
def beton(small_beton: Path, tmp_path: Path) -> Path:
    """A .beton that a test may spoil."""
    (tmp_path / "shared").mkdir()
    for path in (small_beton, manifest_path(small_beton)):
        shutil.copy(path, tmp_path / "shared")
    return tmp_path / "shared" / small_beton.name


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local" / "sets"


def refusal(beton: Path, folder: Path) -> str:
    with pytest.raises(UserError) as raised:
        local_beton(beton, str(folder))
    assert "\n" not in str(raised.value)
    return str(raised.value)


def names(folder: Path) -> list[str]:
    """What lies in a folder, but for the lock."""
    return sorted(path.name for path in folder.iterdir() if path.name != staging._LOCK)


def whole(*betons: Path) -> list[str]:
    """What should lie there: a copy of each and its manifest."""
    hashes = [load_manifest(beton).sha256 for beton in betons]
    return sorted(name for sha256 in hashes for name in (f"{sha256}.beton", f"{sha256}.manifest.json"))


# One copy -----------------------------------------------------------------------------------------------------------


def test_without_a_folder_the_file_itself_is_read(beton: Path):
    assert local_beton(beton, None) == beton


def test_a_copy_is_the_file_and_is_made_once(beton: Path, local: Path, caplog):
    with caplog.at_level(logging.INFO):
        copy = local_beton(beton, str(local))
        assert names(local) == whole(beton)
        assert copy.read_bytes() == beton.read_bytes()
        assert check_beton(copy, hash=True) == load_manifest(beton)
        beton.unlink()
        assert local_beton(beton, str(local)) == copy
    (line,) = caplog.messages
    assert line.startswith(f"copying {beton} to {local}: ")


def test_processes_that_ask_at_once_make_one_copy(beton: Path, local: Path):
    code = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from arat_dist.data.staging import local_beton
print(local_beton(*sys.argv[1:]))
"""
    local.mkdir(parents=True)
    with staging._locked(local):
        command = [sys.executable, "-c", code, str(beton), str(local)]
        workers = [
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
        ]
        for worker in workers:
            assert worker.stderr is not None
            assert worker.stderr.readline().startswith("waiting for another process of this machine")
    outputs = [worker.communicate(timeout=60) for worker in workers]
    (path,) = {out.strip() for out, _ in outputs}
    assert Path(path).read_bytes() == beton.read_bytes()
    assert sum("copying" in said for _, said in outputs) == 1
    assert names(local) == whole(beton)


def test_two_sets_of_one_name_do_not_meet(small: Pictures, beton: Path, local: Path, tmp_path: Path):
    other = tmp_path / "other" / beton.name
    write_beton(Pictures(small.pictures[::-1], small.labels), other)
    copies = [local_beton(path, str(local)) for path in (beton, other)]
    assert [copy.read_bytes() for copy in copies] == [beton.read_bytes(), other.read_bytes()]
    assert names(local) == whole(beton, other)


def test_progress_tells_rate_and_time_left(beton: Path, local: Path, caplog, monkeypatch):
    monkeypatch.setattr(staging, "LOG_EVERY_S", 0.0)
    monkeypatch.setattr(staging, "_CHUNK_BYTES", 10_000)
    with caplog.at_level(logging.INFO):
        local_beton(beton, str(local))
    assert len(caplog.messages) == -(-beton.stat().st_size // 10_000) + 1
    assert all(" MB/s, " in line and line.endswith(" s left") for line in caplog.messages[:-1])


def test_every_loader_reads_the_copy(beton: Path, local: Path):
    data = DataConfig(train=str(beton), val=str(beton), num_classes=3, image_size=32, stage_to=str(local))
    stage_data(data)
    size = beton.stat().st_size
    beton.write_bytes(bytes(size))
    for loader in (train_loader(data, 0, 4), val_loader(data, 4)):
        with loader:
            assert loader.num_samples == 37


# What goes wrong ----------------------------------------------------------------------------------------------------


def test_bytes_that_the_manifest_does_not_know_are_refused(beton: Path, local: Path):
    content = bytearray(beton.read_bytes())
    content[len(content) // 2] ^= 1
    beton.write_bytes(content)
    message = refusal(beton, local)
    assert message.startswith(f"{beton}: what was read for data.stage_to has SHA-256 ")
    assert f"arat data check {beton}" in message
    assert names(local) == []


def test_a_copy_that_was_killed_is_made_again(beton: Path, local: Path):
    code = """
import sys, time
from arat_dist.data import staging
def half(source, target, title, num_bytes):
    target.write(source.read(num_bytes // 2))
    target.flush()
    print("half", flush=True)
    time.sleep(600)
staging._transfer = half
staging.local_beton(*sys.argv[1:])
"""
    worker = subprocess.Popen([sys.executable, "-c", code, str(beton), str(local)], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    assert worker.stdout.readline() == "half\n"
    worker.kill()
    worker.communicate()
    (left,) = names(local)
    assert (local / left).stat().st_size == beton.stat().st_size // 2
    (local / left).rename(local / f".{'0' * 64}.beton.partial")  # of a set that nobody asks for again
    assert local_beton(beton, str(local)).read_bytes() == beton.read_bytes()
    assert names(local) == whole(beton)


@pytest.mark.parametrize("damage", ["short", "no manifest", "half a manifest"])
def test_a_copy_that_is_not_whole_is_made_again(beton: Path, local: Path, damage: str):
    copy = local_beton(beton, str(local))
    match damage:
        case "short":
            copy.write_bytes(copy.read_bytes()[:-1])
        case "no manifest":
            manifest_path(copy).unlink()
        case _:
            manifest_path(copy).write_text(manifest_path(copy).read_text()[:50])
    assert local_beton(beton, str(local)).read_bytes() == beton.read_bytes()
    assert check_beton(copy, hash=True)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 64 KiB; root alone can mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount") or "mount"
    command = [mount, "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no tmpfs can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_seen_before_and_while_copying(beton: Path, tiny_disk: Path, monkeypatch):
    message = refusal(beton, tiny_disk)
    assert f"{beton} needs {beton.stat().st_size / 1e9:.3f} GB, 0.000 GB are free; " in message
    assert names(tiny_disk) == []
    plenty = shutil.disk_usage(tiny_disk)._replace(free=10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: plenty)
    assert "GB are free; another folder, or null (reading in place), would be right" in refusal(beton, tiny_disk)
    assert names(tiny_disk) == []


def test_a_folder_that_can_not_be_made_is_refused(beton: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    message = refusal(beton, tmp_path / "file" / "sets")
    assert message.startswith(f"data.stage_to: {tmp_path}/file/sets: {beton} can't be copied there: Not a directory;")


def test_a_missing_set_is_refused(beton: Path, local: Path):
    beton.unlink()
    assert "No such file or directory" in refusal(beton, local)
    manifest_path(beton).unlink()
    assert refusal(beton, local).startswith(f"{manifest_path(beton)}: missing")
