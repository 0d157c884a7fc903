"""ARAT's step as research code writes it: what the fused step is compared with, in results and in speed.

On purpose it shares nothing with the fused step but the layers: plain autograd, one autocast region a forward pass,
contiguous memory, hooks set for each pass. Its numbers are the fused step's, with `norm_stats: batch`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_dist.config import OptimConfig
from arat_dist.objectives.arat import ARAT
from arat_dist.optim import build_optimizer


class ReferenceStep:
    """Attack, two forward passes, one backward pass, one update, on copies of a method's layers.

    Args:
        arat: gives the layers, gamma and the weight of the adversarial term; stays as it is.
        optim: the optimizer.
        eps: radius of the ball in the norm linf, in pixel units.
        step_size: length of a step, in pixel units.
        steps: steps of PGD.
        dtype: what autocast computes in; None for no autocast.
        start: where the attack starts, as a distance from the pixels; uniform by default.
    """

    def __init__(
        self,
        arat: ARAT,
        optim: OptimConfig,
        *,
        eps: float,
        step_size: float,
        steps: int,
        dtype: torch.dtype | None = None,
        start: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        self.net = deepcopy(arat.classifier).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self.predictors = deepcopy(arat.predictors)
        self._gamma, self._adv_weight = arat.config.gamma, float(arat.adv_weight)
        self._eps, self._step_size, self._steps = eps, step_size, steps
        self._dtype = dtype
        self._start = start or (lambda pixels, _keys: torch.empty_like(pixels).uniform_(-eps, eps))
        self.optimizer = build_optimizer(nn.ModuleList([self.net, self.predictors]), optim)

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """One whole step; returns the loss, 0-d.

        Args:
            images: uint8 [B,3,H,W].
            labels: int64 [B].
            keys: int64 [B], for `start`.
        """
        pixels = self.pixels(images)
        loss = self.losses(self.attack(pixels, labels, keys), pixels, labels)
        self.update(loss)
        return loss.detach()

    def pixels(self, images: Tensor) -> Tensor:
        """Numbers in [0,1], contiguous."""
        return (images.to(self.net.dtype) / 255).contiguous()

    def attack(self, pixels: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """PGD against the adv branch, as it is in training; the running statistics move along."""
        adversarial = (pixels + self._start(pixels, keys)).clamp(0, 1)
        for _ in range(self._steps):
            adversarial.requires_grad_()
            with self._autocast(pixels):
                loss = F.cross_entropy(self.net(adversarial).to(pixels.dtype), labels)
            (gradient,) = torch.autograd.grad(loss, adversarial)
            adversarial = adversarial.detach() + self._step_size * gradient.sign()
            adversarial = torch.min(torch.max(adversarial, pixels - self._eps), pixels + self._eps).clamp(0, 1)
        return adversarial

    def losses(self, adversarial: Tensor, pixels: Tensor, labels: Tensor) -> Tensor:
        """The objective's loss, 0-d."""
        with self._autocast(pixels):
            adv_logits, adv_features = self._features(adversarial, "adv")
            clean_logits, clean_features = self._features(pixels, "clean")
            predictions = [h(z) for h, z in zip(self.predictors, adv_features, strict=True)]
        adv = F.cross_entropy(adv_logits.to(pixels.dtype), labels)
        clean = F.cross_entropy(clean_logits.to(pixels.dtype), labels)
        distances = [
            (1 - F.cosine_similarity(p.to(pixels.dtype), z.detach().to(pixels.dtype))).mean()
            for p, z in zip(predictions, clean_features, strict=True)
        ]
        invariance = torch.stack(distances).mean()
        return self._adv_weight * adv + (1 - self._adv_weight) * clean + self._gamma * invariance

    def update(self, loss: Tensor) -> None:
        """Backward pass and one step of the optimizer."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _features(self, pixels: Tensor, branch: str) -> tuple[Tensor, list[Tensor]]:
        """Logits, and the pooled output of each tap."""
        features: list[Tensor] = []

        def pool(_module: nn.Module, _args: object, output: Tensor) -> None:
            features.append(F.relu(output).mean((2, 3)) if output.ndim == 4 else output.mean(1))

        handles = [self.net.backbone.get_submodule(tap).register_forward_hook(pool) for tap in self.net.taps]
        try:
            with self.net.branch("adv" if branch == "adv" else "clean"):
                return self.net(pixels), features
        finally:
            for handle in handles:
                handle.remove()

    def _autocast(self, pixels: Tensor) -> torch.autocast:
        return torch.autocast(pixels.device.type, dtype=self._dtype, enabled=self._dtype is not None)
