"""Checkpoints: what goes in comes out, what is damaged is passed over, and no crash loses the older good one."""

import errno
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from arat_dist.checkpoint import (
    MANIFEST,
    Checkpoint,
    DamagedError,
    best_checkpoint,
    checkpoint_names,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from arat_dist.errors import SupersededError
from arat_dist.storage import Storage

FILES = ["about.json", "ema.safetensors", MANIFEST, "model.safetensors", "optimizer.pt", "progress.safetensors"]


def make(step: int, **about: Any) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    strided = torch.randn(2, 3, 4, 4, generator=generator).contiguous(memory_format=torch.channels_last)
    model = {"conv": strided, "count": torch.tensor([step, 7]), "weight": torch.tensor(0.25, dtype=torch.float64)}
    momentum = torch.randn(2, 3, 4, 4, generator=generator)
    optimizer = {"state": {0: {"momentum_buffer": momentum}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    progress = {"line.sums": torch.arange(6.0).view(2, 3) + step}
    return Checkpoint(
        step, {"model": model, "ema": {"conv": strided * 2}}, optimizer, progress, {"skipped": 3, **about}
    )


def assert_is(checkpoint: Checkpoint | None, step: int) -> None:
    assert checkpoint is not None
    expected = make(step)
    assert checkpoint.step == step
    assert set(checkpoint.weights) == set(expected.weights)
    for part, state in expected.weights.items():
        assert set(checkpoint.weights[part]) == set(state)
        for name, value in state.items():
            assert checkpoint.weights[part][name].dtype == value.dtype
            assert torch.equal(checkpoint.weights[part][name], value)
    momentum = checkpoint.optimizer["state"][0]["momentum_buffer"]
    assert torch.equal(momentum, expected.optimizer["state"][0]["momentum_buffer"])
    assert checkpoint.optimizer["param_groups"] == expected.optimizer["param_groups"]
    assert torch.equal(checkpoint.progress["line.sums"], expected.progress["line.sums"])
    assert checkpoint.about["skipped"] == 3


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    return Storage(str(tmp_path / "checkpoints"))


def test_what_goes_in_comes_out(folder):
    assert load_newest(folder) is None
    name = save_checkpoint(folder, make(12), keep=2)
    assert (folder / name).names() == FILES
    assert_is(load_newest(folder), 12)
    bare = load_newest(folder, with_optimizer=False)
    assert bare is not None
    assert bare.optimizer == {}


def test_on_an_object_store_too():
    folder = Storage("memory://checkpoints-test")
    for step in (5, 10, 15):
        save_checkpoint(folder, make(step), keep=2)
    assert checkpoint_names(folder) == ["step_00000010", "step_00000015"]
    assert_is(load_newest(folder), 15)


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_few_are_kept(folder, keep):
    for step in (5, 100, 20, 200):
        save_checkpoint(folder, make(step), keep=99 if step == 5 else keep)
    assert checkpoint_names(folder)[-1] == "step_00000200"
    for step in (300, 400, 500):
        save_checkpoint(folder, make(step), keep=keep)
    assert checkpoint_names(folder) == [f"step_{step:08d}" for step in (300, 400, 500)[-keep:]]


def test_keeping_counts_whole_checkpoints_only_and_never_drops_the_new_one(folder):
    """After a crash amid step 20 the run goes on from 10, perhaps with checkpoints at other steps."""
    save_checkpoint(folder, make(10), keep=1)
    (folder / "step_00000020").write("model.safetensors", b"partial")
    save_checkpoint(folder, make(15), keep=1)
    assert_is(load_newest(folder), 15)

    (folder / "step_00000017").write("model.safetensors", b"partial")
    save_checkpoint(folder, make(18), keep=2)
    (folder / "step_00000018").delete("optimizer.pt")
    assert_is(load_newest(folder), 15)


def test_a_run_that_went_back_deletes_only_what_lies_before_and_writes_over_what_lies_beyond(folder, monkeypatch):
    """What couldn't be read at its start may be good again tomorrow; from a first new file on it is nothing."""
    for step in (10, 20, 30):
        save_checkpoint(folder, make(step), keep=9)
    save_checkpoint(folder, make(15), keep=1)
    assert checkpoint_names(folder) == [f"step_{step:08d}" for step in (15, 20, 30)]
    (folder / "step_00000020").write("model.safetensors", b"damaged")

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(folder, make(20), keep=1)
    assert not (folder / "step_00000020").exists(MANIFEST)
    save_checkpoint(folder, make(20), keep=1)
    assert checkpoint_names(folder) == ["step_00000020", "step_00000030"]
    assert_is(load_checkpoint(folder / "step_00000020"), 20)


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_a_damaged_one_is_named_and_passed_over(folder, file, damage, caplog):
    save_checkpoint(folder, make(10), keep=3)
    save_checkpoint(folder, make(20), keep=3)
    newest = folder / "step_00000020"
    content = newest.read(file)
    newest.delete(file)
    half = len(content) // 2
    damaged = {"flip": content[:half] + bytes([content[half] ^ 4]) + content[half + 1 :], "cut": content[:half]}
    if damage != "gone":
        newest.write(file, damaged.get(damage, b""))
    with caplog.at_level(logging.WARNING):
        assert_is(load_newest(folder), 10)
    assert "damaged" in caplog.text
    # A bit flipped within the manifest's hashes shows at the file that they are for.
    assert f"step_00000020/{'' if (file, damage) == (MANIFEST, 'flip') else file}" in caplog.text


@pytest.mark.parametrize(
    "manifest",
    [
        *("[]", "null", "3", "{}", '{"step": "x", "sha256": {}}', '{"step": 20, "sha256": {}}', '{"step": 20}'),
        '{"step": 1e999, "sha256": {}}',
    ],
)
def test_a_manifest_of_another_shape_is_passed_over(folder, manifest):
    save_checkpoint(folder, make(10), keep=3)
    save_checkpoint(folder, make(20), keep=3)
    (folder / "step_00000020").write(MANIFEST, manifest.encode())
    assert_is(load_newest(folder), 10)


def test_no_flipped_bit_of_the_manifest_gives_another_state(folder, caplog):
    caplog.set_level(logging.ERROR)
    save_checkpoint(folder, make(12), keep=1)
    target = folder / "step_00000012"
    content = target.read(MANIFEST)
    (Path(target.uri) / MANIFEST).unlink()
    for position in range(len(content)):
        for bit in (0, 1, 2, 4, 5):
            flipped = bytearray(content)
            flipped[position] ^= 1 << bit
            (Path(target.uri) / MANIFEST).write_bytes(flipped)
            found = load_newest(folder, with_optimizer=False)
            assert found is None or (found.step == 12 and set(found.weights) == {"model", "ema"}), bytes(flipped)
            assert found is None or found.about == {"skipped": 3}


def test_the_best_one_is_kept_besides_the_newest(folder):
    accuracies = {10: 0.3, 20: 0.5, 30: 0.5, 40: None, 50: 0.4, 60: None}
    for step, accuracy in accuracies.items():
        save_checkpoint(folder, make(step, **({} if accuracy is None else {"robust_accuracy": accuracy})), keep=1)
    # The newer of equals.
    assert checkpoint_names(folder) == ["step_00000030", "step_00000060"]
    assert best_checkpoint(folder) == "step_00000030"
    save_checkpoint(folder, make(70, robust_accuracy=0.6), keep=1)
    assert checkpoint_names(folder) == ["step_00000070"]
    assert best_checkpoint(folder) == "step_00000070"


def test_a_full_disk_leaves_the_one_before_and_nothing_of_the_new_one(folder, monkeypatch):
    """At any file: as the system says it, in the midst of a write."""
    write = Storage.write
    for fail_at in range(len(FILES)):
        save_checkpoint(folder, make(10), keep=1)
        calls = 0

        def failing(self, name, content, fail_at=fail_at):
            nonlocal calls
            calls += 1
            if calls > fail_at:
                raise OSError(errno.ENOSPC, "No space left on device")
            write(self, name, content)

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write", failing)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(folder, make(20), keep=1)
        assert checkpoint_names(folder) == ["step_00000010"]
        assert_is(load_newest(folder), 10)


def test_what_the_check_raises_ends_a_save_before_it_is_one(folder):
    """A process that was cut off finds that others have gone on: it neither finishes nor deletes."""
    save_checkpoint(folder, make(10), keep=1)
    for end_at in range(len(FILES) + 1):
        calls = 0

        def check(end_at=end_at):
            nonlocal calls
            calls += 1
            if calls > end_at:
                raise SupersededError("others are at work")

        with pytest.raises(SupersededError):
            save_checkpoint(folder, make(20), keep=1, check=check)
        assert_is(load_newest(folder), 10)
    save_checkpoint(folder, make(20), keep=1)
    assert_is(load_newest(folder), 20)


def test_who_was_overtaken_deletes_nothing_that_others_may_rely_on(folder, monkeypatch):
    """Neither the checkpoint before, once its own is whole, nor, when a write fails, the folder that is theirs now."""
    save_checkpoint(folder, make(10), keep=1)
    calls = 0

    def check():
        nonlocal calls
        calls += 1
        if calls > len(FILES) + 1:
            raise SupersededError("others are at work")

    with pytest.raises(SupersededError):
        save_checkpoint(folder, make(20), keep=1, check=check)
    assert checkpoint_names(folder) == ["step_00000010", "step_00000020"]

    write = Storage.write

    def overtaken(self, name, content):
        monkeypatch.setattr(Storage, "write", write)
        save_checkpoint(folder, make(30), keep=1)  # by the others
        nonlocal calls
        calls = 100
        raise OSError(errno.ESTALE, "Stale file handle")

    calls = 0
    monkeypatch.setattr(Storage, "write", overtaken)
    with pytest.raises(SupersededError):
        save_checkpoint(folder, make(30), keep=1, check=check)
    assert_is(load_newest(folder), 30)


def test_a_save_whose_retirement_fails_is_one_all_the_same(folder, monkeypatch, caplog):
    """The next one makes up for it."""
    save_checkpoint(folder, make(10), keep=1)
    delete = Storage.delete

    def busy(self, name):
        if name.startswith("step_"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        delete(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "delete", busy)
        assert save_checkpoint(folder, make(20), keep=1) == "step_00000020"
    assert "older checkpoints can't be retired now: " in caplog.text
    assert checkpoint_names(folder) == ["step_00000010", "step_00000020"]
    save_checkpoint(folder, make(30), keep=1)
    assert checkpoint_names(folder) == ["step_00000030"]


@pytest.mark.parametrize("file", [MANIFEST, "about.json"])
def test_the_best_one_is_not_retired_because_it_cannot_be_read_for_a_moment(folder, monkeypatch, file):
    save_checkpoint(folder, make(10, robust_accuracy=0.5), keep=1)
    save_checkpoint(folder, make(20, robust_accuracy=0.4), keep=1)
    read = Storage.read

    def failing(self, name):
        if self.path(name).endswith(f"step_00000010/{file}"):
            raise OSError(errno.EIO, "Input/output error")
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(Storage, "read", failing)
        save_checkpoint(folder, make(30), keep=1)
    save_checkpoint(folder, make(40), keep=1)
    assert checkpoint_names(folder) == ["step_00000010", "step_00000040"]


def test_a_crash_at_any_write_of_a_save_loses_nothing(folder, monkeypatch):
    write, delete = Storage.write, Storage.delete
    for crash_at in range(20):
        for name in checkpoint_names(folder):
            folder.delete(name)
        save_checkpoint(folder, make(10), keep=1)
        calls = 0

        def crashing(operation, *args, crash_at=crash_at):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt
            operation(*args)

        monkeypatch.setattr(Storage, "write", lambda *args: crashing(write, *args))
        monkeypatch.setattr(Storage, "delete", lambda *args: crashing(delete, *args))
        try:
            save_checkpoint(folder, make(20), keep=1)
            crashed = False
        except KeyboardInterrupt:
            crashed = True
        monkeypatch.setattr(Storage, "write", write)
        monkeypatch.setattr(Storage, "delete", delete)
        newest = load_newest(folder)
        assert newest is not None
        assert_is(newest, newest.step)
        # The next attempt writes the same step over whatever lies there.
        save_checkpoint(folder, make(20), keep=1)
        assert_is(load_newest(folder), 20)
        assert checkpoint_names(folder) == ["step_00000020"]
        if not crashed:
            assert crash_at >= 5
            return
    raise AssertionError("never got through")


def test_a_pickle_with_code_is_refused_and_not_run(folder, tmp_path):
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (marker,)

    save_checkpoint(folder, make(10), keep=1)
    target = folder / "step_00000010"
    torch.save({"state": Evil()}, tmp_path / "evil.pt")
    content = (tmp_path / "evil.pt").read_bytes()
    target.write("optimizer.pt", content)
    manifest = json.loads(target.read(MANIFEST))
    manifest["sha256"]["optimizer.pt"] = hashlib.sha256(content).hexdigest()
    target.write_json(MANIFEST, manifest)
    with pytest.raises(DamagedError, match=r"optimizer\.pt: holds more than tensors and plain values"):
        load_checkpoint(target)
    save_checkpoint(folder, make(5), keep=2)
    assert_is(load_newest(folder), 5)
    assert not marker.exists()
    torch.load(tmp_path / "evil.pt", weights_only=False)
    assert marker.exists()  # it would have run
