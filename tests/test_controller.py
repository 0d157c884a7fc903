"""What is added to Ray Train's controller, without a cluster: sizes, patience, who is asked to stop and when."""

import ast
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from arat_dist.config import ClusterConfig
from arat_dist.errors import ClusterError, StoppedError, UserError
from launcher import ray_parts
from launcher.cluster import _first_failure, connect, stop_on_sigterm

# Ray reads its settings when it is imported: not before the first test, and as `connect` has them.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")

ROOM = {"a": {"CPU": 2.0}, "b": {"CPU": 3.0}, "c": {"CPU": 1.0}}
"""Free resources by node."""


@pytest.fixture
def controller(monkeypatch) -> Any:
    """The module, in a cluster of three nodes of which none is about to go; its clock stands still."""
    from launcher import controller

    clock = SimpleNamespace(now=100.0)
    clock.monotonic = lambda: clock.now
    clock.sleep = lambda seconds: setattr(clock, "now", clock.now + seconds)
    monkeypatch.setattr(controller, "time", clock)
    monkeypatch.setattr(controller, "no_room", lambda cluster: "no room")
    monkeypatch.setattr(controller, "draining_nodes", set)
    monkeypatch.setattr(controller.ray, "nodes", lambda: [{"NodeID": node, "Alive": True} for node in ROOM])
    monkeypatch.setattr(controller.ScalingPolicy, "_maybe_send_resource_request", lambda self: None)
    return SimpleNamespace(clock=clock, **vars(controller))


def policy(controller: Any, workers: int | tuple[int, int], stopped: bool = False, **keys: Any) -> Any:
    from ray.train import ScalingConfig

    cluster = ClusterConfig(workers=workers, start_timeout_s=60, **keys)
    scaling = ScalingConfig(num_workers=workers, resources_per_worker={"CPU": 1})
    kind = controller.FixedSize if isinstance(workers, int) else controller.ElasticSize
    return kind(scaling, cluster, SimpleNamespace(is_asked=lambda: stopped))


def group(*nodes: str) -> Any:
    """A running worker group with a worker on each of these nodes."""
    workers = [SimpleNamespace(metadata=SimpleNamespace(node_id=node)) for node in nodes]
    return SimpleNamespace(workers=workers, num_workers=len(nodes), start_time=0.0)


def test_the_wait_for_room_is_counted_anew_after_the_workers_have_run(controller):
    waiting = policy(controller, 2)
    waiting.make_decision_for_non_running_worker_group()
    controller.clock.now += 59
    waiting.make_decision_for_non_running_worker_group()
    waiting.make_decision_for_running_worker_group(group("a", "b"), None)
    controller.clock.now += 10_000  # they run, and one of them dies
    waiting.make_decision_for_non_running_worker_group()
    controller.clock.now += 61
    with pytest.raises(ClusterError, match="no room"):
        waiting.make_decision_for_non_running_worker_group()


def test_who_waits_for_room_pauses_between_two_looks(controller, monkeypatch):
    waiting = policy(controller, (2, 4))
    monkeypatch.setattr(waiting, "_get_reserved_resources", dict)
    before = controller.clock.now
    assert isinstance(waiting.make_decision_for_non_running_worker_group(), controller.NoopDecision)
    assert controller.clock.now > before
    with pytest.raises(StoppedError):
        policy(controller, (2, 4), stopped=True).make_decision_for_non_running_worker_group()


@pytest.mark.parametrize(
    ("workers", "leaving", "size"),
    [(3, {"b"}, 3), ((1, 8), {"c"}, 2), ((1, 8), {"b", "c"}, 1), ((2, 8), {"b", "c"}, 2), ((1, 8), {"a", "b", "c"}, 1)],
)
def test_a_group_leaves_nodes_that_are_about_to_go(controller, monkeypatch, workers, leaving, size):
    import launcher.controller

    deciding = policy(controller, workers)
    monkeypatch.setattr(launcher.controller, "draining_nodes", lambda: leaving | {"unknown"})
    decision = deciding.make_decision_for_running_worker_group(group("a", "b", "c"), None)
    assert (type(decision), decision.num_workers) == (controller.ResizeDecision, size)
    assert decision.resources_per_worker == {"CPU": 1}
    monkeypatch.setattr(launcher.controller, "draining_nodes", lambda: {"unknown"})
    staying = policy(controller, 3).make_decision_for_running_worker_group(group("a", "b", "c"), None)
    assert isinstance(staying, controller.NoopDecision)


def test_room_is_counted_on_nodes_that_stay(controller, monkeypatch):
    import launcher.controller

    counting = policy(controller, (1, 8))
    assert counting._count_possible_workers(ROOM) == 6
    assert counting._count_possible_workers(ROOM | {"dead": {"CPU": 2.0}}) == 6
    assert policy(controller, (1, 8), placement="strict_spread")._count_possible_workers(ROOM) == 3
    monkeypatch.setattr(launcher.controller, "draining_nodes", lambda: {"b"})
    assert counting._count_possible_workers(ROOM) == 3


class Group:
    """A worker group that ends at the so-many-th look."""

    def __init__(self, looks: int = 0, failed: bool = False):
        self.asked: list[Any] = []
        self.looks, self._failed = looks, failed

    def execute_async(self, ask: Any) -> None:
        self.asked.append(ask)

    def poll_status(self, timeout: float) -> Any:
        self.looks -= 1
        over = self.looks <= 0
        errors = {0: OSError()} if over and self._failed else {}
        return SimpleNamespace(finished=over and not self._failed, errors=errors)


def stopper(controller: Any, *, wanted: bool) -> Any:
    cluster = ClusterConfig(start_timeout_s=60, step_timeout_s=30)
    return controller.Stopper(cluster, SimpleNamespace(is_asked=lambda: wanted), signal.raise_signal)


def test_each_group_is_told_once_that_the_driver_wants_an_end(controller):
    telling = stopper(controller, wanted=True)
    telling.after_worker_group_poll_status(None)  # nobody there yet
    for each in (Group(), Group()):
        telling.after_worker_group_start(each)
        for _ in range(3):
            telling.after_worker_group_poll_status(None)
        assert each.asked == [signal.raise_signal]
        telling.before_worker_group_shutdown(each)
    calm, unwanted = stopper(controller, wanted=False), Group()
    calm.after_worker_group_start(unwanted)
    calm.after_worker_group_poll_status(None)
    assert unwanted.asked == []


@pytest.mark.parametrize("failed", [False, True])
def test_before_a_resize_the_workers_are_asked_to_stop_and_waited_for(controller, failed):
    from ray.train.v2._internal.execution.controller.state import RunningState

    asking, workers = stopper(controller, wanted=False), Group(5, failed)
    asking.after_worker_group_start(workers)
    asking.after_controller_state_update(None, RunningState())
    assert workers.asked == []
    resizing = controller.ResizingState(controller.ResizeDecision(1, {}))
    asking.after_controller_state_update(None, resizing)
    assert (workers.asked, workers.looks) == ([signal.raise_signal], 0)


def test_workers_that_dont_stop_before_a_resize_are_waited_for_no_longer_than_a_start(controller):
    asking, workers = stopper(controller, wanted=False), Group(10_000)
    asking.after_worker_group_start(workers)
    began = controller.clock.now
    asking.after_controller_state_update(None, controller.ResizingState(controller.ResizeDecision(1, {})))
    assert 60 <= controller.clock.now - began < 62


def test_what_the_user_has_to_put_right_is_no_reason_to_start_anew(controller):
    from ray.train import FailureConfig, WorkerGroupError

    deciding = controller.Failures(FailureConfig(max_failures=1))
    wrong = WorkerGroupError("", {0: RuntimeError("connection closed"), 1: UserError("data.train: bad")})
    assert deciding.make_decision(wrong) is controller.FailureDecision.RAISE
    failed = WorkerGroupError("", {1: OSError("disk"), 0: RuntimeError("connection closed")})
    assert deciding.make_decision(failed) is controller.FailureDecision.RETRY
    assert deciding.make_decision(failed) is controller.FailureDecision.RAISE
    assert str(_first_failure(wrong)) == "data.train: bad"
    assert str(_first_failure(failed)) == "the work failed on worker 0: RuntimeError: connection closed"


# The driver ----------------------------------------------------------------------------------------------------------


def test_the_second_sigterm_ends_the_program_as_ctrl_c_does():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_sigterm() as stop:
        signal.raise_signal(signal.SIGTERM)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    others: list[threading.Event] = []

    def in_a_thread() -> None:
        with stop_on_sigterm() as stop:
            others.append(stop)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert not others[0].is_set()


@pytest.fixture
def init(monkeypatch) -> list[Any]:
    """Stands for ray.init; raises the last of the errors."""
    import ray

    errors: list[Any] = [AssertionError("Ray was started")]

    def init(*_: object, **__: object) -> None:
        raise errors[-1]

    monkeypatch.setattr(ray, "init", init)
    return errors


@pytest.mark.parametrize(
    ("address", "line"),
    [
        ("127.0.0.1:9", "cluster.address: 127.0.0.1:9: Connection refused; HOST:6379 of a running Ray cluster"),
        ("nowhere.invalid:6379", "cluster.address: nowhere.invalid:6379: "),
        ("127.0.0.1:99999", "cluster.address: 127.0.0.1:99999: "),
    ],
)
@pytest.mark.usefixtures("init")
def test_an_address_where_nobody_listens_is_refused_before_ray_tries(address, line):
    with pytest.raises(UserError) as refused:
        connect(ClusterConfig(address=address))
    assert str(refused.value).startswith(line)
    assert "\n" not in str(refused.value)


def test_what_ray_says_of_an_address_comes_as_one_line(init):
    from ray.exceptions import AuthenticationError

    for error, line in (
        (
            ConnectionError("Failed to connect\nmore"),
            r"^cluster\.address: auto: Failed to connect; HOST:6379 .* token",
        ),
        (ValueError("Invalid"), r"^cluster\.address: auto: Invalid; "),
        (RuntimeError("Version mismatch"), r"^cluster\.address: auto: Version mismatch; "),
        (AuthenticationError("none"), r"^RAY_AUTH_TOKEN: missing: auto wants its own token in RAY_AUTH_TOKEN or"),
    ):
        init.append(error)
        with pytest.raises(UserError, match=line) as refused:
            connect(ClusterConfig(address="auto"))
        assert "\n" not in str(refused.value)


@pytest.mark.usefixtures("init")
def test_a_ray_that_lacks_what_is_used_of_it_is_refused_in_one_line(monkeypatch):
    from ray.train.v2._internal.execution.callback import ControllerCallback
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    ray_parts.check_parts()
    monkeypatch.delattr(ControllerCallback, "after_controller_state_update")
    monkeypatch.delattr(DataParallelTrainer, "_initialize_and_run_controller")
    with pytest.raises(UserError) as refused:
        connect(ClusterConfig())
    assert str(refused.value).endswith(
        "lacks ray.train.torch.TorchTrainer._initialize_and_run_controller and 1 more; ray==2.60.0 would be right"
    )


def test_every_private_part_of_ray_that_is_imported_is_looked_for():
    looked_for = {(module, path.partition(".")[0]) for module, path in (part.split(":") for part in ray_parts.PARTS)}
    imported = {
        (node.module, alias.name)
        for file in Path(ray_parts.__file__).parent.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.startswith("ray.")
        for alias in node.names
        if "._" in node.module or alias.name.startswith("_")
    }
    assert len(imported) > 5
    assert imported <= looked_for
