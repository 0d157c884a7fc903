"""The attacks of an evaluation, by name: each makes the strongest pictures it can, one batch at a time.

A sample that is misclassified once is broken for good, so it leaves the batch there and then: its verdict is known, and
the others' steps don't depend on it. The random numbers of a batch are a function of the seed and of its samples.
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
        return _until_broken(judge or net, pixels, labels, keys, attempts)


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
            ranked = net(pixels).argsort(1, descending=True)
        ranked = ranked[ranked != labels[:, None]].view(len(labels), -1)
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
        return _until_broken(judge or net, pixels, labels, keys, attempts, ranked)

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
    """A climb with an eye on who has fallen: a misclassified sample's picture is kept, and it leaves the batch."""

    def __init__(self, net: Net, objective: Objective, pixels: Tensor, labels: Tensor, targets: Tensor, *, stops: bool):
        self._net, self._objective, self._stops = net, objective, stops
        self._labels, self._targets = labels, targets
        self._standing = torch.arange(len(pixels), device=pixels.device)
        self._stand = torch.ones_like(self._standing, dtype=torch.bool)
        self._found = pixels.clone()

    def look(self, pictures: Tensor, *, last: bool = False) -> Point:
        """The point there; notes who of those that stand is misclassified."""

        def loss(x: Tensor) -> Tensor:
            logits = self._net(x)
            if self._stops:
                self._stand = logits.detach().argmax(1) == self._labels
            return self._objective(logits, self._labels, self._targets)

        point = look_at(loss, pictures, last=last)
        self._found[self._standing[~self._stand]] = pictures[~self._stand]
        return point

    def follow(self, climb: Climb, steps: int) -> Tensor:
        """Take the steps; a picture for each sample of the batch, that of the highest loss where it never fell."""
        for k in range(1, steps + 1):
            if not self._stand.all():
                self._let_go(climb)
            if not len(self._standing):
                return self._found
            climb.step(partial(self.look, last=k == steps))
        self._found[self._standing[self._stand]] = climb.best.pictures[self._stand]
        return self._found

    def _let_go(self, climb: Climb) -> None:
        """Let those go that fell in the last look."""
        stand = self._stand
        self._standing, self._labels, self._targets = self._standing[stand], self._labels[stand], self._targets[stand]
        climb.keep(stand)
        self._stand = torch.ones_like(self._standing, dtype=torch.bool)


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


def _until_broken(
    judge: Net, pixels: Tensor, labels: Tensor, keys: Tensor, attempts: list[Callable[..., Tensor]], *more: Tensor
) -> Tensor:
    """Attack again and again those that still stand; the last attempt's pictures where none broke the sample."""
    found = pixels.clone()
    standing = torch.arange(len(pixels), device=pixels.device)
    for number, attempt in enumerate(attempts, 1):
        pictures = attempt(pixels[standing], labels[standing], keys[standing], *(t[standing] for t in more))
        found[standing] = pictures
        if number < len(attempts):
            with torch.no_grad():
                standing = standing[judge(pictures).argmax(1) == labels[standing]]
            if not len(standing):
                break
    return found


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
