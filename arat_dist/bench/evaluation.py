"""`arat bench eval`: our APGD against its authors' code, and workers that share an evaluation against one alone."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from arat_dist.bench.ranks import RankGroup
from arat_dist.bench.step import OnProgress
from arat_dist.config import EvalConfig
from arat_dist.data.loader import val_loader
from arat_dist.engine import Rank
from arat_dist.errors import UserError
from arat_dist.evaluate import subset
from arat_dist.evaluation.attacks import LIBRARY_NORMS, evaluation_attacks
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.net import attacked, fast_copy
from arat_dist.evaluation.stages import Runner, pixels_of
from arat_dist.evaluation.verdicts import Nets, measure, predictions_of
from arat_dist.models.classifier import Classifier
from arat_dist.numerics import evaluation_numerics
from arat_dist.targets import Target, Weights, open_target

ATTACKS = ("apgd-ce", "apgd-t")


def bench_attacks(
    target: Target, config: EvalConfig, device: torch.device, *, repeats: int, on_progress: OnProgress
) -> dict[str, Any]:
    """Time both codes' APGD-CE and APGD-T on one batch, in turn, `repeats` times after a warm-up.

    Ours is timed with the making of the copy that it attacks; the authors' as its users run it, on the net as it is.

    Args:
        target: the net and its pictures.
        config: norm, eps, seed, and limit: the pictures of the batch.
        device: where both compute.
        repeats: rounds.
        on_progress: told what comes next.

    Returns:
        For each attack: medians in seconds, the median of the rounds' ratios, what either leaves robust, and the share
        of pictures on which they agree.
    """
    classifier = target.classifier.to(device)
    with val_loader(target.data, config.limit or 128) as loader:
        batch = next(iter(loader.iterate([subset(loader.num_samples, config)])))
        pixels, labels, keys = pixels_of(batch.images, classifier.dtype), batch.labels.clone(), batch.keys.clone()
    pixels, labels, keys = pixels.to(device), labels.to(device), keys.to(device)
    right = predictions_of(classifier, pixels) == labels
    if not right.any():
        raise UserError(f"{target.uri}: has no picture right: nothing to attack")
    pixels, labels, keys = pixels[right], labels[right], keys[right]
    batch = pixels, labels, keys
    with evaluation_numerics():
        return {name: _compare(name, classifier, config, batch, repeats, on_progress) for name in ATTACKS}


def _compare(
    name: str,
    classifier: Classifier,
    config: EvalConfig,
    batch: tuple[Tensor, Tensor, Tensor],
    repeats: int,
    on_progress: OnProgress,
) -> dict[str, Any]:
    pixels, labels, keys = batch

    def ours() -> Tensor:
        (attack,) = evaluation_attacks(config.model_copy(update={"attack": name}))
        with attacked(fast_copy(classifier, pixels[:4])) as net:
            return attack(net, pixels, labels, keys)

    theirs = _library_attack(name, classifier, config)
    runs = {"ours": ours, "theirs": lambda: theirs(pixels.contiguous(), labels)}
    seconds: dict[str, list[float]] = {which: [] for which in runs}
    stands = {}
    for round_number in range(repeats + 1):
        on_progress(f"{name}: " + (f"round {round_number} of {repeats}" if round_number else "warming up"))
        # Who goes first changes: the machine warms up, and slows down, in the course of a round.
        for which in sorted(runs, reverse=bool(round_number % 2)):
            began = time.perf_counter()
            pictures = runs[which]()
            if pixels.is_cuda:
                torch.cuda.synchronize()
            if round_number:
                seconds[which].append(time.perf_counter() - began)
            stands[which] = predictions_of(classifier, pictures) == labels
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(seconds["ours"], seconds["theirs"], strict=True)]
    return {
        "num_attacked": len(labels),
        "ours_s": statistics.median(seconds["ours"]),
        "theirs_s": statistics.median(seconds["theirs"]),
        "speedup": statistics.median(ratios),
        "speedups": ratios,
        "ours_robust": float(stands["ours"].float().mean()),
        "theirs_robust": float(stands["theirs"].float().mean()),
        "agreement": float((stands["ours"] == stands["theirs"]).float().mean()),
    }


def _library_attack(name: str, classifier: Classifier, config: EvalConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The authors' attack with the settings of their standard version."""
    from pyautoattack import AutoAttack

    assert config.norm is not None
    assert config.eps is not None
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    suite = AutoAttack(
        classifier, norm=LIBRARY_NORMS[config.norm], eps=config.eps, seed=config.seed, device=classifier.mean.device
    )
    attack = suite.apgd_targeted if name == "apgd-t" else suite.apgd
    attack.seed = config.seed
    return attack.perturb


class RankEvaluation:
    """An evaluation again and again, on one rank, without a ledger.

    Args:
        rank: this process.
        uri: the target's.
        weights: of a run.
        val: a .beton.
        config: attack, norm, eps, limit, batch size.
    """

    def __init__(self, rank: Rank, uri: str, weights: Weights | None, val: str, config: EvalConfig):
        self._rank, self._config = rank, config
        target = open_target(uri, weights=weights, val=val)
        self._classifier = target.classifier
        assert config.batch_size is not None, "open_wanted fills it in"
        self._loader, self._batch_size = val_loader(target.data, config.batch_size), config.batch_size

    def __call__(self) -> tuple[float, int]:
        """Seconds from when all ranks begin until all have the verdicts, and how many samples stand."""
        samples = subset(self._loader.num_samples, self._config)
        first = next(iter(self._loader.iterate([samples[:4]])))
        copy = fast_copy(self._classifier, pixels_of(first.images, self._classifier.dtype))
        self._rank.all_reduce(torch.zeros(()))
        began = time.perf_counter()
        with attacked(self._classifier) as judge, attacked(copy) as view:
            runner = Runner(self._loader, Ledger(None), self._rank, self._batch_size)
            verdicts = measure(Nets(judge, view), evaluation_attacks(self._config), runner, samples)
        return time.perf_counter() - began, int(verdicts.standing().sum())


def bench_workers(
    target: Target, config: EvalConfig, *, workers: int, repeats: int, on_progress: OnProgress
) -> dict[str, Any]:
    """Time some workers of one thread against one such worker, in turn, `repeats` times.

    Args:
        target: the net and its pictures.
        config: attack, norm, eps, limit, batch size.
        workers: processes on this machine's CPU.
        repeats: rounds.
        on_progress: told what comes next.

    Raises:
        RuntimeError: they came to other verdicts.
    """
    args = (RankEvaluation, target.uri, target.weights, target.data.val, config)
    seconds: list[tuple[float, float]] = []
    with RankGroup(workers, 1, "cpu", *args) as many, RankGroup(1, 1, "cpu", *args) as one:
        for i in range(repeats):
            on_progress(f"{config.attack}: round {i + 1} of {repeats}")
            answers = {group: group() for group in ((many, one) if i % 2 else (one, many))}
            standing = {count for answer in answers.values() for _, count in answer}
            if len(standing) > 1:
                raise RuntimeError(f"one worker and {workers} leave different samples standing: {sorted(standing)}")
            seconds.append((max(s for s, _ in answers[many]), max(s for s, _ in answers[one])))
    ratios = [alone / together for together, alone in seconds]
    return {
        "attack": config.attack,
        "workers": workers,
        f"{workers}x1_s": statistics.median(together for together, _ in seconds),
        "1x1_s": statistics.median(alone for _, alone in seconds),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }
