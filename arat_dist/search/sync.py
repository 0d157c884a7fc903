"""`arat track sync` of a search: its trials, then the search above them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from arat_dist.recipe import parse_recipe
from arat_dist.run import RECIPE
from arat_dist.search.search import Search
from arat_dist.tracking import Replica, sync


def sync_search(search: Search, overrides: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Deliver to MLflow what it lacks of a search that isn't at work now; once more changes nothing.

    Args:
        search: finished or not.
        overrides: pairs of a dotted key of the section track and its value.

    Returns:
        As `arat_dist.tracking.sync`, of the search; `metrics_sent` counts those of its trials too.

    Raises:
        UserError: the recipe wants no mirror, or a process searches now.
        TrackingError: MLflow can't be reached, or refuses.
    """
    base = parse_recipe(search.base.model_dump(mode="json"), overrides)
    search = replace(search, base=base)

    def replicate(*_: object) -> Replica:
        replica = search.replica()
        assert replica is not None  # `sync` has refused a search that wants none
        return replica

    sent = 0
    for trial in search.ledger.trials:
        run = search.run_of(trial)
        if run.folder.exists(RECIPE):
            sent += sync(run, search.recipe_of(trial))["metrics_sent"]
    result = sync(search.run, base, replicate)
    return result | {"metrics_sent": sent + result["metrics_sent"]}
