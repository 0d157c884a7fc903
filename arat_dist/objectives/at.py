"""Adversarial training (Madry et al. 2018, arXiv 1706.06083)."""

from __future__ import annotations

from torch import Tensor

from arat_dist.objectives.base import Objective, Output, accuracy


class AT(Objective):
    """CE(f(x'), y)."""

    def losses(self, pixels: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """Adversarial pictures only."""
        logits = self.classifier(self.perturb(pixels, labels, keys))
        loss = self.cross_entropy(logits, labels)
        return Output(loss, {"loss_adv": loss.detach(), "robust_accuracy": accuracy(logits, labels)})
