"""What every method shares: a module that turns a batch into one loss and named parts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_dist.attacks import PGD
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import AttackMode

AllReduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks."""

COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16}


class Output(NamedTuple):
    """What a step yields.

    loss: 0-d, the mean over this rank's samples.
    metrics: flat, 0-d tensors still on the device, each a mean over this rank's samples; parts of the loss are named
        loss_PART, accuracies PART_accuracy.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Objective(nn.Module):
    """A training method. The trainer calls it once a step, through the engine, and knows nothing else of it.

    Args:
        classifier: the net in training; what the export takes home.
        attack: the attack in training, None where the method needs none.
        norm_stats: which statistics BatchNorm uses in the attack.
        precision: "fp32" or "bf16"; one autocast region spans the attack and the training passes.
        label_smoothing: mass of the target spread over all classes.
    """

    def __init__(
        self,
        classifier: Classifier,
        attack: PGD | None = None,
        *,
        norm_stats: Literal["batch", "running"] = "batch",
        precision: str = "fp32",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        self.classifier = classifier
        self.attack = attack
        self.label_smoothing = label_smoothing
        self._norm_stats = norm_stats
        self._dtype = COMPUTE_DTYPES[precision]
        self._attack_mode = AttackMode(classifier)

    def forward(self, images: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """One step's forward.

        Args:
            images: uint8 [B,3,H,W].
            labels: int64 [B].
            keys: int64 [B], names of the samples' visits, from which the attack's start is drawn.
        """
        pixels = to_pixels(images, self.classifier.dtype)
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            return self.losses(pixels, labels, keys)

    def losses(self, pixels: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """The method itself, on pixels in [0,1]; runs inside the autocast region."""
        raise NotImplementedError

    def sync(self, all_reduce: AllReduce) -> None:
        """Make whatever the method counts equal on all ranks; called before a checkpoint."""

    def end_epoch(self, all_reduce: AllReduce) -> None:
        """Refresh what the method adapts once an epoch."""

    def perturb(self, pixels: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """Adversarial pictures against the adv branch's cross-entropy; changes no buffer and no weight's gradient."""
        assert self.attack is not None
        with self._attack_mode(self._norm_stats), self.classifier.branch("adv"):
            return self.attack(lambda x: F.cross_entropy(self.classifier(x), labels, reduction="sum"), pixels, keys)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy with the recipe's label smoothing."""
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)


def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pictures to numbers in [0,1], memory format kept."""
    return images.to(dtype).div_(255)


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """Share of right answers, 0-d float, on the device."""
    return (logits.detach().argmax(1) == labels).float().mean()
