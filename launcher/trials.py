"""What Ray Tune runs: each trial is a whole run with its own worker group, started by `launcher.fit`.

Tune decides when a trial is pruned, and keeps a process beside the driver for each trial at work. It remembers nothing:
what it would have to remember is in the search's ledger, from which its scheduler and its searcher are built anew.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any, cast

import ray
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search import Searcher

from arat_dist.config import Recipe
from arat_dist.errors import ClusterError, StoppedError, TakenError, UserError, WorkersError
from arat_dist.recipe import parse_recipe
from arat_dist.search.ledger import FAILED, FINISHED, PRUNED, Accuracies, Trial
from arat_dist.search.search import Search
from launcher.cluster import in_thread
from launcher.controller import Stop
from launcher.fit import fit, with_absolute_paths
from launcher.search_progress import SearchProgress

_STOPPED = "stopped"
_HELD_UP = "held up"
"""For want of room, or since another process has the run: it is the search that has to wait, no trial that fails."""
_POLL_S = 0.5
_TAKEN_S = 60.0
"""How long a trial waits for a process that still has its run: one that a killed driver left behind ends by itself."""
_MAX_FAILURES = 3
"""Times that a trial whose process beside the driver died is started again."""
_NODE_SHARE = 0.001
_EPOCH, _SCORE = "epoch", "score"
_NOBODY = cast("Any", None)
"""In the place of Tune's controller, which none of its rules asks for anything here."""


def run_trials(search: Search, concurrency: int, progress: SearchProgress, stop: threading.Event) -> None:
    """Have Tune run trials until there are no more, or until the event is set and those at work have stopped.

    Raises:
        ClusterError: one of them was held up: the cluster lost room for it, or another process has its run.
    """
    name = f"{search.run.name}-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
    asked = Stop(name)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # What Tune writes is read by nobody. Its processes are on this machine, wherever their workers are.
    with tempfile.TemporaryDirectory(prefix="arat-tune-", ignore_cleanup_errors=True) as folder:
        scribe = Scribe(search, progress, stop)
        about = {"group": name, "node": _this_node(), "cwd": os.getcwd()}
        tuner = ray_tune.Tuner(
            TrialProcess,
            tune_config=ray_tune.TuneConfig(
                search_alg=Proposer(search, scribe, concurrency, about, stop),
                scheduler=Pruner(search),
                num_samples=-1,
                reuse_actors=True,
                trial_name_creator=_trial_name,
                trial_dirname_creator=_trial_name,
            ),
            run_config=ray_tune.RunConfig(
                name=name,
                storage_path=folder,
                verbose=0,
                callbacks=[scribe],
                checkpoint_config=ray_tune.CheckpointConfig(checkpoint_at_end=False),
                failure_config=ray_tune.FailureConfig(max_failures=_MAX_FAILURES),
            ),
        )
        try:
            in_thread(tuner.fit, stop, asked)
        finally:
            asked.forget()
    if scribe.held_up:
        raise ClusterError(scribe.held_up)


class TrialProcess(ray_tune.Trainable):
    """The process of a trial beside the driver: a run in a thread, whose accuracies it hands to Tune.

    The next trial gets the same process: what it has imported stays.
    """

    @classmethod
    def default_resource_request(cls, config: dict[str, Any]) -> Any:
        """No CPU: those are for the workers. A share of what only the driver's machine has."""
        return ray_tune.PlacementGroupFactory([{"CPU": 0, config["node"]: _NODE_SHARE}])

    def setup(self, config: dict[str, Any]) -> None:
        """Begin the first trial.

        Args:
            config: what `Proposer.suggest` gives.
        """
        self._wish = Stop(config["group"])
        self._begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Stop the trial before, unless it has ended, and begin the next after it."""
        self._stop.set()
        self._begin(new_config, self._thread)
        return True

    def step(self) -> dict[str, Any]:
        """Wait for the next accuracies, or for the end of the trial, which has a `status`."""
        while True:
            try:
                event = self._events.get(timeout=_POLL_S)
            except queue.Empty:
                if self._wish.is_asked():
                    self._stop.set()
                continue
            return {**event, "done": "status" in event}

    def cleanup(self) -> None:
        """Stop the run, with a checkpoint, and wait for that."""
        self._stop.set()
        self._thread.join()

    def _begin(self, config: dict[str, Any], before: threading.Thread | None = None) -> None:
        os.chdir(config["cwd"])  # the driver's: Tune has made it another
        recipe = parse_recipe(json.loads(config["recipe"]))
        self._stop, self._events = threading.Event(), queue.SimpleQueue[dict[str, Any]]()
        arguments = (recipe, config["name"], self._stop, self._events.put, before)
        self._thread = threading.Thread(target=_train, args=arguments, daemon=True)
        self._thread.start()


def _train(
    recipe: Recipe,
    name: str,
    stop: threading.Event,
    put: Callable[[dict[str, Any]], None],
    before: threading.Thread | None,
) -> None:
    """Train a trial's run once the thread before has ended, and put what is news: accuracies, at last how it ended."""
    if before is not None:
        before.join()

    def on_line(line: dict[str, Any]) -> None:
        if "val_robust_accuracy" in line:
            accuracies = Accuracies(line["val_clean_accuracy"], line["val_robust_accuracy"])
            put({_EPOCH: round(line["epoch"]), **accuracies.named()})

    try:
        summary = _fit(recipe, name, on_line, stop)
    except StoppedError:
        put({"status": _STOPPED})
    except (ClusterError, TakenError) as error:
        put({"status": _HELD_UP, "reason": str(error)})
    except (UserError, WorkersError, FloatingPointError) as error:
        put({"status": FAILED, "reason": str(error)})
    except BaseException as error:  # noqa: BLE001 - the driver hears of it, and the search goes on
        put({"status": FAILED, "reason": f"{type(error).__name__}: {error}"})
    else:
        accuracies = Accuracies(summary["clean_accuracy"], summary["robust_accuracy"])
        put({"status": FINISHED, _EPOCH: summary["epochs"], **accuracies.named()})


def _fit(recipe: Recipe, name: str, on_line: Callable[[dict[str, Any]], None], stop: threading.Event) -> dict[str, Any]:
    """`fit`, once a process that still has the run lets go of it."""
    deadline = time.monotonic() + _TAKEN_S
    while True:
        try:
            return fit(recipe, name, on_line, stop)
        except TakenError:
            if time.monotonic() > deadline:
                raise
            if stop.wait(_POLL_S):
                raise StoppedError(None) from None


class _Unsaved:
    """Tune saves all that it is given, and nobody reads that: of these, which hold locks, it saves nothing."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return object, ()


class Proposer(_Unsaved, Searcher):
    """Gives Tune its trials: first those that an earlier launch left unfinished, then new ones.

    Args:
        search: the search.
        scribe: hears of trials that can't begin.
        concurrency: most trials at a time.
        about: what else their processes are told.
        stop: once it is set, there are no more.
    """

    def __init__(self, search: Search, scribe: Scribe, concurrency: int, about: dict[str, str], stop: threading.Event):
        super().__init__(metric=_SCORE, mode="max")
        self._search, self._scribe, self._concurrency = search, scribe, concurrency
        self._about, self._stop = about, stop
        self._left = search.ledger.running()
        self._at_work: set[str] = set()

    def suggest(self, trial_id: str) -> Any:
        """A trial's config; None: not now."""
        if len(self._at_work) >= self._concurrency:
            return None
        while not self._stop.is_set() and not self._search.time_is_over():
            trial = self._left.pop(0) if self._left else self._search.next_trial()
            if trial is None:
                break
            try:
                recipe = with_absolute_paths(self._search.recipe_of(trial))
            except UserError as error:
                self._scribe.end(trial, FAILED, reason=str(error))
                continue
            self._at_work.add(trial_id)
            return {"trial": trial.number, "name": trial.name, "recipe": recipe.model_dump_json(), **self._about}
        return Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:  # noqa: ARG002
        """Make room for the next."""
        self._at_work.discard(trial_id)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Nothing: the ledger has it."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: the ledger has it."""


class Pruner(_Unsaved, FIFOScheduler):
    """One of Tune's rules, which has seen all that is in the ledger, in its order, before it sees what is new."""

    def __init__(self, search: Search):
        super().__init__()
        self._search, self._rule = search, _rule(search)
        self._known: dict[int, _Seen] = {}
        for event in search.ledger.events:
            trial = search.ledger.trials[event["trial"]]
            if event["event"] == "report":
                self._rule.on_trial_result(_NOBODY, self._seen(trial), self._scored(event))
            elif event["event"] == "ended" and trial.status in (FINISHED, PRUNED) and trial.last:
                epoch = search.base.train.epochs if trial.status == FINISHED else max(trial.reports)
                self._rule.on_trial_complete(
                    _NOBODY, self._seen(trial), self._scored({_EPOCH: epoch, **trial.last.named()})
                )

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """As the rule decides; of what was reported before, a trial that goes on tells again."""
        ours = self._of(trial)
        if result[_EPOCH] in ours.reports:
            return TrialScheduler.CONTINUE
        return self._rule.on_trial_result(tune_controller, self._seen(ours), self._scored(result))

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        """Pass it on where there are accuracies: a trial that failed, or was told to stop, has none."""
        if _EPOCH in result:
            self._rule.on_trial_complete(tune_controller, self._seen(self._of(trial)), self._scored(result))

    def _of(self, trial: Any) -> Trial:
        return self._search.ledger.trials[trial.config["trial"]]

    def _seen(self, trial: Trial) -> Any:
        """What stands for a trial in the rule."""
        if trial.number not in self._known:
            self._known[trial.number] = _Seen(trial.name)
            self._rule.on_trial_add(_NOBODY, cast("Any", self._known[trial.number]))
        return self._known[trial.number]

    def _scored(self, result: dict[str, Any]) -> dict[str, Any]:
        score = self._search.config.score(result["clean_accuracy"], result["robust_accuracy"])
        return {_EPOCH: result[_EPOCH], _SCORE: score}


class _Seen:
    """A trial as far as Tune's rules look at it: the same in every launch."""

    def __init__(self, trial_id: str):
        self.trial_id = trial_id


class Scribe(_Unsaved, ray_tune.Callback):
    """Writes what happens into the ledger and shows it, in Tune's loop: before anything follows from it."""

    def __init__(self, search: Search, progress: SearchProgress, stop: threading.Event):
        self._search, self._progress, self._stop = search, progress, stop
        self.held_up = ""

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Show it."""
        self._progress.started(self._of(trial))

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Any],  # noqa: ARG002
        trial: Any,
        result: dict[str, Any],
        **info: Any,  # noqa: ARG002
    ) -> None:
        """Note accuracies, or the end; a trial that was told to stop goes on another time, unless there is none."""
        ours, status = self._of(trial), result.get("status")
        if status == _HELD_UP:
            self.held_up = f"trial {ours.number}: {result['reason']}"
            self._stop.set()
        if status in (_STOPPED, _HELD_UP):
            return
        if status == FAILED:
            self.end(ours, FAILED, reason=result["reason"])
            return
        accuracies = Accuracies(result["clean_accuracy"], result["robust_accuracy"])
        if status == FINISHED:
            self.end(ours, FINISHED, accuracies)
            return
        if result[_EPOCH] in ours.reports:
            return
        pruned = f"after epoch {result[_EPOCH]}, by {self._search.config.scheduler}" if result["done"] else ""
        self._search.ledger.report(ours.number, result[_EPOCH], accuracies, pruned=pruned)
        self._progress.reported(ours)
        if pruned:
            self._has_ended(ours)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:  # noqa: ARG002
        """Note that a trial's process died too often."""
        self.end(self._of(trial), FAILED, reason="its process beside the driver died too often")

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:  # noqa: ARG002
        """Look at the clock."""
        if self._search.time_is_over():
            self._stop.set()

    def end(self, trial: Trial, status: str, result: Accuracies | None = None, *, reason: str = "") -> None:
        """Note the end of a trial."""
        self._search.ledger.end(trial.number, status, result, reason)
        self._has_ended(trial)

    def _has_ended(self, trial: Trial) -> None:
        self._search.log_ends()
        self._progress.ended(trial)

    def _of(self, trial: Any) -> Trial:
        return self._search.ledger.trials[trial.config["trial"]]


def _rule(search: Search) -> FIFOScheduler:
    config = search.config
    what: dict[str, Any] = {"time_attr": _EPOCH, "metric": _SCORE, "mode": "max"}
    match config.scheduler:
        case "asha":
            epochs, grace, factor = search.base.train.epochs, config.grace_epochs, config.reduction_factor
            return ASHAScheduler(**what, max_t=epochs, grace_period=grace, reduction_factor=factor)
        case "median":
            # It would pause trials as long as it knows too few; here they go on.
            return MedianStoppingRule(**what, grace_period=config.grace_epochs, min_time_slice=cast("int", math.inf))
    return FIFOScheduler()


def _this_node() -> str:
    """The resource that only this machine has."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = (node for node in ray.nodes() if node["NodeID"] == here)
    return next(name for name in node["Resources"] if name.startswith("node:") and "internal_head" not in name)


def _trial_name(trial: Any) -> str:
    return f"{trial.config['trial']:04d}-{trial.trial_id}"
