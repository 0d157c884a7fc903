"""`arat eval`: the evaluation over a worker group, or in this process."""

from __future__ import annotations

import os
import tempfile
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from arat_dist.config import ClusterConfig, EvalConfig
from arat_dist.engine import Rank
from arat_dist.errors import UserError
from arat_dist.evaluate import evaluate
from arat_dist.preflight import check_gpus
from arat_dist.targets import Target, Weights, open_target
from launcher.cluster import run_workers


def evaluate_target(
    target: str, *, weights: Weights | None, val: str | None, changes: dict[str, Any], num_workers: int
) -> dict[str, Any]:
    """Measure a run, an export or a timm net.

    Args:
        target: RUN, EXPORT_DIR or timm:ARCH[:WEIGHTS_FILE].
        weights: of a run; default: the averaged ones where it keeps them.
        val: a .beton; default: the run's own validation set.
        changes: keys of the eval section that differ from the run's.
        num_workers: size of the worker group; 0 stays in this process.

    Returns:
        The JSON object of `arat eval`.
    """
    began = time.perf_counter()
    opened = open_target(target, weights=weights, val=val)
    config = _changed(opened.config, changes)
    _check_radius(target, opened, config, changes)
    if num_workers:
        # Each worker opens it anew: Ray's object store is no place for weights.
        work = partial(_open_and_evaluate, opened.uri, weights, opened.data.val, config)
    else:
        # This machine may be none of those that the run's disk is on.
        in_place = opened.data.model_copy(update={"stage_to": None})
        work = partial(_evaluate, replace(opened, data=in_place), config)
    with tempfile.TemporaryDirectory() as scratch:
        cluster = evaluation_cluster(opened.cluster or ClusterConfig(storage=scratch), num_workers)
        check_gpus(cluster)
        scores = run_workers(work, cluster, "eval")
    return scores | {"warnings": [], "wall_s": round(time.perf_counter() - began, 1)}


def evaluation_cluster(cluster: ClusterConfig, num_workers: int) -> ClusterConfig:
    """Where an evaluation runs: on what this machine has, or on workers like those of the run, in its cluster.

    Args:
        cluster: the run's own section.
        num_workers: size of the worker group; 0 stays in this process.
    """
    changes: dict[str, Any] = {"workers": num_workers}
    if cluster.address is None or not num_workers:
        changes["gpus_per_worker"] = int(torch.cuda.is_available())
        changes["cpus_per_worker"] = max(1, (os.cpu_count() or 1) // max(1, num_workers))
    return cluster.model_copy(update=changes)


def _changed(config: EvalConfig, changes: dict[str, Any]) -> EvalConfig:
    try:
        return EvalConfig.model_validate(config.model_dump() | {"eps": config.eps, "norm": config.norm} | changes)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"--{first['loc'][0]}: {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def _check_radius(target: str, opened: Target, config: EvalConfig, changes: dict[str, Any]) -> None:
    before, largest_l1 = opened.config, 3 * opened.data.image_size**2
    if config.eps is None or config.norm is None:
        raise UserError(f"--eps: missing: {target} doesn't say what it was trained for; --norm linf --eps 8/255, say")
    if config.norm != before.norm and "eps" not in changes:
        raise UserError(f"--eps: missing: {before.eps:g} is a radius in {before.norm}, --norm is {config.norm}")
    if config.norm == "linf" and config.eps > 1:
        raise UserError(f"--eps: {config.eps:g}: pixels are in [0,1], so linf eps is at most 1 (8/255 is usual)")
    if config.norm == "l1" and config.eps > largest_l1:
        raise UserError(
            f"--eps: {config.eps:g}: pixels are in [0,1], so l1 eps is at most 3*image_size^2 ({largest_l1})"
        )


def _open_and_evaluate(
    target: str, weights: Weights | None, val: str, config: EvalConfig, rank: Rank
) -> dict[str, Any]:
    return _evaluate(open_target(target, weights=weights, val=val), config, rank)


def _evaluate(target: Target, config: EvalConfig, rank: Rank) -> dict[str, Any]:
    scores = evaluate(target.classifier.to(rank.device), target.data, config, rank)
    summary = scores.summary()
    return {"attack": summary.pop("robust_attack"), **summary}
