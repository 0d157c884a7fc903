"""What every method shares: a module that turns a batch into one loss and named parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arat_dist.fusion import fused, fusible
from arat_dist.losses import hard_labels, lifted
from arat_dist.mixing import Mixing
from arat_dist.models.classifier import Classifier
from arat_dist.models.cpu_ops import is_traced_rightly, on_cpu
from arat_dist.models.precision import COMPUTE_DTYPES, StepWeights, WeightsInPlace, amplified
from arat_dist.models.split_norm import AttackMode, Branch
from arat_dist.models.sync_norm import num_ranks
from arat_dist.objectives.attack import AttackDefaults, TrainingAttack

AllReduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks."""


@dataclass(frozen=True)
class Output:
    """What a step yields.

    Attributes:
        loss: 0-d, the mean over this rank's samples.
        metrics: flat, 0-d tensors still on the device, each a mean over this rank's samples; parts of the loss are
            named loss_PART, accuracies PART_accuracy.
        terms: the weighted parts of the loss, 0-d with their graph, whose gradients the diagnostics compare.
    """

    loss: Tensor
    metrics: dict[str, Tensor]
    terms: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """What a recipe gives to every method.

    Attributes:
        attack: the attack in training.
        precision: "fp32", "bf16" or "fp16"; one autocast region spans the attack and the training passes.
        label_smoothing: mass of the target spread over all classes.
        mixing: blends pictures and labels in pairs, None for pictures as they are.
    """

    attack: TrainingAttack | None = None
    precision: str = "fp32"
    label_smoothing: float = 0.0
    mixing: Mixing | None = None


class Objective(nn.Module):
    """A training method. The trainer calls it once a step, through the engine, and knows nothing else of it.

    Args:
        classifier: the net in training; what the export takes home.
        setting: what the recipe gives to every method.
    """

    attack_defaults: ClassVar[AttackDefaults] = AttackDefaults()
    trains_on: tuple[Branch, ...] = ("adv", "clean")
    """What pictures go through the net in training."""

    def __init__(self, classifier: Classifier, setting: Setting):
        super().__init__()
        self.classifier = classifier
        self._setting = setting
        self._dtype = COMPUTE_DTYPES[setting.precision]
        self._attack_mode = AttackMode(classifier)
        self._compiled: dict[Classifier, Callable[[Tensor], Tensor]] = {}
        self._compiled_sizes: Set[int] = frozenset()
        self._weights_stay = False
        self.begin_step(math.inf)

    def begin_step(self, epoch: float) -> None:
        """Set what changes in the course of the run; `epoch` counts from 0, in parts of one."""
        self._attack = self._setting.attack and self._setting.attack.at(epoch)

    @property
    def step_kind(self) -> Hashable:
        """What the host decides of a step beside its sizes: steps of one kind run the same kernels."""
        return self._attack

    def forward(self, images: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """One step's forward.

        Args:
            images: uint8 [B,3,H,W].
            labels: int64 [B].
            keys: int64 [B], names of the samples' visits, from which the attack's start is drawn.
        """
        with self._arithmetic(len(images), images.device):
            pixels, targets = to_pixels(images, self.classifier.dtype), labels
        if self._setting.mixing is not None:
            pixels, targets = self._setting.mixing(pixels, labels, keys)
        with self.passes(len(images), images.device):
            return self.losses(pixels, targets, keys)

    @contextmanager
    def passes(self, batch_size: int, device: torch.device) -> Iterator[None]:
        """What all passes of a step share: one autocast region, weights cast once, compiled nets."""
        with ExitStack() as stack:
            stack.enter_context(self.autocast(device))
            stack.enter_context(self._weights.cast())
            stack.enter_context(self._arithmetic(batch_size, device))
            for classifier, run in self._compiled.items() if batch_size in self._compiled_sizes else ():
                stack.enter_context(classifier.running(run))
            yield

    def _arithmetic(self, batch_size: int, device: torch.device) -> AbstractContextManager[None]:
        """Inside, the attack's arithmetic is compiled where the nets are, on a GPU: a CPU's launches are cheap."""
        is_fused = batch_size in self._compiled_sizes and device.type == "cuda"
        return fused() if is_fused else nullcontext()

    def compile_backbones(self, batch_sizes: Set[int], num_sides: int = 1) -> None:
        """Compile every net for batches of these sizes; others, such as a run's last, run uncompiled.

        The passes of a step become graphs of their own (attack, adv branch, clean branch), by what differs between
        them: an attacked net has no weight that asks for a gradient, so its graph computes none. So do pictures of each
        of `num_sides` sides, at the first step that has them; all graphs are kept.
        """
        from torch._dynamo import config as dynamo_config  # takes seconds

        # torch would cut every graph where DDP's buckets end, attacks included; DDP's hooks sit on the master weights.
        dynamo_config.optimize_ddp = False
        # Graphs of one net: two sizes of up to four kinds of passes, and a second net of the same class beside it.
        num_graphs = 16 * num_sides
        dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, num_graphs)
        dynamo_config.accumulated_recompile_limit = max(dynamo_config.accumulated_recompile_limit, num_graphs)
        nets = [module for module in self.modules() if isinstance(module, Classifier)]
        for net in nets:
            is_on_cpu = net.mean.device.type == "cpu"
            self._compiled[net] = _on_cpu(net) if is_on_cpu else torch.compile(net.run_backbone, dynamic=False)
        self._compiled_sizes = batch_sizes

    def keep_weights_in_place(self) -> None:
        """Let all passes use the parameters themselves; see `WeightsInPlace`. Called before the first step."""
        self._weights_stay = True

    @cached_property
    def _weights(self) -> StepWeights | WeightsInPlace:
        """Of all parts; made at the first step, when methods have added theirs."""
        together = self.classifier.mean.is_cuda and num_ranks() == 1
        return WeightsInPlace() if self._weights_stay else StepWeights(self, self._dtype, together=together)

    def autocast(self, device: torch.device) -> torch.autocast:
        """The precision of attack and training passes."""
        # The cache would hold every weight whole, and without a graph those that an attack uses first under no_grad.
        return torch.autocast(
            device.type, dtype=self._dtype, enabled=self._dtype is not None, cache_enabled=not self._weights_stay
        )

    def losses(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Output:
        """The method itself; runs inside the autocast region.

        Args:
            pixels: float [B,3,H,W] in [0,1].
            targets: int64 [B], or shares of the classes [B,C] where pictures are mixed.
            keys: int64 [B].
        """
        raise NotImplementedError

    def sync(self, all_reduce: AllReduce) -> None:
        """Make whatever the method counts equal on all ranks; called before a checkpoint."""

    def end_epoch(self, all_reduce: AllReduce) -> None:
        """Refresh what the method adapts once an epoch."""

    def inputs(self, classifier: Classifier, pixels: Tensor, labels: Tensor, keys: Tensor) -> dict[Branch, Tensor]:
        """What a net like this one is trained on, for each branch: clean pixels, or pixels attacked for it."""
        return {
            branch: pixels if branch == "clean" else self.perturb_net(classifier, pixels, labels, keys)
            for branch in self.trains_on
        }

    def perturb(self, pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
        """Adversarial pictures against the adv branch; changes no buffer and no weight's gradient."""
        return self.perturb_net(self.classifier, pixels, targets, keys)

    def perturb_net(self, classifier: Classifier, pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
        """`perturb` against a net of the same kind, an average of weights for example."""
        setting, attack = self._setting.attack, self._attack
        assert setting is not None
        assert attack is not None
        mode = self._attack_mode if classifier is self.classifier else AttackMode(classifier)
        net = classifier
        if self._dtype is torch.float16:
            net = amplified(net, per_sample=setting.norm_stats == "running" or not mode.has_batch_norms)
        with mode(setting.norm_stats), classifier.branch("adv"), self._weights.detached():
            return attack(setting.loss(net, pixels, targets, keys), pixels, keys)

    def cross_entropy(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy with the recipe's label smoothing."""
        return F.cross_entropy(lifted(logits), targets, label_smoothing=self._setting.label_smoothing)


def _on_cpu(net: Classifier) -> Callable[[Tensor], Tensor]:
    """The net compiled with this project's operations for CPUs, which leave the normalisation of pixels outside.

    Without them before torch 2.14: compiled by 2.11 their BatchNorm has a wrong gradient, uncompiled a right one.
    """
    forward = net.backbone.forward
    run = torch.compile(on_cpu(forward) if is_traced_rightly() else forward, dynamic=False)
    return lambda pixels: run(net.normalise(pixels))


@fusible
def to_pixels(images: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 pictures to numbers in [0,1], memory format kept."""
    return images.to(dtype).div_(255)


def accuracy(logits: Tensor, targets: Tensor) -> Tensor:
    """Share of right answers, 0-d float, on the device."""
    return (logits.detach().argmax(1) == hard_labels(targets)).float().mean()
