"""The attacks of an evaluation, by name: each makes the strongest pictures it can, one batch at a time.

A sample that is misclassified once is broken for good: its verdict is known, so it leaves the batch, and the others'
steps don't depend on it. On a CPU it leaves there and then. On a GPU the host would have to wait for the device to know
of it, so it looks now and then (`Compaction`). The random numbers of a batch are a function of the seed and of its
samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from arat_dist.attacks import PGD, STARTS, Norm, look_at, uniform_noise
from arat_dist.balls import BALLS, normal
from arat_dist.climb import Climb, MomentumClimb, Point, SparseClimb
from arat_dist.config import EvalConfig
from arat_dist.losses import cross_entropy, targeted_dlr

Net = Callable[[Tensor], Tensor]
"""From pixels [B,3,H,W] to logits [B,C], in eval mode, with frozen weights."""
Objective = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From logits [B,C], labels [B] and the attack's target classes [B] to the loss of each sample, [B], to climb."""


@dataclass(frozen=True)
class Compaction:
    """When samples that have fallen leave the batch.

    Attributes:
        every: attack steps between two looks of the host at who still stands; at each it waits for the device.
        below: share of the batch: when fewer than that still stand, the others leave.
    """

    every: int
    below: float


COMPACTIONS = {"cpu": Compaction(every=1, below=1.0), "cuda": Compaction(every=5, below=0.5)}
"""By type of device. On a CPU a look is free, and each sample that leaves saves its passes. A GPU stands idle from a
look until new kernels are queued, and a slightly smaller batch hardly saves it time."""

LIBRARY_NORMS: dict[str, Any] = {"linf": "Linf", "l2": "L2", "l1": "L1"}
"""Norms as pyautoattack names them."""


class EvaluationAttack(Protocol):
    """What looks for adversarial pictures."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def steps(self) -> int:
        """Steps of a start, each a gradient; of a black-box attack, queries."""
        ...

    @property
    def cost(self) -> int:
        """Forward passes that a picture takes at most, a backward pass for two: what the time left is told by."""
        ...

    def __call__(self, net: Net, pixels: Tensor, labels: Tensor, keys: Tensor, judge: Net | None = None) -> Tensor:
        """Attack a batch.

        Args:
            net: see `Net`.
            pixels: clean pictures in [0,1], [B,3,H,W], all classified rightly; left as they are.
            labels: int64 [B].
            keys: int64 [B], the samples' indices.
            judge: what the pictures are to fool, if that is another net: a start that did so is the last one.

        Returns:
            Pictures like `pixels`, in the ball: misclassified ones where some were found.
        """
        ...


@dataclass(frozen=True)
class RestartedPGD:
    """PGD from several uniform starts, steps of eps/4; what counts is the end of each climb."""

    norm: Norm
    eps: float
    steps: int
    restarts: int = 1
    seed: int = 0

    @property
    def name(self) -> str:
        """See `EvaluationAttack`."""
        return f"pgd{self.steps}"

    @property
    def cost(self) -> int:
        """See `EvaluationAttack`."""
        return self.restarts * (3 * self.steps + 1)

    def __call__(self, net: Net, pixels: Tensor, labels: Tensor, keys: Tensor, judge: Net | None = None) -> Tensor:
        """See `EvaluationAttack`."""

        def once(pixels: Tensor, labels: Tensor, keys: Tensor, restart: int) -> Tensor:
            pgd = PGD(self.norm, self.eps, self.eps / 4, self.steps, seed=restart_seed(self.seed, restart))
            return pgd(lambda x: cross_entropy(net(x), labels), pixels, keys)

        attempts = [partial(once, restart=r) for r in range(self.restarts)]
        return _until_broken(judge or net, attempts, self.steps, pixels, labels, keys)


@dataclass(frozen=True)
class AutoPGD:
    """APGD as AutoAttack runs it (arXiv 2003.01690, in l1 2103.01208): any misclassified point on the way counts.

    Towards no class it climbs the cross-entropy. Towards `num_targets` classes, from the likeliest on, one climb each,
    it climbs the targeted DLR loss; with fewer than 4 classes, which that loss needs, minus the target's cross-entropy.
    In l1 the first 60 % of the steps are taken in balls of 3 and 2 eps, where nothing counts yet.

    Attributes:
        stops: let broken samples go. A picture that is to fool another net wants the whole climb: then it is that of
            the highest loss.
    """

    norm: Norm
    eps: float
    steps: int = 100
    num_targets: int = 0
    restarts: int = 1
    seed: int = 0
    stops: bool = True
    label: str = ""

    @property
    def name(self) -> str:
        """See `EvaluationAttack`."""
        return self.label or ("apgd-t" if self.num_targets else "apgd-ce")

    @property
    def cost(self) -> int:
        """See `EvaluationAttack`."""
        return max(1, self.num_targets) * self.restarts * 3 * self.steps

    def __call__(self, net: Net, pixels: Tensor, labels: Tensor, keys: Tensor, judge: Net | None = None) -> Tensor:
        """See `EvaluationAttack`."""
        with torch.no_grad():
            ranked = _ranked_others(net(pixels), labels)
        objective = _objective(self.num_targets, num_classes=ranked.shape[1] + 1)

        def once(pixels: Tensor, labels: Tensor, keys: Tensor, ranked: Tensor, start: int) -> Tensor:
            targets = ranked[:, start % max(1, self.num_targets)]
            return self._climb(net, objective, pixels, labels, keys, targets, restart_seed(self.seed, start))

        num_targets = min(max(1, self.num_targets), ranked.shape[1])
        starts = [
            restart * max(1, self.num_targets) + place
            for place in range(num_targets)
            for restart in range(self.restarts)
        ]
        attempts = [partial(once, start=start) for start in starts]
        return _until_broken(judge or net, attempts, self.steps, pixels, labels, keys, ranked)

    def _climb(
        self, net: Net, objective: Objective, pixels: Tensor, labels: Tensor, keys: Tensor, targets: Tensor, seed: int
    ) -> Tensor:
        """One climb: a misclassified picture where there was one, else that of the highest loss."""
        if self.norm != "l1":
            start = STARTS["uniform"](BALLS[self.norm](pixels, self.eps), pixels, keys, seed)
            watch = _Watch(net, objective, pixels, labels, targets, stops=self.stops)
            return watch.follow(MomentumClimb(self.norm, pixels, self.eps, watch.look(start), self.steps), self.steps)
        first = -(-3 * self.steps // 10)
        pictures = _sparse_start(pixels, 3 * self.eps, keys, seed)
        for factor, steps in ((3, first), (2, first), (1, self.steps - 2 * first)):
            watch = _Watch(net, objective, pixels, labels, targets, stops=self.stops and factor == 1)
            start = watch.look(BALLS["l1"](pixels, factor * self.eps).project(pictures))
            pictures = watch.follow(SparseClimb("l1", pixels, factor * self.eps, start, steps, goes_on=True), steps)
        return pictures


class _Watch:
    """A climb with an eye on who has fallen: the first misclassified picture of a sample is kept.

    Whether and when fallen samples leave the batch is up to the device's `Compaction`.
    """

    def __init__(self, net: Net, objective: Objective, pixels: Tensor, labels: Tensor, targets: Tensor, *, stops: bool):
        self._net, self._objective, self._stops = net, objective, stops
        self._compaction = COMPACTIONS[pixels.device.type]
        self._found = pixels.clone()
        # Of the samples that are still in the batch: their places in it at first, whether they stand, and the picture
        # that each fell by; any picture where it stands.
        self._places = torch.arange(len(pixels), device=pixels.device)
        self._stand = torch.ones_like(self._places, dtype=torch.bool)
        self._fallen_by = pixels
        self._labels, self._targets = labels, targets

    def look(self, pictures: Tensor, *, last: bool = False) -> Point:
        """The point there; notes who of those that stand is misclassified."""
        stood = self._stand

        def loss(x: Tensor) -> Tensor:
            logits = self._net(x)
            if self._stops:
                self._stand = stood & (logits.detach().argmax(1) == self._labels)
            return self._objective(logits, self._labels, self._targets)

        point = look_at(loss, pictures, last=last)
        self._note(stood & ~self._stand, pictures)
        return point

    def follow(self, climb: Climb, steps: int) -> Tensor:
        """Take the steps; a picture for each sample of the batch, that of the highest loss where it never fell."""
        every = self._compaction.every
        for k in range(1, steps + 1):
            # A look pays when as many steps are left as its wait is to be spread over.
            if self._stops and k % every == 0 and k + every <= steps + 1:
                self._let_go(climb)
            if not len(self._places):
                return self._found
            climb.step(partial(self.look, last=k == steps))
        self._found[self._places] = torch.where(_wide(self._stand), climb.best.pictures, self._fallen_by)
        return self._found

    def _note(self, fell: Tensor, pictures: Tensor) -> None:
        """Keep the pictures of those that fell just now, without a look where looking costs something."""
        if self._stops and (self._compaction.every > 1 or fell.any()):
            self._fallen_by = torch.where(_wide(fell), pictures, self._fallen_by)

    def _let_go(self, climb: Climb) -> None:
        """Look who stands; let the others go if they are enough."""
        num_standing = int(self._stand.sum())  # the host waits for the device here and nowhere else
        if num_standing >= self._compaction.below * len(self._places):
            return
        # In place of boolean masks, each of which would be another wait.
        order = self._stand.logical_not().int().argsort(stable=True)
        stay, gone = order[:num_standing], order[num_standing:]
        self._found[self._places[gone]] = self._fallen_by[gone]
        self._places, self._labels, self._targets = self._places[stay], self._labels[stay], self._targets[stay]
        climb.keep(stay)
        self._stand = torch.ones_like(self._places, dtype=torch.bool)
        self._fallen_by = climb.best.pictures


@dataclass(frozen=True)
class FABT:
    """Targeted FAB (arXiv 1907.02044), the authors' code as AutoAttack runs it: 100 steps towards each of 9 classes."""

    norm: Norm
    eps: float
    steps: int = 100
    num_targets: int = 9
    seed: int = 0
    name: str = "fab-t"

    @property
    def cost(self) -> int:
        """See `EvaluationAttack`."""
        return (
            self.num_targets * 6 * self.steps
        )  # three passes for gradients and predictions; projections as much again

    def __call__(
        self,
        net: Net,
        pixels: Tensor,
        labels: Tensor,
        keys: Tensor,
        judge: Net | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `EvaluationAttack`."""
        from pyautoattack.fab_pt import FABAttack_PT

        fab = FABAttack_PT(
            net,
            norm=LIBRARY_NORMS[self.norm],
            n_iter=self.steps,
            eps=self.eps,
            seed=batch_seed(self.seed, self.name, keys),
            targeted=True,
            device=pixels.device,
            n_target_classes=min(self.num_targets, _num_classes(net, pixels) - 1),
        )
        with _own_generator(pixels.device):
            return BALLS[self.norm](pixels, self.eps).project(fab.perturb(pixels, labels))


@dataclass(frozen=True)
class Square:
    """The black-box Square Attack (arXiv 1912.00049), the authors' code as AutoAttack runs it: asks no gradient."""

    norm: Norm
    eps: float
    steps: int = 5000
    seed: int = 0
    name: str = "square"

    @property
    def cost(self) -> int:
        """See `EvaluationAttack`."""
        return self.steps

    def __call__(
        self,
        net: Net,
        pixels: Tensor,
        labels: Tensor,
        keys: Tensor,
        judge: Net | None = None,  # noqa: ARG002
    ) -> Tensor:
        """See `EvaluationAttack`."""
        from pyautoattack.square import SquareAttack

        square = SquareAttack(
            net,
            norm=LIBRARY_NORMS[self.norm],
            n_queries=self.steps,
            eps=self.eps,
            seed=batch_seed(self.seed, self.name, keys),
            resc_schedule=False,
            device=pixels.device,
        )
        with _own_generator(pixels.device), torch.no_grad():
            return BALLS[self.norm](pixels, self.eps).project(square.perturb(pixels, labels))


def evaluation_attacks(config: EvalConfig, *, transfers: bool = False) -> list[EvaluationAttack]:
    """The attacks that the section names, in order; none for "none".

    Args:
        config: norm and eps must be given.
        transfers: the pictures are meant for another net than the one that is attacked.
    """
    return [_attack(name, config, transfers) for name in config.attack_names]


def _attack(name: str, config: EvalConfig, transfers: bool) -> EvaluationAttack:
    assert config.norm is not None
    assert config.eps is not None
    ball: Any = {"norm": config.norm, "eps": config.eps, "seed": config.seed}
    if name == "fab-t":
        return FABT(**ball)
    if name == "square":
        return Square(**ball)
    if name.startswith("pgd"):
        return RestartedPGD(**ball, steps=int(name.removeprefix("pgd")), restarts=config.restarts or 1)
    # AutoAttack's standard version in l1 has 5 restarts and 5 targets.
    is_l1 = config.norm == "l1"
    apgd = AutoPGD(**ball, stops=not transfers, label=name)
    if name == "apgd-t":
        return replace(apgd, num_targets=5 if is_l1 else 9)
    digits = name.removeprefix("apgd").removeprefix("-ce")
    return replace(apgd, steps=int(digits or 100), restarts=config.restarts or (5 if is_l1 else 1))


def restart_seed(seed: int, restart: int) -> int:
    """The seed of a restart, below 2**31: the first one is the seed itself."""
    return (seed + restart * 1_000_003) % 2**31


def batch_seed(seed: int, name: str, keys: Tensor) -> int:
    """A seed that the attack's name and the batch's samples decide, below 2**31."""
    content = f"{seed} {name} {keys.tolist()}".encode()
    return zlib.crc32(content) & 0x7FFFFFFF


def _objective(num_targets: int, num_classes: int) -> Objective:
    if not num_targets:
        return lambda logits, labels, _: cross_entropy(logits, labels)
    if num_classes < 4:
        return lambda logits, _, targets: -cross_entropy(logits, targets)
    return targeted_dlr


def _ranked_others(logits: Tensor, labels: Tensor) -> Tensor:
    """The classes other than the label, the likeliest first, int64 [B,C-1], of logits [B,C]."""
    ranked = logits.argsort(1, descending=True)
    # The label's column goes to the end, the others keep their order; a mask would have the host wait.
    labels_last = (ranked == labels[:, None]).int().argsort(dim=1, stable=True)
    return ranked.gather(1, labels_last[:, :-1])


def _until_broken(
    judge: Net, attempts: list[Callable[..., Tensor]], steps: int, pixels: Tensor, labels: Tensor, *more: Tensor
) -> Tensor:
    """Attack again and again those that still stand; the last attempt's pictures where none broke the sample.

    Args:
        judge: who says what stands.
        attempts: each takes the pixels, labels and the rest of some samples and gives pictures of them.
        steps: attack steps of each attempt.
        pixels: of the batch, [B,3,H,W].
        labels: int64 [B].
        more: what else the attempts take, a row for each sample.
    """
    every = COMPACTIONS[pixels.device.type].every
    found = pixels.clone()
    places = torch.arange(len(pixels), device=pixels.device)
    stand = torch.ones_like(places, dtype=torch.bool)
    num_steps = 0
    for number, attempt in enumerate(attempts, 1):
        pictures = attempt(pixels[places], labels[places], *(t[places] for t in more))
        found[places] = torch.where(_wide(stand), pictures, found[places])
        num_steps += steps
        if number == len(attempts):
            break
        with torch.no_grad():
            stand = stand & (judge(pictures).argmax(1) == labels[places])
        if num_steps >= every:
            # The host waits; a sample that leaves saves a whole attempt.
            places, num_steps = places[stand], 0
            stand = torch.ones_like(places, dtype=torch.bool)
        if not len(places):
            break
    return found


def _wide(mask: Tensor) -> Tensor:
    """A mask [B] for pictures [B,3,H,W]."""
    return mask[:, None, None, None]


def _sparse_start(pixels: Tensor, radius: float, keys: Tensor, seed: int) -> Tensor:
    """Where the authors' APGD in l1 begins: standard Gaussian noise, projected into the ball."""
    return BALLS["l1"](pixels, radius).project(pixels + normal(uniform_noise(keys, pixels, seed)))


def _num_classes(net: Net, pixels: Tensor) -> int:
    with torch.no_grad():
        return net(pixels[:1]).shape[1]


@contextmanager
def _own_generator(device: torch.device) -> Iterator[None]:
    """Leave torch's global generators as they were: the library seeds them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
