"""Plain training on clean pictures: the contrast to every robust method."""

from __future__ import annotations

from torch import Tensor

from arat_dist.objectives.base import Objective, Output, accuracy


class Standard(Objective):
    """CE(f(x), y)."""

    trains_on = ("clean",)

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:  # noqa: ARG002
        """Clean pictures only."""
        logits = self.classifier(pixels)
        loss = self.cross_entropy(logits, targets)
        return Output(loss, {"loss_clean": loss.detach(), "clean_accuracy": accuracy(logits, targets)})
