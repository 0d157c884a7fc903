"""ARREST (Suzuki et al., ICCV 2023, arXiv 2308.16454), a reconstruction.

The paper's abstract names the parts: adversarial fine-tuning of a clean-trained net, a penalty on the distance between
the representations of the two, and noisy replay, which feeds pictures that are not adversarial where the representation
has changed much. There is no public code; the angle as the distance, the place where it is taken (the features before
the last layer), what a replayed picture is (uniform noise of the attack's radius) and all weights are ours.
"""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from arat_dist.config import ARRESTConfig
from arat_dist.losses import lifted
from arat_dist.models.classifier import Classifier
from arat_dist.objectives.base import Objective, Output, Setting, accuracy


class ARREST(Objective):
    """CE(f(x'), y) + weight * angle(h_f(x'), h_0(x)) / pi, h_0 the features of the frozen net that f started from.

    Where f's features of the clean picture have turned from h_0(x) by more than `replay_angle`, x' is a noisy picture
    instead of an attacked one.
    """

    trains_on = ("adv",)

    def __init__(self, classifier: Classifier, setting: Setting, config: ARRESTConfig):
        super().__init__(classifier, setting)
        self._config = config
        self.teacher = deepcopy(classifier).requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """The frozen net stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def begin_step(self, epoch: float) -> None:
        """The replayed pictures' noise follows the attack's radius."""
        super().begin_step(epoch)
        self._noise = self._setting.attack and self._setting.attack.noise_at(epoch)

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """Attacked or replayed pictures through f, clean ones through the frozen net."""
        assert self._noise is not None
        with torch.no_grad():
            anchor = self.teacher.forward_with_penultimate(pixels)[1]
            with self._attack_mode("running"):
                turned = angle(self.classifier.forward_with_penultimate(pixels)[1], anchor)
        replayed = turned > self._config.replay_angle
        adversarial = self.perturb(pixels, targets, keys)
        inputs = torch.where(replayed.view(-1, 1, 1, 1), self._noise(pixels, keys), adversarial)
        logits, features = self.classifier.forward_with_penultimate(inputs)
        adv = self.cross_entropy(logits, targets)
        distance = angle(features, anchor).mean()
        weighted = self._config.angle_weight * distance
        return Output(
            adv + weighted,
            {
                "loss_adv": adv.detach(),
                "loss_angle": distance.detach(),
                "robust_accuracy": accuracy(logits, targets),
                "replayed": replayed.float().mean(),
            },
            {"classification": adv, "invariance": weighted},
        )


def angle(features: Tensor, anchor: Tensor) -> Tensor:
    """Angle between each pair of rows of [B,d], in units of pi, [B]."""
    cosine = F.cosine_similarity(lifted(features), lifted(anchor))
    # The slope of arccos is infinite at its ends.
    return torch.acos(cosine.clamp(-1 + 1e-6, 1 - 1e-6)) / math.pi
