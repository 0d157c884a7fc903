"""Averages of the weights over the run, EMA and SWA, and the statistics of their norms in both branches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from arat_dist.config import Recipe
from arat_dist.data.loader import Loader, train_loader
from arat_dist.data.manifest import load_manifest
from arat_dist.data.order import Keys, spread
from arat_dist.engine import Rank
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import BATCH_NORMS, AttackMode
from arat_dist.objectives.base import Objective, to_pixels


@dataclass(frozen=True)
class Average:
    """A net whose weights are a mean over the course of the run; its norms' running statistics are averaged alike.

    Attributes:
        model: torch's, its module the averaged classifier.
        first: step after which the first weights go in.
        every: steps between two.
    """

    model: AveragedModel
    first: int
    every: int

    @property
    def classifier(self) -> Classifier:
        """The averaged net."""
        return cast(Classifier, self.model.module)

    @property
    def has_begun(self) -> bool:
        """Whether any weights have gone in."""
        return bool(self.model.n_averaged)

    def count(self, done: int) -> int:
        """How many weights have gone in when so many steps are done."""
        return max(0, (done - self.first) // self.every + 1)

    def update(self, classifier: Classifier, done: int) -> None:
        """Take in the weights after a step, if it is one of those that count."""
        if done >= self.first and (done - self.first) % self.every == 0:
            self.model.update_parameters(classifier)

    def resume(self, state: Mapping[str, Tensor] | None, done: int) -> None:
        """Take up the averaged net's state dict, None where nothing had gone in, after so many steps."""
        if state is not None:
            self.classifier.load_state_dict(state)
        self.model.n_averaged.fill_(self.count(done))


def build_averages(recipe: Recipe, classifier: Classifier, num_samples: int) -> dict[str, Average]:
    """The averages that the recipe asks for, by name: ema, swa; the last one is the run's result."""
    train = recipe.train
    averages = {}
    if train.ema_decay is not None:
        model = AveragedModel(classifier, multi_avg_fn=ema_update(train.ema_decay), use_buffers=True)
        averages["ema"] = Average(model, first=1, every=1)
    if train.swa_start_epoch is not None:
        first = swa_first_step(train.swa_start_epoch, num_samples, train.global_batch_size)
        averages["swa"] = Average(AveragedModel(classifier, use_buffers=True), first, train.swa_every)
    return averages


def ema_update(decay: float) -> Any:
    """Torch's exponential moving average with a decay that begins low: min(decay, (1 + n) / (10 + n)) at n updates.

    Otherwise a run that is short beside 1 / (1 - decay) would end near the weights that it began with.
    """

    def update(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        n = int(num_averaged)  # lies on the CPU, wherever the weights are
        get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))(averaged, current, num_averaged)

    return update


def swa_first_step(start_epoch: float, num_samples: int, batch_size: int) -> int:
    """Steps done when SWA takes its first weights: the first step that ends at or after the epoch's end."""
    return max(1, -int(-start_epoch * num_samples // batch_size))


def restate(objective: Objective, classifier: Classifier, recipe: Recipe, rank: Rank) -> None:
    """Measure the statistics of an averaged net's BatchNorms anew: a mean of weights has statistics of its own.

    Every rank calls it and ends with the same ones: sums over `train.norm_samples` training pictures, augmented as in
    training, joined exactly over the ranks. The clean branch sees clean pictures, the adv branch attacked ones; a net
    that isn't split sees what the method trains it on.
    """
    with norm_loader(recipe, rank) as (loader, shares), MeasuredNorms(classifier) as norms:
        for batch in loader.iterate(shares) if norms else ():
            images, labels, keys = (tensor.to(rank.device) for tensor in batch)
            inputs = objective.inputs(classifier, to_pixels(images, classifier.dtype), labels, keys)
            with torch.no_grad(), norms.measuring():
                for branch, pixels in inputs.items():
                    with classifier.branch(branch):
                        classifier(pixels)
        norms.write(rank)


@contextmanager
def norm_loader(recipe: Recipe, rank: Rank) -> Iterator[tuple[Loader, list[Keys]]]:
    """Training pictures evenly spread over the set, and this rank's batches of them: as many on every rank."""
    num_samples = load_manifest(recipe.data.train).num_samples
    limit = min(num_samples, recipe.train.norm_samples) // rank.world_size * rank.world_size
    batch_size = min(limit, recipe.train.global_batch_size) // rank.world_size
    with train_loader(recipe.data, recipe.train.seed, batch_size) as loader:
        # The visits of the epoch after the last: crops that no step has seen.
        keys = spread(num_samples, limit) + recipe.train.epochs * num_samples
        own = keys[rank.index :: rank.world_size]
        yield loader, [own[i : i + batch_size] for i in range(0, len(own), batch_size)]


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
