"""`arat eval`: the evaluation over a worker group, or in this process."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pydantic import ValidationError

from arat_dist.config import ClusterConfig, EvalConfig
from arat_dist.data.manifest import load_manifest
from arat_dist.engine import Rank
from arat_dist.errors import UserError
from arat_dist.evaluation.corruptions import MIN_SIDE, parse_corruptions
from arat_dist.evaluation.evaluation import RESULT, run_evaluation
from arat_dist.evaluation.question import Question, fingerprint, slug
from arat_dist.evaluation.samples import choose_samples
from arat_dist.evaluation.stages import default_batch_size
from arat_dist.models.split_norm import Branch
from arat_dist.preflight import check_gpus
from arat_dist.storage import Storage, absolute_path
from arat_dist.targets import Target, Weights, open_target
from launcher.cluster import run_workers, stop_on_sigterm
from launcher.progress import EvaluationProgress

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wanted:
    """What `arat eval` was asked for.

    Attributes:
        target: RUN, EXPORT_DIR or timm:ARCH[:WEIGHTS_FILE].
        weights: of a run; default: the averaged ones where it keeps them.
        branch: the one to measure.
        val: a .beton; default: the run's own validation set.
        changes: keys of the eval section that differ from the run's.
        samples: a file that lists the samples; default: all.
        transfer_from: another target, which adversarial pictures are made on.
        corruptions: names with commas between them, or all; default: none.
        severity: of the corruptions, 1 to 5; default: all five.
        out: folder for the results; default: the run's own, or evaluations/ here.
    """

    target: str
    weights: Weights | None = None
    branch: Branch = "adv"
    val: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    samples: str | None = None
    transfer_from: str | None = None
    corruptions: str | None = None
    severity: int | None = None
    out: str | None = None


def evaluate_target(wanted: Wanted, num_workers: int, num_threads: int | None = None) -> dict[str, Any]:
    """Measure a run, an export or a timm net, or go on measuring it; a question that has its answer gets that.

    Args:
        wanted: what to measure.
        num_workers: size of the worker group; 0 stays in this process.
        num_threads: that torch uses in each; default: this machine's cores, shared out.

    Returns:
        The JSON object of `arat eval`, which is in the evaluation's folder as well.

    Raises:
        UserError: something that the user gave can't work; nothing was started or written.
    """
    target, config = open_wanted(wanted, num_workers)
    source = _open_source(wanted, target)
    question = _question(wanted, target, source, config)
    folder = _folder(wanted, target) / question.label
    if answer := folder.read_json(RESULT):
        logger.info("measured before: %s", folder.path(RESULT))
        return answer
    check_gpus(evaluation_cluster(target.cluster or ClusterConfig(), num_workers, num_threads))
    check_writable(folder)
    if num_workers:
        # Each worker opens them anew: Ray's object store is no place for weights.
        work = partial(_open_and_evaluate, question, target.uri, source and source.uri, folder.uri)
    else:
        # This machine may be none of those that the run's disk is on.
        in_place = target.data.model_copy(update={"stage_to": None})
        work = partial(_evaluate, question, replace(target, data=in_place), source, folder.uri)
    with tempfile.TemporaryDirectory() as scratch, EvaluationProgress(wanted.target, folder), stop_on_sigterm() as stop:
        cluster = evaluation_cluster(target.cluster or ClusterConfig(storage=scratch), num_workers, num_threads)
        return run_workers(work, cluster, "eval", stop)


def open_wanted(wanted: Wanted, num_workers: int = 0) -> tuple[Target, EvalConfig]:
    """The net, and the section with what was asked for, complete (UserError: one of them can't be).

    Args:
        wanted: what to measure.
        num_workers: as in `evaluate_target`: they decide the device, which the default batch size goes by.
    """
    target = open_target(wanted.target, weights=wanted.weights, val=wanted.val)
    config = _changed(target.config, wanted.changes)
    if "batch_size" not in wanted.changes and (target.run is None or target.run.recipe().eval.batch_size is None):
        # The target's own section has what suits the device of its training.
        cluster = evaluation_cluster(target.cluster or ClusterConfig(), num_workers)
        batch_size = default_batch_size(target.data.image_size, "cuda" if cluster.gpus_per_worker else "cpu")
        config = config.model_copy(update={"batch_size": batch_size})
    check_ball(wanted, target, config)
    return target, config


def _open_source(wanted: Wanted, target: Target) -> Target | None:
    """The net that adversarial pictures are made on, if it is another one (UserError: it can't be)."""
    if wanted.transfer_from is None:
        return None
    source = open_target(wanted.transfer_from, val=target.data.val)
    if source.data.image_size != target.data.image_size:
        raise UserError(
            f"--transfer-from: {wanted.transfer_from}: takes pictures of {source.data.image_size}, {wanted.target} of "
            f"{target.data.image_size}; a net for the same size would be right"
        )
    return source


def _question(wanted: Wanted, target: Target, source: Target | None, config: EvalConfig) -> Question:
    if wanted.branch == "clean" and not target.classifier.is_split:
        raise UserError(f"--branch: clean: {wanted.target} has one branch, adv; a run with split norms would be right")
    if source is not None and config.attack == "none":
        raise UserError(f"--transfer-from: {wanted.transfer_from}: nothing to transfer with --attack none; apgd, say")
    if wanted.severity is not None and wanted.corruptions is None:
        raise UserError(f"--severity: {wanted.severity}: goes with --corruptions all, or some of them")
    corruptions = parse_corruptions(wanted.corruptions, wanted.severity, config.seed) if wanted.corruptions else []
    if corruptions and target.data.image_size < MIN_SIDE:
        raise UserError(f"--corruptions: pictures of {target.data.image_size}: they are made for {MIN_SIDE} and more")
    data = target.data
    return Question(
        target=wanted.target,
        weights=target.weights,
        step=target.step,
        branch=wanted.branch,
        fingerprint=fingerprint(target.classifier),
        data=data.val,
        data_sha256=load_manifest(data.val).sha256,
        cut=(data.image_size, data.val_crop, data.loader),
        samples=tuple(choose_samples(data.val, config.limit, wanted.samples).tolist()),
        config=config,
        transfer_from=wanted.transfer_from,
        source_fingerprint=source and fingerprint(source.classifier),
        corruptions=tuple(corruptions),
    )


def _folder(wanted: Wanted, target: Target) -> Storage:
    """Where the results of a target are kept."""
    if wanted.out is not None:
        return Storage(absolute_path(wanted.out))
    if target.run is not None:
        return target.run.folder / "evaluations"
    return Storage(absolute_path("evaluations")) / slug(wanted.target)


def check_writable(folder: Storage) -> None:
    """Refuse a folder that nothing can be written into (UserError)."""
    try:
        folder.write(".writable", b"")
        folder.delete(".writable")
    except OSError as error:
        raise UserError(f"--out: {folder.uri}: can't be written: {error.strerror or error}") from error


def evaluation_cluster(cluster: ClusterConfig, num_workers: int, num_threads: int | None = None) -> ClusterConfig:
    """Where an evaluation runs: on what this machine has, or on workers like those of the run, in its cluster.

    Args:
        cluster: the run's own section.
        num_workers: size of the worker group; 0 stays in this process.
        num_threads: of each; default: this machine's cores, shared out, or the run's where it names a cluster.
    """
    changes: dict[str, Any] = {"workers": num_workers}
    if cluster.address is None or not num_workers:
        changes["gpus_per_worker"] = int(torch.cuda.is_available())
        changes["cpus_per_worker"] = max(1, (os.cpu_count() or 1) // max(1, num_workers))
    if num_threads is not None:
        changes["cpus_per_worker"] = num_threads
    return cluster.model_copy(update=changes)


def _changed(config: EvalConfig, changes: Mapping[str, Any]) -> EvalConfig:
    try:
        return EvalConfig.model_validate(config.model_dump() | {"eps": config.eps, "norm": config.norm} | dict(changes))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"--{first['loc'][0]}: {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
        ) from None


def check_ball(wanted: Wanted, target: Target, config: EvalConfig) -> None:
    """Refuse a radius that is missing, another norm's, or larger than all pictures (UserError)."""
    before, side = target.config, target.data.image_size
    if config.attack == "none" and config.eps is None:
        return
    if config.eps is None or config.norm is None:
        raise UserError(
            f"--eps: missing: {wanted.target} doesn't say what it was trained for; --norm linf --eps 8/255, say"
        )
    if config.norm != before.norm and "eps" not in wanted.changes:
        raise UserError(f"--eps: missing: {before.eps:g} is a radius in {before.norm}, --norm is {config.norm}")
    largest = {
        "linf": (1.0, "1"),
        "l2": (side * 3**0.5, "image_size*sqrt(3)"),
        "l1": (3.0 * side**2, "3*image_size^2"),
    }
    most, words = largest[config.norm]
    if config.eps > most:
        usual = " (8/255 is usual)" if config.norm == "linf" else f" ({most:g})"
        raise UserError(f"--eps: {config.eps:g}: pixels are in [0,1], so {config.norm} eps is at most {words}{usual}")


def _open_and_evaluate(question: Question, uri: str, source_uri: str | None, folder: str, rank: Rank) -> dict[str, Any]:
    target = open_target(uri, weights=question.weights, val=question.data)
    source = open_target(source_uri, val=question.data) if source_uri else None
    if fingerprint(target.classifier) != question.fingerprint:
        raise UserError(f"{question.target}: its weights have changed since the evaluation was started; start it anew")
    return _evaluate(question, target, source, folder, rank)


def _evaluate(question: Question, target: Target, source: Target | None, folder: str, rank: Rank) -> dict[str, Any]:
    return run_evaluation(question, target, source and source.classifier, Storage(folder), rank)
