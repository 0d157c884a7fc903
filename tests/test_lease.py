"""One process at a time in a run of an object store: fsspec's store in memory stands for one."""

import threading
import uuid
from collections.abc import Iterator

import pytest

from arat_dist import lease
from arat_dist.errors import UserError
from arat_dist.lease import LEASE, Lease
from arat_dist.run import Run
from arat_dist.storage import Storage


@pytest.fixture
def run(monkeypatch) -> Iterator[Run]:
    for name, seconds in (("RENEW_S", 0.05), ("PATIENCE_S", 0.6), ("_SETTLE_S", 0.1)):
        monkeypatch.setattr(lease, name, seconds)
    storage = Storage(f"memory://{uuid.uuid4().hex}")
    yield Run(storage.uri, "one")
    storage.delete("one")


def test_the_second_is_refused_and_the_next_is_not(run):
    for _ in range(2):
        with run.locked():
            with pytest.raises(UserError, match=r"^--name: one: another process trains"), run.locked():
                raise AssertionError("two at once")
            assert run.folder.exists(LEASE)
        assert not run.folder.exists(LEASE)


def test_a_lease_that_nobody_renews_is_taken_over(run, caplog):
    run.folder.write_json(LEASE, {"token": "dead", "count": 7})
    with caplog.at_level("INFO"), run.locked():
        assert run.folder.read_json(LEASE)["token"] != "dead"
    assert "one: was left without an end, or is at work elsewhere: 0.6 s will tell" in caplog.text


def test_of_two_that_start_together_one_holds_it(run):
    both, held, refused = threading.Barrier(2), [], []

    def hold() -> None:
        both.wait()
        try:
            with Lease(run.folder, "one"):
                held.append(1)
                threading.Event().wait(1)
        except UserError:
            refused.append(1)

    threads = [threading.Thread(target=hold) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (held, refused) == ([1], [1])


def test_a_lease_is_renewed(run):
    with run.locked():
        counts = []
        while len(set(counts)) < 3:
            counts.append(run.folder.read_json(LEASE)["count"])
    assert counts == sorted(counts)


def test_who_was_overtaken_takes_nothing_back_and_nothing_away(run, caplog):
    with run.locked():
        run.folder.write_json(LEASE, {"token": "other", "count": 1})
        while "another process has taken the run over" not in caplog.text:
            threading.Event().wait(0.01)
    assert run.folder.read_json(LEASE) == {"token": "other", "count": 1}
