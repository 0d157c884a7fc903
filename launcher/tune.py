"""`arat tune`: trials over recipe keys under Ray Tune, from the first proposal to the recipes that are taken home."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from arat_dist.config import ClusterConfig
from arat_dist.errors import SearchError, StoppedError, UserError
from arat_dist.mirror import Mirror
from arat_dist.preflight import check_recipe
from arat_dist.report.search import PLOT, front_png
from arat_dist.search.ledger import FAILED, PRUNED, Trial
from arat_dist.search.search import Search
from arat_dist.tracking import without_password
from launcher.cluster import connect, stop_on_sigterm
from launcher.fit import clean_start
from launcher.progress import console
from launcher.search_progress import SearchProgress


def tune(search: Search) -> dict[str, Any]:
    """Search, or go on with an unfinished search; returns the summary. A finished one is left as it is.

    Raises:
        UserError: something that the user gave can't work; nothing was started.
        StoppedError: SIGTERM came; finished trials are kept, the others go on from their checkpoints.
    """
    search.check()
    check_recipe(search.base)
    with search.run.locked():
        if (summary := search.run.summary()) and search.is_over():
            console.print(f"{search.run.name}: finished already; another --name would search again", highlight=False)
            return summary
        mirror = Mirror(replica) if (replica := search.replica()) else None
        _ = search.earlier  # one that isn't comparable is refused here, as is a start that can't be trained
        clean_start(search.base, search.run_of(Trial(0, {})))
        concurrency = room_for_trials(search.base.cluster, search.config.concurrency)
        search.open()
        summary: dict[str, Any] = {}
        try:
            if mirror:
                mirror.start()
            if not search.is_over():
                from launcher.trials import run_trials  # it imports Ray, which had to be told of this cluster before

                with SearchProgress(search) as progress, stop_on_sigterm() as stop:
                    run_trials(search, concurrency, progress, stop)
            summary = take_home(search)
        finally:
            if mirror:
                mirror.finish(summary)
        summary |= {
            "wall_s": round(search.ledger.seconds(), 1),
            "mlflow_tracking_uri": mirror and without_password(mirror.uri),
            "mlflow_run_id": mirror.run_id if mirror else None,
        }
        search.run.finish(summary)
    return summary


def take_home(search: Search) -> dict[str, Any]:
    """The summary of a search whose trials are through.

    Raises:
        StoppedError: they were stopped.
        SearchError: all of them failed.
    """
    if search.time_is_over():
        for trial in search.ledger.running():
            search.ledger.end(trial.number, PRUNED, reason="the time was over")
    search.log_ends()
    if search.ledger.running():
        raise StoppedError(None)
    if (failed := search.ledger.ended(FAILED)) and len(failed) == len(search.ledger.trials):
        raise SearchError(f"every trial of the search {search.run.name} failed; the first: {failed[0].reason}")
    summary = search.take_home()
    search.run.folder.write(PLOT, front_png(search))
    return summary


def room_for_trials(cluster: ClusterConfig, concurrency: int | None) -> int:
    """Join the cluster, or start one; returns how many trials may train at a time.

    Raises:
        UserError: it hasn't, and won't have, room for the workers of one trial, or of so many.
    """
    if cluster.workers == 0:
        raise UserError("cluster.workers: 0: a search runs under Ray; 1 or more would be right")
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.num_gpus}
    wanted = {name: count for name, count in each.items() if count}
    if cluster.address is None:
        from torch.cuda import device_count

        has: dict[str, float] = {"CPU": os.cpu_count() or 1, "GPU": device_count()}
        room = _num_workers(has, wanted)
    else:
        connect(cluster)
        import ray
        from ray._private.state import state

        # An autoscaler's cluster grows up to what its own configuration says.
        most = state.get_max_resources_from_cluster_config() or {}
        room = sum(_num_workers(node["Resources"], wanted) for node in ray.nodes() if node["Alive"])
        room = max(room, _num_workers(most, wanted))
        has = {name: max(most.get(name, 0), ray.cluster_resources().get(name, 0)) for name in wanted}
    needs = " and ".join(f"{count} {name}" for name, count in wanted.items())
    there = f"{'this machine' if cluster.address is None else 'the cluster'} has " + " and ".join(
        f"{has[name]:g} {name}" for name in wanted
    )
    if room < cluster.min_workers:
        raise UserError(
            f"cluster.workers: {cluster.min_workers}: of {needs} each: {there}; at most {room} would be right"
        )
    if concurrency is not None and concurrency > 1 and room < concurrency * cluster.max_workers:
        raise UserError(
            f"concurrency: {concurrency}: trials of {cluster.max_workers} workers of {needs} each: {there}; at most "
            f"{max(1, room // cluster.max_workers)} would be right"
        )
    connect(cluster)
    return concurrency or max(1, room // cluster.max_workers)


def _num_workers(resources: Mapping[str, float], wanted: Mapping[str, float]) -> int:
    """How many workers have room."""
    return min(math.floor(resources.get(name, 0) / count) for name, count in wanted.items())
