"""LBGAT (Cui et al., ICCV 2021, arXiv 2011.11164): a clean net trained along gives the boundary to follow."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from arat_dist.config import LBGATConfig
from arat_dist.losses import kl, lifted
from arat_dist.models.classifier import Classifier
from arat_dist.objectives.attack import TRADES_ATTACK
from arat_dist.objectives.base import Objective, Output, Setting, accuracy


class LBGAT(Objective):
    """MSE(f(x'), g(x)) over the logits, which moves both nets, + CE(g(x), y) + beta KL(f(x) || f(x')).

    Args:
        classifier: f, what the export takes home.
        setting: what the recipe gives to every method.
        config: the recipe's section.
        teacher: g, trained on clean pictures and, through the MSE, towards f.
    """

    attack_defaults = TRADES_ATTACK

    def __init__(self, classifier: Classifier, setting: Setting, config: LBGATConfig, teacher: Classifier):
        super().__init__(classifier, setting)
        self.teacher = teacher
        self._beta = config.beta
        self.trains_on = ("adv", "clean") if config.beta else ("adv",)

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """Adversarial pictures through f, clean ones through g, and through f too where beta asks."""
        adversarial = self.perturb(pixels, targets, keys)
        adv_logits, teacher_logits = self.classifier(adversarial), self.teacher(pixels)
        guide = F.mse_loss(lifted(adv_logits), lifted(teacher_logits))
        teacher = self.cross_entropy(teacher_logits, targets)
        loss = guide + teacher
        metrics = {
            "loss_guide": guide.detach(),
            "loss_teacher": teacher.detach(),
            "teacher_accuracy": accuracy(teacher_logits, targets),
            "robust_accuracy": accuracy(adv_logits, targets),
        }
        if self._beta:
            clean_logits = self.classifier(pixels)
            invariance = kl(adv_logits, clean_logits).mean()
            loss = loss + self._beta * invariance
            metrics |= {"loss_kl": invariance.detach(), "clean_accuracy": accuracy(clean_logits, targets)}
        return Output(loss, metrics)
