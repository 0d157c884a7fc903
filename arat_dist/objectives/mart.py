"""MART (Wang et al., ICLR 2020): misclassified pictures weigh more."""

from __future__ import annotations

import torch
from torch import Tensor

from arat_dist.config import MARTConfig
from arat_dist.losses import hard_labels, kl, lifted
from arat_dist.models.classifier import Classifier
from arat_dist.objectives.attack import MART_ATTACK
from arat_dist.objectives.base import Objective, Output, Setting, accuracy


class MART(Objective):
    """BCE(f(x'), y) + lambda KL(f(x) || f(x')) (1 - p_y(x)), BCE = CE - log(1.0001 - max_{k != y} p_k(x'))."""

    attack_defaults = MART_ATTACK

    def __init__(self, classifier: Classifier, setting: Setting, config: MARTConfig):
        super().__init__(classifier, setting)
        self._kl_weight = config.kl_weight

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """Clean and adversarial pictures through one net."""
        adversarial = self.perturb(pixels, targets, keys)
        clean_logits, adv_logits = self.classifier(pixels), self.classifier(adversarial)
        adv = self.cross_entropy(adv_logits, targets) + margin(adv_logits, targets).mean()
        unsure = 1 - probability(clean_logits, targets)
        weighted_kl = (kl(adv_logits, clean_logits) * unsure).mean()
        return Output(
            adv + self._kl_weight * weighted_kl,
            {
                "loss_adv": adv.detach(),
                "loss_kl": weighted_kl.detach(),
                "clean_accuracy": accuracy(clean_logits, targets),
                "robust_accuracy": accuracy(adv_logits, targets),
            },
            {"classification": adv, "invariance": self._kl_weight * weighted_kl},
        )


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """-log(1.0001 - max_{k != y} p_k), [B]; of mixed targets y is the class with the largest share."""
    probabilities = lifted(logits).softmax(1)
    own = torch.arange(logits.shape[1], device=logits.device) == hard_labels(targets)[:, None]
    return -torch.log(1.0001 - probabilities.masked_fill(own, 0).amax(1))


def probability(logits: Tensor, targets: Tensor) -> Tensor:
    """p_y, [B]; of mixed targets their mean by share."""
    probabilities = lifted(logits).softmax(1)
    if targets.ndim == 1:
        return probabilities.gather(1, targets[:, None])[:, 0]
    return (probabilities * targets).sum(1)
