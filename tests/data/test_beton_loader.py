"""Both loaders: pixels against an independent reference, and the same whatever the threads, batches and ranks."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import active_children
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from beton_pictures import Pictures, smooth_picture
from PIL import Image

from arat_dist.config import DataConfig
from arat_dist.data import augment
from arat_dist.data.beton import BetonLoader
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.fallback import FallbackLoader
from arat_dist.data.loader import Loader, train_loader, val_loader
from arat_dist.data.order import Keys, SampleOrder, eval_shares
from arat_dist.errors import UserError

AnyLoader = type[BetonLoader] | type[FallbackLoader]

MASK = 2**64 - 1
GOLDEN = 0x9E3779B97F4A7C15


@pytest.fixture(params=[BetonLoader, FallbackLoader])
def open_loader(request: pytest.FixtureRequest) -> AnyLoader:
    """FFCV's pictures, or torchvision's."""
    return request.param


def random_word(seed: int, key: int, draw: int) -> int:
    """The counter-based hash, in plain integers."""

    def mix(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & MASK
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & MASK
        return word ^ (word >> 31)

    word = mix((seed + GOLDEN) & MASK)
    word = mix((word + key * GOLDEN) & MASK)
    return mix((word + (draw + 1) * GOLDEN) & MASK)


def pad_crop_flip(picture: np.ndarray, seed: int, key: int, padding: int) -> np.ndarray:
    """Reference: pad with black, cut at the hashed corner, mirror on a hashed bit. uint8 [H,W,3]."""
    side = len(picture)
    padded = np.pad(picture, ((padding, padding), (padding, padding), (0, 0)))
    top, left = (random_word(seed, key, draw) % (2 * padding + 1) for draw in (1, 2))
    cut = padded[top : top + side, left : left + side]
    return cut[:, ::-1] if random_word(seed, key, 0) % 2 else cut


def pixels_by_key(loader: Loader, shares: Sequence[Keys]) -> dict[int, np.ndarray]:
    """Every picture that the loader gives, uint8 [H,W,3], by its key."""
    found = {}
    with loader:
        for batch in loader.iterate(shares):
            images = batch.images.permute(0, 2, 3, 1).clone().numpy()
            found |= dict(zip(batch.keys.tolist(), images, strict=True))
    return found


def assert_same(one: dict[int, np.ndarray], other: dict[int, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for key, image in one.items():
        np.testing.assert_array_equal(image, other[key], err_msg=f"key {key}")


# Pixels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 7, 2**31 - 1])
def test_pad_crop_and_flip_equal_the_reference(open_loader: AnyLoader, small: Pictures, small_beton: Path, seed: int):
    order = SampleOrder(37, 16, 2, seed)
    loader = open_loader(small_beton, batch_size=16, image_size=32, augment="pad_crop", padding=4, flip=True, seed=seed)
    found = pixels_by_key(loader, order.shares(0, 1))
    expected = {key: pad_crop_flip(small.pictures[key % 37], seed, key, padding=4) for key in range(74)}
    assert_same(found, expected)


def test_batches_are_the_shares_in_order(open_loader: AnyLoader, small: Pictures, small_beton: Path):
    shares = [np.array(keys, np.int64) for keys in ([5, 3, 36], [], [40, 3], [0])]
    with open_loader(small_beton, batch_size=3, image_size=32) as loader:
        assert loader.num_samples == 37
        for share, batch in zip(shares, loader.iterate(shares), strict=True):
            assert batch.keys.tolist() == share.tolist()
            assert batch.labels.tolist() == [small.labels[key % 37] for key in share]
            assert (batch.images.dtype, batch.labels.dtype, batch.keys.dtype) == (torch.uint8, torch.int64, torch.int64)
            assert batch.images.shape == (len(share), 3, 32, 32)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            for image, key in zip(batch.images, share, strict=True):
                np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), small.pictures[key % 37])


@pytest.mark.parametrize("kind", ["small", "large"])
def test_same_pixels_for_any_threads_batches_and_ranks(
    open_loader: AnyLoader, kind: str, small_beton: Path, large_beton: Path
):
    def load(threads: int, batch_size: int, world_size: int) -> dict[int, np.ndarray]:
        path, augmentation = (small_beton, "pad_crop") if kind == "small" else (large_beton, "random_resized_crop")
        order = SampleOrder(37 if kind == "small" else 13, batch_size, 2, seed=3)
        found = {}
        for rank in range(world_size):
            loader = open_loader(
                path, batch_size=batch_size, image_size=32, augment=augmentation, flip=True, seed=3, threads=threads
            )
            found |= pixels_by_key(loader, order.shares(rank, world_size))
        return found

    expected = load(threads=1, batch_size=8, world_size=1)
    assert_same(load(threads=2, batch_size=8, world_size=1), expected)
    assert_same(load(threads=3, batch_size=11, world_size=3), expected)


@pytest.mark.parametrize("kind", ["small", "large"])
def test_two_epochs_and_two_seeds_give_different_crops(
    open_loader: AnyLoader, kind: str, small_beton: Path, large_beton: Path
):
    path, augmentation, num = (
        (small_beton, "pad_crop", 37) if kind == "small" else (large_beton, "random_resized_crop", 13)
    )
    found = [
        pixels_by_key(
            open_loader(path, batch_size=2 * num, image_size=32, augment=augmentation, seed=seed),
            [np.arange(2 * num)],
        )
        for seed in (0, 1)
    ]
    same_epoch = sum(np.array_equal(found[0][key], found[0][key + num]) for key in range(num))
    same_seed = sum(np.array_equal(found[0][key], found[1][key]) for key in range(num))
    # 81 places of pad_crop: one or two of 37 may coincide.
    assert same_epoch <= 3
    assert same_seed <= 3


def test_flips_are_half_and_shifts_uniform():
    keys = range(20_000)
    assert abs(np.mean([augment.is_flipped(5, key) for key in keys]) - 0.5) < 0.02
    shifts = np.array([augment.shift(5, key, 4) for key in keys])
    assert shifts.min() == -4
    assert shifts.max() == 4
    counts = np.bincount((shifts[:, 0] + 4) * 9 + shifts[:, 1] + 4, minlength=81)
    # Chi-squared with 80 degrees of freedom: 1 in 10^5 at 143.
    assert ((counts - 20_000 / 81) ** 2 / (20_000 / 81)).sum() < 143


def test_random_boxes_stay_inside_and_have_the_asked_area():
    areas = []
    for key in range(3000):
        height, width = 20 + key % 97, 20 + key * 7 % 91
        top, left, rows, columns = augment.random_resized_box(1, key, height, width, 0.08, 1.0)
        assert min(top, left) >= 0
        assert min(rows, columns) >= 1
        assert top + rows <= height
        assert left + columns <= width
        areas.append(rows * columns / (height * width))
    assert 0.06 < min(areas) < 0.12
    assert max(areas) > 0.9
    # A picture too long for any box of the whole area: the largest one in the middle.
    assert augment.random_resized_box(1, 0, 30, 300, 1.0, 1.0) == (0, 130, 30, 40)
    assert augment.random_resized_box(1, 0, 300, 30, 1.0, 1.0) == (130, 0, 40, 30)


def resized(picture: np.ndarray, top: int, left: int, rows: int, columns: int, side: int) -> np.ndarray:
    """Reference: PIL's resize of a box, uint8 [side,side,3]."""
    box = (left, top, left + columns, top + rows)
    return np.asarray(Image.fromarray(picture).resize((side, side), Image.Resampling.BILINEAR, box=box))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """JPEG and another filter: alike on smooth pictures, not equal."""
    assert np.abs(found.astype(int) - expected).mean() < 2


def test_random_resized_crop_shows_its_box(open_loader: AnyLoader, large: Pictures, large_beton: Path):
    loader = open_loader(large_beton, batch_size=13, image_size=48, augment="random_resized_crop", flip=True, seed=9)
    for key, image in pixels_by_key(loader, [np.arange(13), np.arange(13, 26)]).items():
        picture = large.pictures[key % 13]
        box = augment.random_resized_box(9, key, *picture.shape[:2], 0.08, 1.0)
        expected = resized(picture, *map(int, box), side=48)
        assert_close(image, expected[:, ::-1] if random_word(9, key, 0) % 2 else expected)


@pytest.mark.parametrize("threads", [1, 2])
def test_a_visit_at_another_size_is_that_of_a_loader_of_that_size(
    open_loader: AnyLoader, large_beton: Path, threads: int
):
    """Sizes may change from any batch to the next, and back: a small batch leaves nothing in the large one's buffer."""
    sides = [40, 24, 24, 56, 24, 40, 56, 56, 24, 40]
    shares = list(np.arange(len(sides) * 5, dtype=np.int64).reshape(-1, 5))
    settings: dict[str, Any] = {"batch_size": 5, "augment": "random_resized_crop", "flip": True, "seed": 4}
    loader = open_loader(large_beton, image_size=40, sides=(24, 56), threads=threads, **settings)
    with loader:
        for share, side, batch in zip(shares, sides, loader.iterate(shares, sides.__getitem__), strict=True):
            assert batch.images.shape == (5, 3, side, side)
            assert batch.images.is_contiguous(memory_format=torch.channels_last)
            found = dict(zip(share.tolist(), batch.images.permute(0, 2, 3, 1).clone().numpy(), strict=True))
            assert_same(found, pixels_by_key(open_loader(large_beton, image_size=side, **settings), [share]))
        assert next(iter(loader.iterate([np.arange(3)]))).images.shape == (3, 3, 40, 40)


def test_pictures_taken_whole_are_so_at_other_sizes(open_loader: AnyLoader, tmp_path: Path):
    pictures = [smooth_picture(np.random.default_rng(seed), 32, 32) for seed in range(4)]
    write_beton(Pictures(pictures, [0, 1, 2, 0]), tmp_path / "whole.beton")
    with open_loader(tmp_path / "whole.beton", batch_size=4, image_size=32, sides=[20], val_crop=0.5) as loader:
        same, small = (
            batch.images.permute(0, 2, 3, 1).clone().numpy()
            for batch in loader.iterate([np.arange(4)] * 2, [32, 20].__getitem__)
        )
    np.testing.assert_array_equal(same, pictures)
    for found, picture in zip(small, pictures, strict=True):
        assert_close(found, resized(picture, 0, 0, 32, 32, 20))


def test_centre_boxes():
    assert augment.centre_box(100, 200, 0.875) == (6, 56, 88, 88)
    assert augment.centre_box(33, 32, 1.0) == (0, 0, 32, 32)
    assert augment.centre_box(3, 900, 0.1) == (1, 449, 1, 1)


def test_validation_takes_the_centre(open_loader: AnyLoader, large: Pictures, large_beton: Path):
    loader = open_loader(large_beton, batch_size=13, image_size=48, val_crop=0.5)
    for key, image in pixels_by_key(loader, eval_shares(13, 13, 0, 1)).items():
        height, width = large.pictures[key].shape[:2]
        side = round(0.5 * min(height, width))
        expected = resized(large.pictures[key], (height - side) // 2, (width - side) // 2, side, side, side=48)
        assert_close(image, expected)


def test_pictures_of_the_right_size_are_taken_as_they_are(small: Pictures, small_beton: Path):
    """Also for validation, whatever val_crop says."""
    data = DataConfig(train=str(small_beton), val=str(small_beton), num_classes=3, image_size=32)
    with val_loader(data, batch_size=10) as loader:
        batches = loader.iterate(eval_shares(37, 10, 0, 1))
        images = torch.cat([batch.images.clone() for batch in batches])
    np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), np.stack(small.pictures))


def test_train_loader_follows_the_recipe(small: Pictures, small_beton: Path):
    data = DataConfig(
        train=str(small_beton), val="x.beton", num_classes=3, image_size=32, augment="pad_crop", padding=2, flip=False
    )
    with train_loader(data, seed=4, max_share=6) as loader:
        batch = next(iter(loader.iterate([np.arange(6)])))
        top, left = (random_word(4, 5, draw) % 5 for draw in (1, 2))
        padded = np.pad(small.pictures[5], ((2, 2), (2, 2), (0, 0)))
        image = batch.images[5].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(image, padded[top : top + 32, left : left + 32])


# Threads ------------------------------------------------------------------------------------------------------------


def test_a_batch_holds_until_the_next_is_asked_for(open_loader: AnyLoader, small: Pictures, small_beton: Path):
    """The ring goes on filling meanwhile; it must not reach the consumer's buffer."""
    with open_loader(small_beton, batch_size=4, image_size=32) as loader:
        shares = [np.arange(start, start + 4) % 37 for start in range(40)]
        for share, batch in zip(shares, loader.iterate(shares), strict=True):
            time.sleep(0.005)
            images = batch.images.permute(0, 2, 3, 1).numpy()
            np.testing.assert_array_equal(images, np.stack([small.pictures[key] for key in share]))


@pytest.mark.parametrize(("open_loader", "times"), [(BetonLoader, 1000), (FallbackLoader, 10)])
def test_early_breaks_leave_no_thread_and_no_process(open_loader: AnyLoader, times: int, small_beton: Path):
    num_threads, others = threading.active_count(), set(active_children())
    with open_loader(small_beton, batch_size=4, image_size=32, threads=2) as loader:
        order = SampleOrder(37, 4, 100, seed=0)
        next(iter(loader.iterate(order.shares(0, 1))))
        pool = threading.active_count() if open_loader is BetonLoader else num_threads
        for _ in range(times):
            for _batch in loader.iterate(order.shares(0, 1)):
                break
        # The queues of a process that has been told to end live on for an instant.
        assert_soon(lambda: threading.active_count() <= pool and set(active_children()) <= others)
    assert_soon(lambda: threading.active_count() <= num_threads)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beton")]


def assert_soon(is_so: Callable[[], bool]) -> None:
    """Wait for something that takes an instant, ten seconds at most."""
    end = time.monotonic() + 10
    while not is_so() and time.monotonic() < end:
        time.sleep(0.01)
    assert is_so()


def test_close_ends_a_loop_that_is_under_way(open_loader: AnyLoader, small_beton: Path):
    loader = open_loader(small_beton, batch_size=4, image_size=32)
    batches = loader.iterate(SampleOrder(37, 4, 100, seed=0).shares(0, 1))
    next(batches)
    loader.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("beton")]
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


def test_torch_keeps_its_thread_count(small_beton: Path):
    """On import too, so in a process of its own; and in the loader's threads, as a share finds it."""
    code = """
import sys, numpy, torch
torch.set_num_threads(3)
from arat_dist.data.beton import BetonLoader
print(torch.get_num_threads())
class Shares(list):
    def __getitem__(self, index):
        print(torch.get_num_threads())
        return super().__getitem__(index)
with BetonLoader(sys.argv[1], batch_size=4, image_size=32, threads=2) as loader:
    print(torch.get_num_threads())
    for batch in loader.iterate(Shares([numpy.arange(4)])):
        print(torch.get_num_threads())
print(torch.get_num_threads())
"""
    run = subprocess.run([sys.executable, "-c", code, small_beton], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["3"] * 5


# Errors -------------------------------------------------------------------------------------------------------------


class FailingShares(Sequence[Keys]):
    """The third share can't be made."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index) -> Any:
        if index == 2:
            raise IndexError("no such share")
        return np.arange(4)


def test_an_error_in_the_thread_reaches_the_consumer(open_loader: AnyLoader, small_beton: Path):
    with open_loader(small_beton, batch_size=4, image_size=32) as loader:
        batches = loader.iterate(FailingShares())
        next(batches)
        next(batches)
        with pytest.raises(IndexError, match="no such share"):
            next(batches)
        too_large = loader.iterate([np.arange(5)])
        with pytest.raises(ValueError, match="5 pictures: the loader's batch_size is 4"):
            next(too_large)


@pytest.fixture
def damaged(large_beton: Path, tmp_path: Path) -> Path:
    """A beton in which the bytes of picture 5 are no JPEG any more."""
    path = tmp_path / "damaged.beton"
    shutil.copy(large_beton, path)
    content = bytearray(path.read_bytes())
    starts = [at for at in range(len(content) - 3) if content[at : at + 3] == b"\xff\xd8\xff"]
    content[starts[5] : starts[5] + 64] = bytes(64)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("threads", [1, 2])
def test_a_damaged_picture_is_named(open_loader: AnyLoader, damaged: Path, threads: int):
    with open_loader(damaged, batch_size=13, image_size=32, threads=threads) as loader:
        batches = loader.iterate([np.arange(5), np.arange(13)])
        next(batches)
        with pytest.raises(UserError, match=r"damaged.beton: picture 5 can't be decoded"):
            next(batches)


def test_a_truncated_file_is_not_opened(open_loader: AnyLoader, small_beton: Path, tmp_path: Path):
    """FFCV would read behind its end."""
    path = tmp_path / "short.beton"
    content = small_beton.read_bytes()
    for length in (0, 10, 3000, len(content) // 2, len(content) - 24):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"short.beton: not a complete .beton"):
            open_loader(path, batch_size=4, image_size=32)


def test_a_table_that_points_behind_the_end_is_refused(open_loader: AnyLoader, small_beton: Path, tmp_path: Path):
    path = tmp_path / "wild.beton"
    path.write_bytes(small_beton.read_bytes()[:-8] + (2**40).to_bytes(8, "little"))
    with pytest.raises(UserError, match=r"wild.beton: not a complete .beton"):
        open_loader(path, batch_size=4, image_size=32)


def test_pad_crop_refuses_other_sizes(open_loader: AnyLoader, small_beton: Path):
    with pytest.raises(UserError, match="pad_crop needs pictures of 28x28"):
        open_loader(small_beton, batch_size=4, image_size=28, augment="pad_crop")


def test_code_that_can_not_be_kept_is_compiled_anyway():
    """Where no folder can be written, numba refuses to cache; a function without a file is refused likewise."""
    scope: dict = {}
    exec("def double(x):\n    return 2 * x", scope)
    assert augment._compiled(scope["double"])(21) == 42


def test_smooth_pictures_survive_jpeg(large: Pictures):
    """The closeness asked for above would catch a wrong box: neighbouring boxes differ by more."""
    picture = smooth_picture(np.random.default_rng(2), 200, 150)
    with pytest.raises(AssertionError):
        assert_close(resized(picture, 0, 0, 100, 100, 48), resized(picture, 20, 20, 100, 100, 48))


def test_without_ffcv_one_line_says_what_to_do(small_beton: Path, tmp_path: Path):
    """In a process of its own: this one has imported it."""
    code = """
import sys
sys.modules["ffcv"] = None
import numpy as np
from arat_dist.config import DataConfig
from arat_dist.data.loader import loader_class, val_loader
from launcher.cli import main
beton, out = sys.argv[1:]
assert main(["data", "write", "digits:val", out]) == 2
data = DataConfig(train=beton, val=beton, num_classes=3, image_size=32)
try:
    loader_class(data)
except ValueError as error:
    print(error, file=sys.stderr)
with val_loader(data.model_copy(update={"loader": "torchvision"}), 4) as loader:
    print(type(loader).__name__, next(iter(loader.iterate([np.arange(4)]))).labels.tolist())
"""
    command = [sys.executable, "-c", code, str(small_beton), str(tmp_path / "out.beton")]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stderr.splitlines() if "ffcv: can't be imported" in line]
    assert len(lines) == 2
    assert all(line.endswith("`make setup` installs it, data.loader: torchvision reads without it") for line in lines)
    assert run.stdout.startswith("FallbackLoader [")


def test_the_other_loader_decodes_jpegs_alike(large_beton: Path):
    """The same boxes and flips: only rounding and filters differ, on smooth pictures by a grey level or two."""
    settings: Any = {"batch_size": 13, "image_size": 48, "augment": "random_resized_crop", "flip": True, "seed": 9}
    shares = [np.arange(13), np.arange(13, 26)]
    found = pixels_by_key(FallbackLoader(large_beton, **settings), shares)
    for key, image in pixels_by_key(BetonLoader(large_beton, **settings), shares).items():
        assert_close(found[key], image)


def test_memory_stays_flat_over_two_hundred_epochs(small_beton: Path):
    with BetonLoader(small_beton, batch_size=8, image_size=32, augment="pad_crop", flip=True, threads=2) as loader:
        order = SampleOrder(37, 8, 400, seed=0)
        resident = []
        for epoch in range(200):
            steps = epoch * order.num_steps // 400
            for _batch in loader.iterate(order.shares(0, 1, steps, steps + 5)):
                pass
            resident.append(resident_bytes())
    # The first epochs fill pools of memory; 100 kB a batch would show as 16 MB and more.
    assert max(resident[150:]) - max(resident[20:50]) < 4 * 2**20


def resident_bytes() -> int:
    """Memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
