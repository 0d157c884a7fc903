"""TRADES (Zhang et al. 2019, arXiv 1901.08573)."""

from __future__ import annotations

from torch import Tensor

from arat_dist.config import TRADESConfig
from arat_dist.losses import kl
from arat_dist.models.classifier import Classifier
from arat_dist.objectives.attack import TRADES_ATTACK
from arat_dist.objectives.base import Objective, Output, Setting, accuracy


class TRADES(Objective):
    """CE(f(x), y) + beta KL(f(x) || f(x')); the KL term moves both sides."""

    attack_defaults = TRADES_ATTACK

    def __init__(self, classifier: Classifier, setting: Setting, config: TRADESConfig):
        super().__init__(classifier, setting)
        self._beta = config.beta

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """Clean and adversarial pictures through one net."""
        adversarial = self.perturb(pixels, targets, keys)
        clean_logits, adv_logits = self.classifier(pixels), self.classifier(adversarial)
        clean = self.cross_entropy(clean_logits, targets)
        invariance = kl(adv_logits, clean_logits).mean()
        return Output(
            clean + self._beta * invariance,
            {
                "loss_clean": clean.detach(),
                "loss_kl": invariance.detach(),
                "clean_accuracy": accuracy(clean_logits, targets),
                "robust_accuracy": accuracy(adv_logits, targets),
            },
            {"classification": clean, "invariance": self._beta * invariance},
        )
