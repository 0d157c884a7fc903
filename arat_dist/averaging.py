"""Averages of the weights over the run, EMA and SWA, and the statistics of their norms in both branches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Self

import torch
from torch import Tensor, nn

from arat_dist.config import Recipe
from arat_dist.data.loader import Loader, train_loader
from arat_dist.data.manifest import load_manifest
from arat_dist.data.order import Keys, spread
from arat_dist.engine import Rank
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import BATCH_NORMS, AttackMode
from arat_dist.objectives.base import Objective, to_pixels


class Average:
    """A net whose weights, and its norms' running statistics, are a mean over the course of the run.

    torch's AveragedModel would read a counter from the GPU at every update, and its even average fails there on the
    norms' integer counters; here the counter is a function of the step.

    Args:
        classifier: the net in training, whole: before an engine shards it.
        share: what the newest weights count for when so many have gone in before.
        first: step after which the first weights go in; those as they are.
        every: steps between two.
    """

    def __init__(self, classifier: Classifier, share: Callable[[int], float], *, first: int, every: int):
        copied = deepcopy(classifier).requires_grad_(False)
        self.classifier = copied.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._share, self.first, self._every = share, first, every
        self._count = 0

    @property
    def has_begun(self) -> bool:
        """Whether any weights have gone in."""
        return self._count > 0

    def count(self, done: int) -> int:
        """How many weights have gone in when so many steps are done."""
        return max(0, (done - self.first) // self._every + 1)

    def is_due(self, done: int) -> bool:
        """Whether the weights after so many steps are among those that count."""
        return done >= self.first and (done - self.first) % self._every == 0

    def update(self, classifier: Classifier, done: int) -> None:
        """Take in the weights after a step, if it is one of those that count."""
        if not self.is_due(done):
            return
        pairs = list(zip(_tensors(self.classifier), _tensors(classifier), strict=True))
        moving = [(mean, now) for mean, now in pairs if mean.is_floating_point()]
        share = self._share(self._count) if self._count else 1.0
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage] - one kernel for hundreds of tensors
            [mean for mean, _ in moving], [now for _, now in moving], share
        )
        counters = [(mean, now) for mean, now in pairs if not mean.is_floating_point()]
        if counters:
            torch._foreach_copy_(  # pyright: ignore[reportPrivateImportUsage]
                [mean for mean, _ in counters], [now for _, now in counters]
            )
        self._count = self.count(done)

    def resume(self, state: Mapping[str, Tensor] | None, done: int) -> None:
        """Take up the averaged net's state dict, None where nothing had gone in, after so many steps."""
        if state is not None:
            self.classifier.load_state_dict(state)
        self._count = self.count(done)


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    return (tensor.detach() for tensor in (*module.parameters(), *module.buffers()))


def build_averages(recipe: Recipe, classifier: Classifier, num_samples: int) -> dict[str, Average]:
    """The averages that the recipe asks for, by name: ema, swa; the last one is the run's result."""
    train = recipe.train
    averages = {}
    if (decay := train.ema_decay) is not None:
        averages["ema"] = Average(classifier, lambda n: 1 - ema_decay_at(n, decay), first=1, every=1)
    if train.swa_start_epoch is not None:
        first = swa_first_step(train.swa_start_epoch, num_samples, train.global_batch_size)
        averages["swa"] = Average(classifier, lambda n: 1 / (n + 1), first=first, every=train.swa_every)
    return averages


def ema_decay_at(num_updates: int, decay: float) -> float:
    """Begins low: else a run that is short beside 1 / (1 - decay) would end near the weights that it began with."""
    return min(decay, (1 + num_updates) / (10 + num_updates))


def swa_first_step(start_epoch: float, num_samples: int, batch_size: int) -> int:
    """Steps done when SWA takes its first weights: the first step that ends at or after the epoch's end."""
    return max(1, -int(-start_epoch * num_samples // batch_size))


def restate(
    objective: Objective,
    classifier: Classifier,
    recipe: Recipe,
    rank: Rank,
    beat: Callable[[], None] = lambda: None,
) -> None:
    """Measure the statistics of an averaged net's BatchNorms anew: a mean of weights has statistics of its own.

    Every rank calls it and ends with the same ones: sums over `train.norm_samples` training pictures, cropped and
    flipped as in training but neither mixed nor with RandAugment or colour jitter, joined exactly over the ranks. The
    clean branch sees clean pictures, the adv branch attacked ones; a net that isn't split sees of these what the method
    trains it on. `beat` is called after every batch.
    """
    with norm_loader(recipe, rank) as (loader, shares), MeasuredNorms(classifier) as norms:
        for batch in loader.iterate(shares) if norms else ():
            images, labels, keys = (tensor.to(rank.device) for tensor in batch)
            with objective.autocast(rank.device):
                inputs = objective.inputs(classifier, to_pixels(images, classifier.dtype), labels, keys)
                with torch.no_grad(), norms.measuring():
                    for branch, pixels in inputs.items():
                        with classifier.branch(branch):
                            classifier(pixels)
            beat()
        norms.write(rank)


@contextmanager
def norm_loader(recipe: Recipe, rank: Rank) -> Iterator[tuple[Loader, list[Keys]]]:
    """Training pictures evenly spread over the set, and this rank's batches of them: equal in number on every rank.

    All batches are of one size, at least 2, so that none is normalised by a handful; a few pictures may be left out.
    """
    num_samples = load_manifest(recipe.data.train).num_samples
    limit = min(num_samples, recipe.train.norm_samples) // rank.world_size * rank.world_size
    largest = recipe.train.global_batch_size // rank.world_size
    # The visits of the epoch after the last: crops that no step has seen.
    keys = spread(num_samples, limit) + recipe.train.epochs * num_samples
    own = keys[rank.index :: rank.world_size]
    num_batches = min(-(-len(own) // largest), len(own) // 2)
    size = min(len(own) // num_batches, largest)
    with train_loader(recipe.data, recipe.train.seed, size) as loader:
        yield loader, [own[i * size : (i + 1) * size] for i in range(num_batches)]


class MeasuredNorms:
    """The BatchNorms of a net that keep running statistics, and sums over what comes into each; removes its hooks."""

    def __init__(self, net: nn.Module):
        self._mode = AttackMode(net)
        # Count, sum and sum of squares of each channel: float64 [3,C].
        self._sums: dict[nn.Module, Tensor] = {
            norm: torch.zeros(3, norm.num_features, dtype=torch.float64, device=norm.running_mean.device)
            for norm in net.modules()
            if isinstance(norm, BATCH_NORMS) and norm.running_mean is not None
        }
        self._is_measuring = False

    def __enter__(self) -> Self:
        self._hooks = [norm.register_forward_pre_hook(self._add) for norm in self._sums]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def __len__(self) -> int:
        return len(self._sums)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Passes inside count; they normalise with their own batch's statistics and change no buffer."""
        self._is_measuring = True
        try:
            with self._mode("batch"):
                yield
        finally:
            self._is_measuring = False

    def write(self, rank: Rank) -> None:
        """Set the running statistics to those of all that all ranks saw; norms that saw nothing keep theirs."""
        if not self._sums:
            return
        totals = rank.all_reduce(torch.cat([sums.flatten() for sums in self._sums.values()]))
        parts = totals.split([sums.numel() for sums in self._sums.values()])
        for norm, part in zip(self._sums, parts, strict=True):
            count, total, squares = part.view(3, -1)
            if count[0] > 1:
                mean = total / count
                norm.get_buffer("running_mean").copy_(mean)
                norm.get_buffer("running_var").copy_((squares / count - mean**2).clamp_min(0) * count / (count - 1))

    def _add(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._is_measuring:
            values = args[0].double().movedim(1, 0).flatten(1)
            count = values.new_full((len(values),), values.shape[1])
            self._sums[norm] += torch.stack([count, values.sum(1), values.square().sum(1)])
