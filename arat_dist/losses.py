"""Losses of single samples: what attacks climb and what methods average. All return [B], in at least float32.

Half precision is lifted first: bf16 has too few digits for a loss, or for the difference of two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy, [B].

    Args:
        logits: [B,C].
        targets: int64 [B], or float [B,C], the shares of the classes (mixup, label smoothing).
    """
    logits = lifted(logits)
    if targets.is_floating_point():
        targets = targets.to(logits.dtype)
    return F.cross_entropy(logits, targets, reduction="none")


def kl(logits: Tensor, reference_logits: Tensor) -> Tensor:
    """KL(softmax(reference) || softmax(logits)), [B], of two [B,C]; differentiable in both.

    It is zero, and so is its gradient, where the two are equal: an attack that climbs it needs a start off the centre.
    """
    log_p = F.log_softmax(lifted(logits), 1)
    log_q = F.log_softmax(lifted(reference_logits), 1)
    return (log_q.exp() * (log_q - log_p)).sum(1)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio, [B]: -(z_y - max_{k != y} z_k) / (z_(1) - z_(3)), z_(i) the i-th largest logit.

    In [-1,0] while y wins, positive from then on, and blind to a shift and to the scale of the logits.
    Source: Croce & Hein 2020, arXiv 2003.01690; 1e-12 in the denominator as in their code.

    Args:
        logits: [B,C].
        labels: int64 [B], or float [B,C], whose largest class counts.

    Raises:
        ValueError: fewer than 3 classes.
    """
    _check_classes("dlr", logits, 3)
    logits, labels = lifted(logits), hard_labels(labels)
    first, second, third = logits.topk(3).values.unbind(1)
    own = _pick(logits, labels)
    other = torch.where(logits.argmax(1) == labels, second, first)
    return (other - own) / (first - third + 1e-12)


def targeted_dlr(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """DLR towards a class, [B]: -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2), z_(i) the i-th largest logit.

    Source: Croce & Hein 2020, arXiv 2003.01690; 1e-12 in the denominator as in their code.

    Args:
        logits: [B,C].
        labels: int64 [B], or float [B,C], whose largest class counts.
        targets: int64 [B], the class that the attack wants.

    Raises:
        ValueError: fewer than 4 classes.
    """
    _check_classes("targeted_dlr", logits, 4)
    logits = lifted(logits)
    first, _, third, fourth = logits.topk(4).values.unbind(1)
    return (_pick(logits, targets) - _pick(logits, hard_labels(labels))) / (first - (third + fourth) / 2 + 1e-12)


def hard_labels(targets: Tensor) -> Tensor:
    """One class a sample, int64 [B], out of such or of float [B,C], whose largest counts."""
    return targets.argmax(1) if targets.is_floating_point() else targets


def lifted(logits: Tensor) -> Tensor:
    """The logits in at least float32."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _pick(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes[:, None]).squeeze(1)


def _check_classes(name: str, logits: Tensor, least: int) -> None:
    if logits.shape[1] < least:
        raise ValueError(f"{name}: {logits.shape[1]} classes: at least {least} would be right, or cross_entropy")
