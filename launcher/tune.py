"""`arat tune`: trials over recipe keys under Ray Tune, from the first proposal to the recipes that are taken home."""

from __future__ import annotations

import math
import os
from typing import Any

from arat_dist.config import ClusterConfig
from arat_dist.errors import StoppedError, UserError
from arat_dist.mirror import Mirror
from arat_dist.preflight import check_recipe
from arat_dist.report.search import PLOT, front_png
from arat_dist.search.ledger import PRUNED
from arat_dist.search.search import Search
from arat_dist.tracking import without_password
from launcher.cluster import connect, stop_on_sigterm
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
    with search.locked():
        if (summary := search.run.summary()) and search.is_over():
            console.print(f"{search.run.name}: finished already; another --name would search again", highlight=False)
            return summary
        concurrency = room_for_trials(search.base.cluster, search.config.concurrency)
        search.open()
        from launcher.trials import run_trials  # it imports Ray, which has to be told of this cluster before

        mirror = Mirror(replica) if (replica := search.replica()) else None
        summary: dict[str, Any] = {}
        try:
            if mirror:
                mirror.start()
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
    """The summary of a search whose trials are through (StoppedError: they were stopped)."""
    if search.time_is_over():
        for trial in search.ledger.running():
            search.ledger.end(trial.number, PRUNED, reason="the time was over")
    if search.ledger.running():
        raise StoppedError(None)
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
    each = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    if cluster.address is None:
        from torch.cuda import device_count

        most: dict[str, float] = {"CPU": os.cpu_count() or 1, "GPU": device_count()}
    else:
        connect(cluster)
        import ray
        from ray._private.state import state

        # An autoscaler's cluster grows up to what its own configuration says.
        limits, now = state.get_max_resources_from_cluster_config() or {}, ray.cluster_resources()
        most = {name: max(limits.get(name, 0), now.get(name, 0)) for name in each}
    wanted = {name: count for name, count in each.items() if count}
    room = min(math.floor(most[name] / count) for name, count in wanted.items())
    trials = concurrency or 1
    if room < trials * cluster.min_workers:
        needs = " and ".join(f"{count} {name}" for name, count in wanted.items())
        has = " and ".join(f"{most[name]:g} {name}" for name in wanted)
        where = "this machine" if cluster.address is None else "the cluster"
        at_a_time = f", and {trials} trials at a time (concurrency)" if trials > 1 else ""
        raise UserError(
            f"cluster.workers: {cluster.min_workers}: of {needs} each{at_a_time}: {where} has {has}; at most "
            f"{room // trials} would be right"
        )
    connect(cluster)
    return concurrency or max(1, room // cluster.max_workers)
