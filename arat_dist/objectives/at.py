"""Adversarial training (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from torch import Tensor

from arat_dist.objectives.base import Objective, Output, accuracy


class AT(Objective):
    """CE(f(x'), y)."""

    trains_on = ("adv",)

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """Adversarial pictures only."""
        logits = self.classifier(self.perturb(pixels, targets, keys))
        loss = self.cross_entropy(logits, targets)
        return Output(loss, {"loss_adv": loss.detach(), "robust_accuracy": accuracy(logits, targets)})
