"""What happens to machines and networks, done for real: the run goes on, and no sample is lost or seen twice."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from driver import NUM_STEPS, TWO, Driver, Outcome
from nodes import Machines
from small import marked_processes, note_equal

pytestmark = pytest.mark.slow

Start = Callable[..., Driver]


@pytest.fixture
def start(machines: Machines) -> Iterator[Start]:
    """Starts runs on the machines, and has them gone at the end."""
    drivers: list[Driver] = []

    def start(name: str, overrides: dict[str, str]) -> Driver:
        drivers.append(Driver(machines, name, overrides))
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.end()


def check_whole(driver: Driver, summary: dict[str, Any], num_steps: int = NUM_STEPS) -> None:
    """Every step was counted once, and so was every sample."""
    assert (summary["steps"], summary["samples_seen"]) == (num_steps, num_steps * 32)
    steps = driver.steps()
    assert steps == sorted(set(steps))
    assert set(range(2, num_steps + 1, 2)) <= set(steps)


def check_equal(driver: Driver, calm: Outcome, record: Callable[[str, object], None]) -> None:
    """The same weights, bit for bit, and the same losses, as without the failure: so no sample more and none less."""
    outcome = driver.outcome()
    assert [key for key, value in calm.weights.items() if not torch.equal(value, outcome.weights[key])] == []
    assert outcome.losses == calm.losses != {}
    note_equal(record)


def note_times(record: Callable[[str, object], None], driver: Driver, since: float) -> None:
    """For the line at the end: what belongs in a table of failures."""
    for key, value in driver.times(since).items():
        record(key, value)


@pytest.mark.failure("a machine dies without grace")
def test_a_machine_dies_without_grace(machines: Machines, start: Start, calm: Outcome, record_property):
    machines.add(2)
    dying = machines.add(1)
    driver = start("bereft", TWO)
    driver.wait_for_step(24)
    since = time.time()
    machines.kill(dying)
    summary = driver.summary()
    note_times(record_property, driver, since)
    assert summary["restarts"] >= 1
    assert driver.lines("attempts.jsonl")[-1]["step"] >= 20
    check_whole(driver, summary)
    check_equal(driver, calm, record_property)


@pytest.mark.failure("the network of a machine is cut")
def test_the_network_of_a_machine_fails(machines: Machines, start: Start, calm: Outcome, record_property):
    machines.add(2)
    lonely = machines.add(1)
    driver = start("parted", TWO)
    driver.wait_for_step(24)
    assert any("RayTrainWorker" in line for line in lonely.processes().values())
    since = time.time()
    machines.unplug(lonely)
    summary = driver.summary()
    note_times(record_property, driver, since)
    assert summary["restarts"] >= 1
    check_whole(driver, summary)
    check_equal(driver, calm, record_property)
    # Cut off from the others, its workers end by themselves: nobody could tell them to.
    deadline = time.monotonic() + 120
    while (left := [line for line in lonely.processes().values() if "RayTrainWorker" in line]) and (
        time.monotonic() < deadline
    ):
        time.sleep(0.5)
    assert left == []
    # And what they had written until then changed nothing.
    check_whole(driver, summary)


@pytest.mark.failure("a machine is to go (Ray's drain notice)")
def test_a_machine_is_to_go(machines: Machines, start: Start, calm: Outcome, record_property):
    """A drain notice costs no step and counts as no failure."""
    machines.add(2)
    leaving = machines.add(1)
    driver = start("drained", TWO | {"cluster.max_failures": "0", "train.checkpoint_every": "1000"})
    driver.wait_for_step(24)
    since = time.time()
    machines.drain(leaving, seconds=600)
    driver.wait_for_attempt(2)
    before = driver.lines("attempts.jsonl")
    assert not any("RayTrainWorker" in line for line in leaving.processes().values())
    machines.kill(leaving)
    summary = driver.summary()
    note_times(record_property, driver, since)
    assert len(before) == 2
    # Checkpoints on schedule are far apart: this one was written because of the notice.
    assert before[1]["step"] >= 24
    check_whole(driver, summary)
    check_equal(driver, calm, record_property)


@pytest.mark.failure("a machine dies and another comes, cluster.workers [1, 2]")
def test_the_group_shrinks_and_grows(machines: Machines, start: Start, record_property):
    """Two workers, one, two again: the global batch stays, and growing repeats no step."""
    machines.add(1)
    dying = machines.add(1)
    num_steps = 1500
    driver = start(
        "elastic",
        {
            "cluster.workers": "[1, 2]",
            "cluster.resize_every_s": "2",
            "train.max_steps": str(num_steps),
            "train.checkpoint_every": "50",
            "train.epochs": "50",
        },
    )
    driver.wait_for_step(60)
    since = time.time()
    machines.kill(dying)
    driver.wait_for_attempt(2)
    for key, value in driver.times(since).items():
        record_property(f"shrunk: {key}", value)
    driver.wait_for_step(driver.lines("attempts.jsonl")[1]["step"] + 20)
    since = time.time()
    machines.add(1)
    driver.wait_for(lambda: "other size" in driver.stderr, "the wish to grow")
    grown_at = max(driver.steps())
    driver.wait_for_attempt(3)
    record_property("grown: resumed after", driver.times(since)["resumed after"])
    summary = driver.summary()
    sizes = [attempt["world_size"] for attempt in driver.lines("attempts.jsonl")]
    record_property("sizes", sizes)
    assert sizes == [2, 1, 2]
    # It goes on where the smaller group stopped, not at the newest checkpoint of every fiftieth step.
    assert driver.lines("attempts.jsonl")[2]["step"] >= grown_at
    check_whole(driver, summary, num_steps)


@pytest.mark.failure("no machine has room for the workers")
def test_no_machine_has_room(machines: Machines, start: Start, record_property):
    machines.add(1)
    for name, workers in (("fixed", "3"), ("elastic", "[2, 3]")):
        driver = start(name, TWO | {"cluster.workers": workers, "cluster.start_timeout_s": "10"})
        since = time.time()
        last = driver.failure()
        record_property(f"{name}: told after", f"{time.time() - since:.1f} s")
        assert last.startswith(f"arat: cluster.workers: {3 if name == 'fixed' else 2}: of 1 CPU each")
        assert "no room for them in 10 s (cluster.start_timeout_s); free are 1 of 1 CPU" in last
        assert "Traceback" not in driver.stderr
    assert marked_processes("RayTrainWorker") == {}
