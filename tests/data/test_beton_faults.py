"""Faults: a full disk, killed processes, Ctrl-C, damaged bytes. Nothing half-written is left or read."""

import io
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from beton_pictures import Pictures

from arat_dist.data.beton import BetonLoader
from arat_dist.data.beton_writer import _WholeFile, write_beton
from arat_dist.data.manifest import check_beton, manifest_path
from arat_dist.errors import UserError

MIB = 2**20


@pytest.fixture(scope="module")
def noise() -> Pictures:
    """8.2 MiB of pictures, stored raw: five pages of 2 MiB behind one for the tables."""
    rng = np.random.default_rng(0)
    return Pictures(list(rng.integers(0, 256, (700, 64, 64, 3), dtype=np.uint8)), [i % 3 for i in range(700)])


@contextmanager
def files_up_to(num_bytes: int) -> Iterator[None]:
    """Refuse to write files any longer, as a full disk does: in part first, then with an error."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Writing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize(
    "num_bytes", [0, MIB, 3 * MIB, 8 * MIB, 12 * MIB - 1, 12 * MIB + 10_000], ids=lambda size: f"{size}B"
)
def test_a_full_disk(tmp_path: Path, noise: Pictures, small: Pictures, num_workers: int, num_bytes: int):
    """Wherever it happens, in a page, between two or in the tables behind them: one line, and the old set stays."""
    out = tmp_path / "a.beton"
    manifest = write_beton(small, out)
    with files_up_to(num_bytes), pytest.raises(UserError) as caught:
        write_beton(noise, out, num_workers=num_workers)
    assert str(caught.value) == f"{out}: can't be written: File too large"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.beton", "a.manifest.json"]
    assert check_beton(out, hash=True) == manifest
    with BetonLoader(out, batch_size=37, image_size=32) as loader:
        batch = next(iter(loader.iterate([np.arange(37)])))
        np.testing.assert_array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack(small.pictures))


def test_the_limits_above_reach_to_the_end(tmp_path: Path, noise: Pictures):
    """The last of them is in the tables; a little more is enough."""
    with files_up_to(12 * MIB + 20_000):
        manifest = write_beton(noise, tmp_path / "a.beton")
    assert manifest.num_bytes > 12 * MIB + 10_000


def test_a_page_is_written_whole_or_not_at_all(tmp_path: Path):
    """A raw file writes a part and only says so: space that comes free again later would hide it."""
    with files_up_to(10):
        raw = io.FileIO(tmp_path / "raw", "a")
        assert raw.write(bytes(20)) == 10
        raw.close()
        whole = _WholeFile(tmp_path / "whole", "a")
        with pytest.raises(OSError, match="File too large"):
            whole.write(bytes(20))
        whole.close()


WRITING = """
import os, sys, time
from pathlib import Path
import numpy as np
from arat_dist.data.beton_writer import write_beton

class Slow:
    description, class_names = "slow", ["one"]
    def __len__(self):
        return 40_000  # minutes: nothing here ends by itself
    def __getitem__(self, index):
        Path(sys.argv[2], str(os.getpid())).touch()
        time.sleep(0.005)
        return np.zeros((64, 64, 3), np.uint8), 0
    def name_of(self, index):
        return str(index)

write_beton(Slow(), sys.argv[1], num_workers=int(sys.argv[3]))
"""


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Callable[[int], tuple[subprocess.Popen[str], list[int]]]]:
    """Starts a process group that writes out/a.beton slowly; returns it and the processes that encode."""
    started = []

    def start(num_workers: int) -> tuple[subprocess.Popen[str], list[int]]:
        for name in ("out", "seen"):
            (tmp_path / name).mkdir()
        command = [sys.executable, "-c", WRITING, str(tmp_path / "out/a.beton"), str(tmp_path / "seen")]
        process = subprocess.Popen(
            [*command, str(num_workers)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # Tests that were started in the background inherit a SIGINT that is ignored.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        deadline = time.monotonic() + 120
        while len(os.listdir(tmp_path / "seen")) < num_workers and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.02)
        return process, [int(name) for name in os.listdir(tmp_path / "seen")]

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def assert_ended(pids: list[int]) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("num_workers", [1, 2])
def test_ctrl_c_leaves_nothing(tmp_path: Path, num_workers: int, writing):
    """A terminal sends it to all processes; only the first one speaks of it."""
    process, encoding = writing(num_workers)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert said.count("Traceback") == 1, said
    assert said.rstrip().endswith("KeyboardInterrupt")
    assert_ended(encoding)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_worker_ends_the_writing(tmp_path: Path, writing):
    process, encoding = writing(2)
    os.kill(encoding[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "RuntimeError: a worker process that encoded pictures died with exit code -9" in said.splitlines()[-1]
    assert_ended(encoding)
    assert list((tmp_path / "out").iterdir()) == []


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path, writing):
    """Nothing under the name of a data set; the hidden file of such a writing can't be helped."""
    process, encoding = writing(2)
    process.kill()
    process.communicate(timeout=60)
    assert_ended(encoding)
    assert [path for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")] == []


# Reading ------------------------------------------------------------------------------------------------------------

READING = """
import sys
from pathlib import Path
import numpy as np
from arat_dist.data.beton import BetonLoader
from arat_dist.errors import UserError

path, regions = Path(sys.argv[1]), eval(sys.argv[2])
whole = path.read_bytes()
rng = np.random.default_rng(0)
refused = 0
for start, stop in regions:
    for _ in range(int(sys.argv[3])):
        content = bytearray(whole)
        for at in rng.integers(start, stop, rng.integers(1, 4)):
            content[at] ^= 1 << rng.integers(0, 8)
        path.write_bytes(content)
        try:
            with BetonLoader(path, batch_size=40, image_size=16) as loader:
                for batch in loader.iterate([np.arange(loader.num_samples)[:40]]):
                    pass
        except UserError as error:
            refused += 1
            assert str(error).startswith(str(path)) and "\\n" not in str(error), error
print(refused)
"""


def damaged_bytes(path: Path, regions: list[tuple[int, int]], num_tries: int) -> int:
    """Load a file many times, each time with a few bits flipped; how often it was refused.

    In a process of its own: what isn't refused must not crash it either.
    """
    command = [sys.executable, "-c", READING, str(path), repr(regions), str(num_tries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.fixture
def copies(small_beton: Path, large_beton: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Copies of the raw and of the JPEG data set, to damage."""
    for path in (small_beton, large_beton):
        shutil.copy(path, tmp_path)
        shutil.copy(manifest_path(path), tmp_path)
    return tmp_path / small_beton.name, tmp_path / large_beton.name


def test_flipped_bits_in_the_tables(copies: tuple[Path, Path]):
    """Header, descriptions of the fields and of the samples before the pages, sizes behind them."""
    header, fields = 24, 2 * 1041
    for path, num_samples in zip(copies, (37, 13), strict=True):
        rows = header + fields + num_samples * 24
        length = path.stat().st_size
        regions = [(0, header), (header, header + fields), (header + fields, rows), (length - 24 * num_samples, length)]
        assert damaged_bytes(path, regions, num_tries=20) >= 20


def test_flipped_bits_in_a_jpeg(copies: tuple[Path, Path]):
    """Many still are pictures, other ones: the hash tells those."""
    _, path = copies
    start = path.read_bytes().index(b"\xff\xd8\xff")
    assert damaged_bytes(path, [(start, start + 700)], num_tries=60) >= 12
    with pytest.raises(UserError, match=r"large.beton: damaged: SHA-256"):
        check_beton(path, hash=True)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_files(copies: tuple[Path, Path], share: float):
    for path in copies:
        content = path.read_bytes()
        path.write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError, match=r"not a complete .beton") as caught:
            BetonLoader(path, batch_size=4, image_size=32)
        assert "\n" not in str(caught.value)
        with pytest.raises(UserError, match=r"bytes, its manifest says"):
            check_beton(path)
