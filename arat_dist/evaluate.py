"""Clean and robust accuracy: sharded over the ranks, with exact counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from arat_dist.config import ClusterConfig, DataConfig, EvalConfig, Recipe
from arat_dist.data.loader import val_loader
from arat_dist.data.order import spread
from arat_dist.devices import own_device
from arat_dist.engine import Rank
from arat_dist.evaluation.attacks import evaluation_attacks
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.net import attacked
from arat_dist.evaluation.stages import Runner, Samples, default_batch_size
from arat_dist.evaluation.verdicts import Nets, Verdicts, measure
from arat_dist.models.classifier import Classifier


@dataclass(frozen=True)
class Scores:
    """Exact counts over all ranks, and the attack that they stand for.

    A sample counts as robust when it is right before and after the attack.
    """

    num_samples: int
    num_clean: int
    num_robust: int | None
    attack: str
    attack_steps: int
    norm: str
    eps: float

    @property
    def clean_accuracy(self) -> float:
        """Fraction of clean pictures that are classified rightly."""
        return self.num_clean / self.num_samples

    @property
    def robust_accuracy(self) -> float | None:
        """Fraction that is right before and after the attack; None without an attack."""
        return None if self.num_robust is None else self.num_robust / self.num_samples

    def summary(self) -> dict[str, Any]:
        """The keys of summary.json that it fills."""
        return {
            "clean_accuracy": self.clean_accuracy,
            "robust_accuracy": self.robust_accuracy,
            "robust_attack": self.attack,
            "norm": self.norm,
            "eps": self.eps,
            "attack_steps": self.attack_steps,
            "num_samples": self.num_samples,
        }


def evaluate(
    classifier: Classifier,
    data: DataConfig,
    config: EvalConfig,
    rank: Rank,
    beat: Callable[[], None] = lambda: None,
) -> Scores:
    """Evaluate on data.val with the attacks that the section names; every rank calls it and gets the same scores.

    What training measures itself by: the net as it is, on its adv branch, to the end: who is asked to stop meanwhile
    takes the next step's word for it, when there is something to save.

    Args:
        classifier: on the rank's device; its mode, branch and buffers stay as they are.
        data: the recipe's section.
        config: norm, eps and batch_size must be given (`eval_config` fills them from a recipe).
        rank: this process.
        beat: called at every pass of the net.

    Raises:
        UserError: a batch needs more memory than a GPU has.
    """
    assert config.batch_size is not None
    with (
        val_loader(data, config.batch_size) as loader,
        classifier.branch("adv"),
        attacked(classifier, config.precision, beat) as net,
    ):
        heedless = replace(rank, stop_wanted=lambda: False)
        runner = Runner(loader, Ledger(None), heedless, config.batch_size, beat)
        samples = subset(loader.num_samples, config)
        verdicts = measure(Nets(net, net, classifier.dtype), evaluation_attacks(config), runner, samples)
    return scores_of(verdicts, config)


def scores_of(verdicts: Verdicts, config: EvalConfig) -> Scores:
    """The counts of an evaluation, and what the section says of its attack."""
    assert config.norm is not None
    assert config.eps is not None
    return Scores(
        len(verdicts.samples),
        int(verdicts.clean_right.sum()),
        int(verdicts.standing().sum()) if verdicts.attacks else None,
        attack=config.attack,
        attack_steps=attack_steps(config),
        norm=config.norm,
        eps=config.eps,
    )


def eval_config(recipe: Recipe) -> EvalConfig:
    """The recipe's eval section, complete: what it doesn't say follows from the rest of the recipe.

    Norm and eps are those of the attack in training, the batch size goes by the device that the run trains on.
    """
    norm, eps = recipe.eval.norm or recipe.attack.norm, recipe.eval.eps or recipe.attack.eps
    batch_size = recipe.eval.batch_size or default_batch_size(recipe.data.image_size, _device_type(recipe.cluster))
    return recipe.eval.model_copy(update={"norm": norm, "eps": eps, "batch_size": batch_size})


def attack_steps(config: EvalConfig) -> int:
    """The most gradient steps that a start of the section's attacks takes; 0 where none asks for gradients."""
    return max((each.steps for each in evaluation_attacks(config) if each.name != "square"), default=0)


def subset(num_samples: int, config: EvalConfig) -> Samples:
    """The indices to evaluate, ascending: all, or as many as the section says, evenly spaced."""
    return spread(num_samples, min(num_samples, config.limit or num_samples))


def _device_type(cluster: ClusterConfig) -> str:
    """What the ranks of a run compute on."""
    if cluster.workers == 0:
        return own_device(cluster).type
    return "cuda" if cluster.gpus_per_worker else "cpu"
