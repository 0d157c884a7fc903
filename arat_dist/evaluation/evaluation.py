"""One evaluation from its question to its folder: clean pictures, attacks, probes, corruptions, result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from arat_dist.config import EvalConfig
from arat_dist.data.loader import val_loader
from arat_dist.engine import Rank
from arat_dist.evaluate import attack_steps
from arat_dist.evaluation.attacks import Net, evaluation_attacks
from arat_dist.evaluation.corruptions import measure_corruptions
from arat_dist.evaluation.guards import branch_warnings, notes_warnings, probe_warnings, square_warnings
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.net import attacked, fast_copy
from arat_dist.evaluation.probes import Probed, Probes, probe
from arat_dist.evaluation.question import Question
from arat_dist.evaluation.stages import Runner, pixels_of
from arat_dist.evaluation.verdicts import Nets, Verdicts, accuracies, measure
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import Branch
from arat_dist.storage import Storage
from arat_dist.targets import Target

RESULT = "result.json"
VERDICTS = "verdicts.parquet"

T = TypeVar("T")


def run_evaluation(
    question: Question, target: Target, source: Classifier | None, folder: Storage, rank: Rank
) -> dict[str, Any]:
    """Answer a question, or go on answering it; every rank calls it.

    Args:
        question: what is asked.
        target: the net, and how its pictures are loaded.
        source: the net that adversarial pictures are made on, in evaluation mode; None: the target's.
        folder: the evaluation's; the first rank writes its result.
        rank: this process.

    Raises:
        StoppedError: some rank was asked to stop; what is finished is kept.
        UserError: a batch needs more memory than a GPU has; what is finished is kept.
    """
    began = time.perf_counter()
    config, data = question.config, target.data
    batch_size = _given(config.batch_size)
    samples = np.array(question.samples, np.int64)
    ledger = Ledger(folder)
    classifier = target.classifier.to(rank.device)
    with val_loader(data, batch_size) as loader, classifier.branch(question.branch):
        runner = Runner(loader, ledger, rank, batch_size)
        first = next(iter(loader.iterate([samples[:4]])))
        probe_pictures = pixels_of(first.images, classifier.dtype)
        copy = fast_copy(source or classifier, probe_pictures, "adv" if source else question.branch).to(rank.device)
        with nets_of(classifier, copy, question) as (nets, other):
            transfers = source is not None
            verdicts = measure(nets, evaluation_attacks(config, transfers=transfers), runner, samples)
            probed = None
            if verdicts.attacks and not transfers and verdicts.clean_right.any():
                probes = Probes(_given(config.norm), _given(config.eps), config.seed)
                probed = probe(nets, other, probes, runner, verdicts)
            corruptions = measure_corruptions(nets, question.corruptions, runner, samples, verdicts.labels)
    result = _described(question, verdicts)
    result["warnings"] = _warnings(question, target, verdicts, probed)
    if probed:
        result["probes"] = asdict(probed.figures) | {"wall_s": round(probed.wall_s, 2)}
    if corruptions:
        result["corruptions"] = corruptions
    result["wall_s"] = round(time.perf_counter() - began, 2)
    if rank.is_first:
        folder.write(VERDICTS, verdicts.to_parquet())
        folder.write_json(RESULT, result)
        ledger.delete()
    return result


@contextmanager
def nets_of(classifier: Classifier, copy: Classifier, question: Question) -> Iterator[tuple[Nets, Net | None]]:
    """The nets that an evaluation asks, and the branch that isn't measured, of a net with two.

    Args:
        classifier: the net that is measured, on the branch that is.
        copy: what attacks see.
        question: what is asked.
    """
    precision = question.config.precision
    with attacked(classifier, precision) as judge, attacked(copy, precision) as view:
        rest: Branch = "clean" if question.branch == "adv" else "adv"

        def other(pixels: Tensor) -> Tensor:
            with classifier.branch(rest):
                return judge(pixels)

        yield Nets(judge, view, classifier.dtype), other if classifier.is_split else None


def _described(question: Question, verdicts: Verdicts) -> dict[str, Any]:
    """The result's account of what was asked, and its accuracies."""
    config = question.config
    return {
        **accuracies(verdicts),
        "attack": config.attack,
        "norm": config.norm,
        "eps": config.eps,
        "attack_steps": attack_steps(config),
        "restarts": config.restarts,
        "precision": config.precision,
        "seed": config.seed,
        "num_samples": len(verdicts.samples),
        "weights": question.weights,
        "step": question.step,
        "branch": question.branch,
        "target": question.target,
        "transfer_from": question.transfer_from,
        "data": question.data,
        "data_sha256": question.data_sha256,
    }


def _warnings(question: Question, target: Target, verdicts: Verdicts, probed: Probed | None) -> list[str]:
    found = branch_warnings(question.branch, is_split=target.classifier.is_split)
    if probed:
        found += probe_warnings(probed.figures)
    counts = [(attack.name, int(verdicts.standing(i).sum())) for i, attack in enumerate(verdicts.attacks, 1)]
    if not question.transfer_from:
        found += square_warnings(counts, len(verdicts.samples))
        figures = accuracies(verdicts)
        found += notes_warnings(
            target.notes,
            clean_accuracy=figures["clean_accuracy"],
            robust_accuracy=figures["robust_accuracy"] if _is_as_noted(question.config, target.notes) else None,
            num_samples=len(verdicts.samples),
        )
    return found


def _is_as_noted(config: EvalConfig, notes: Mapping[str, Any]) -> bool:
    """Whether the ball is the one that an export's notes speak of."""
    return config.norm == notes.get("norm") and config.eps == notes.get("eps")


def _given(value: T | None) -> T:
    assert value is not None
    return value
