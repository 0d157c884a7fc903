"""ARAT: asymmetrically representation-regularised adversarial training (Waseda et al., ICLR 2025, arXiv 2402.14648).

    loss = w_adv CE(f_adv(x'), y) + w_cln CE(f_cln(x), y) + (gamma / |L|) sum_l Dist(h_l(z'_l), sg(z_l))

f_adv and f_cln are one net with two branches of norm layers; z'_l and z_l are its pooled features at tap l, h_l a
predictor, sg the stop-gradient. The paper's ablation is the switches of `ARATConfig`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_dist.config import ARATConfig
from arat_dist.losses import hard_labels
from arat_dist.models.classifier import Classifier
from arat_dist.objectives.base import AllReduce, Objective, Output, Setting, accuracy


class ARAT(Objective):
    """The objective with its predictors and the balance of its two classification terms.

    Buffers: `adv_weight` is w_adv; `counts` the right answers of the clean branch and the samples of this epoch that
    all ranks know of, `local_counts` those that this rank has not shared yet.
    """

    adv_weight: Tensor
    counts: Tensor
    local_counts: Tensor

    def __init__(self, classifier: Classifier, setting: Setting, config: ARATConfig):
        super().__init__(classifier, setting)
        self.config = config
        dims = classifier.tap_dims if config.predictor else ()
        self.predictors = nn.ModuleList(Predictor(dim) for dim in dims)
        self.register_buffer("adv_weight", torch.tensor(config.adv_weight))
        self.register_buffer("counts", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("local_counts", torch.zeros(2, dtype=torch.int64))

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """Attack the adv branch, run both branches, weigh the three terms."""
        adversarial = self.perturb(pixels, targets, keys)
        with self.classifier.branch("adv"):
            adv_logits, adv_features = self.classifier.forward_with_taps(adversarial)
        with self.classifier.branch("clean"):
            clean_logits, clean_features = self.classifier.forward_with_taps(pixels)
        self._count(clean_logits, targets)

        adv = self.cross_entropy(adv_logits, targets)
        clean = self.cross_entropy(clean_logits, targets)
        invariance = self.invariance(adv_features, clean_features)
        classification = self.adv_weight * adv + (1 - self.adv_weight) * clean
        weighted = self.config.gamma * invariance
        return Output(
            classification + weighted,
            {
                "loss_adv": adv.detach(),
                "loss_clean": clean.detach(),
                "loss_invariance": invariance.detach(),
                "clean_accuracy": accuracy(clean_logits, targets),
                "robust_accuracy": accuracy(adv_logits, targets),
                "adv_weight": self.adv_weight.detach().clone(),
            },
            {"classification": classification, "invariance": weighted},
        )

    def invariance(self, adv_features: list[Tensor], clean_features: list[Tensor]) -> Tensor:
        """Mean over the taps of the distance between the branches' features, [B, d_l] each; 0-d."""
        if not adv_features:
            return self.adv_weight.new_zeros(())
        predictors = self.predictors if self.config.predictor else [nn.Identity()] * len(adv_features)
        follow = [
            self._distance(predictor(adv), self._target(clean))
            for predictor, adv, clean in zip(predictors, adv_features, clean_features, strict=True)
        ]
        if not self.config.symmetric:
            return torch.stack(follow).mean()
        lead = [
            self._distance(predictor(clean), self._target(adv))
            for predictor, adv, clean in zip(predictors, adv_features, clean_features, strict=True)
        ]
        return (torch.stack(follow).mean() + torch.stack(lead).mean()) / 2

    def sync(self, all_reduce: AllReduce) -> None:
        """Share the counts of this rank with all."""
        self.counts += all_reduce(self.local_counts.clone())
        self.local_counts.zero_()

    def end_epoch(self, all_reduce: AllReduce) -> None:
        """With balance auto: w_adv becomes the clean branch's accuracy over the epoch's own forward passes."""
        self.sync(all_reduce)
        if self.config.balance == "auto":
            # As it was after an epoch whose every step was skipped: nothing was counted.
            right, seen = self.counts.to(self.adv_weight).unbind()
            self.adv_weight.copy_(torch.where(seen > 0, right / seen, self.adv_weight))
        self.counts.zero_()

    def _target(self, features: Tensor) -> Tensor:
        return features.detach() if self.config.stop_gradient else features

    def _distance(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Mean over the batch, in at least float32: bf16 has too few digits for 1 - cos near 0."""
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        prediction, target = prediction.to(dtype), target.to(dtype)
        with torch.autocast(prediction.device.type, enabled=False):
            if self.config.distance == "mse":
                return F.mse_loss(prediction, target)
            return (1 - F.cosine_similarity(prediction, target)).mean()

    def _count(self, clean_logits: Tensor, targets: Tensor) -> None:
        with torch.no_grad():
            self.local_counts[0] += (clean_logits.argmax(1) == hard_labels(targets)).sum()
            self.local_counts[1] += len(targets)


class Predictor(nn.Sequential):
    """Bottleneck on the side that follows: [B, d] -> [B, d]."""

    def __init__(self, dim: int):
        hidden = max(1, dim // 4)
        super().__init__(
            nn.Linear(dim, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, dim)
        )
