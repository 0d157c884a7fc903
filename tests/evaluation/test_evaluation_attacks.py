"""The attacks of an evaluation against the authors' code, sample by sample, and their promises."""

import math
from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pyautoattack import AutoAttack
from robust_net import digit_batch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from arat_dist.attacks import PGD
from arat_dist.config import EvalConfig
from arat_dist.evaluation.attacks import (
    COMPACTIONS,
    FABT,
    AutoPGD,
    Compaction,
    RestartedPGD,
    Square,
    _ranked_others,
    batch_seed,
    evaluation_attacks,
)
from arat_dist.models.classifier import Classifier

RADII: dict[str, float] = {"linf": 0.12, "l2": 0.8, "l1": 4.0}
LIBRARY: dict[str, Any] = {"linf": "Linf", "l2": "L2", "l1": "L1"}


def right_ones(net: Classifier, count: int = 200) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures that the net classifies rightly, their labels and keys."""
    pixels, labels = digit_batch(1300, 1300 + count)
    right = net(pixels).argmax(1) == labels
    return pixels[right], labels[right], torch.arange(count)[right]


def stands(net: Any, pictures: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        return net(pictures).argmax(1) == labels


def distances(delta: Tensor, norm: str) -> Tensor:
    return delta.double().flatten(1).norm(p={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)


def suite(norm: str, **keys: Any) -> list[Any]:
    values = {"attack": "autoattack", "norm": norm, "eps": RADII[norm], **keys}
    return evaluation_attacks(EvalConfig.model_validate(values))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("name", ["apgd-ce", "apgd-t"])
def test_apgd_agrees_with_the_authors_code_sample_by_sample(robust, norm, name):
    pixels, labels, keys = right_ones(robust, 240)
    (attack,) = suite(norm, attack=name)
    ours = stands(robust, attack(robust, pixels, labels, keys), labels)
    theirs = AutoAttack(robust, norm=LIBRARY[norm], eps=RADII[norm], seed=0, version="standard")
    theirs.attacks_to_run = [name]
    theirs.verbose = False
    reference = stands(robust, theirs.run_standard_evaluation(pixels, labels, batch_size=400)[0], labels)
    assert 0.1 < reference.float().mean() < 0.9, "a net that is always or never robust compares nothing"
    agree = (ours == reference).float().mean()
    assert agree >= 0.99, (agree, ours.sum(), reference.sum())


def test_autoattack_is_the_authors_standard_version():
    ce, targeted, fab, square = suite("linf")
    assert (ce.name, ce.steps, ce.restarts, ce.num_targets) == ("apgd-ce", 100, 1, 0)
    assert (targeted.name, targeted.steps, targeted.restarts, targeted.num_targets) == ("apgd-t", 100, 1, 9)
    assert (fab.name, fab.steps, fab.num_targets) == ("fab-t", 100, 9)
    assert (square.name, square.steps) == ("square", 5000)
    ce, targeted, _, _ = suite("l1")
    assert (ce.restarts, targeted.num_targets) == (5, 5)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", ["pgd", "apgd-ce", "apgd-t", "fab-t", "square"])
def test_pictures_are_in_the_ball_and_the_clean_ones_stay(robust, norm, kind):
    pixels, labels, keys = right_ones(robust, 60)
    before = pixels.clone()
    attack: Any = {
        "pgd": RestartedPGD(norm, RADII[norm], 5, restarts=2),
        "apgd-ce": AutoPGD(norm, RADII[norm], 12, restarts=2),
        "apgd-t": AutoPGD(norm, RADII[norm], 12, num_targets=3),
        "fab-t": FABT(norm, RADII[norm], 10, num_targets=2),
        "square": Square(norm, RADII[norm], 60),
    }[kind]
    state = torch.get_rng_state()
    pictures = attack(robust, pixels, labels, keys)
    assert torch.equal(torch.get_rng_state(), state), "torch's generator is not the attack's to move"
    assert torch.equal(pixels, before)
    assert (distances(pictures - pixels, norm) <= RADII[norm] * (1 + 1e-6)).all()
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    assert not stands(robust, pictures, labels).all(), "an attack that breaks nothing shows nothing"
    assert torch.equal(pictures, attack(robust, pixels, labels, keys)), "the same question, the same answer"


def test_samples_that_fall_leave_the_batch_and_the_others_go_on_as_before(robust):
    """Against the same attack on each sample alone, in float64: nobody's verdict hangs on the batch."""
    net: Any = torch.nn.Module.double(robust)
    try:
        pixels, labels, keys = right_ones_in_double(net)
        sizes: list[int] = []

        def watched(x: Tensor) -> Tensor:
            sizes.append(len(x))
            return net(x)

        attack = AutoPGD("linf", 0.12, 40)
        together = attack(watched, pixels, labels, keys)
        alone = torch.cat(
            [attack(net, pixels[i : i + 1], labels[i : i + 1], keys[i : i + 1]) for i in range(len(pixels))]
        )
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-9)
        assert sizes[-1] < sizes[0] == len(pixels)
        assert sizes[1:] == sorted(sizes[1:], reverse=True)
        # Without leaving, each ends at its highest loss: broken ones stay broken.
        whole = AutoPGD("linf", 0.12, 40, stops=False)(net, pixels, labels, keys)
        assert not (stands(net, whole, labels) < stands(net, together, labels)).any()
    finally:
        robust.float()


def right_ones_in_double(net: Any) -> tuple[Tensor, Tensor, Tensor]:
    pixels, labels = digit_batch(1300, 1360)
    pixels = pixels.double()
    right = net(pixels).argmax(1) == labels
    return pixels[right], labels[right], torch.arange(60)[right]


def test_restarts_break_more_and_keep_what_is_broken(robust):
    pixels, labels, keys = right_ones(robust)
    once, often = (
        stands(robust, RestartedPGD("linf", 0.12, 3, restarts)(robust, pixels, labels, keys), labels)
        for restarts in (1, 8)
    )
    assert not (often & ~once).any()
    assert often.sum() < once.sum()
    # One start is plain PGD with steps of eps/4.
    plain = PGD("linf", 0.12, 0.03, 3)(lambda x: F.cross_entropy(robust(x), labels, reduction="none"), pixels, keys)
    assert torch.equal(stands(robust, plain, labels), once)


def test_with_few_classes_towards_a_class_is_by_cross_entropy(robust):
    def three(x: Tensor) -> Tensor:
        return robust(x)[:, :3]

    pixels, labels = digit_batch(1300, 1500)
    few = (labels < 3) & (three(pixels).argmax(1) == labels)
    pixels, labels, keys = pixels[few], labels[few], torch.arange(200)[few]
    for name in ("apgd-t", "fab-t"):
        (attack,) = suite("linf", attack=name, eps=0.3)
        assert not stands(three, attack(three, pixels, labels, keys), labels).all()


def test_a_batchs_random_numbers_are_its_own():
    keys = torch.arange(4)
    seeds = {batch_seed(0, "square", keys), batch_seed(1, "square", keys), batch_seed(0, "fab-t", keys)}
    seeds.add(batch_seed(0, "square", keys + 1))
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    assert batch_seed(0, "square", keys) == batch_seed(0, "square", keys.clone())


def test_pictures_for_another_net_are_judged_by_it(robust):
    """Transferred: restarts end when the judge is fooled, and the climb goes on where the attacked net has fallen."""
    pixels, labels, keys = right_ones(robust)
    torch.manual_seed(1)
    weight = 0.5 * torch.randn(3 * 64, 10)

    def judge(x: Tensor) -> Tensor:
        return robust(x) + x.flatten(1) @ weight - pixels.mean(0).flatten() @ weight

    (attack,) = evaluation_attacks(
        EvalConfig.model_validate({"attack": "apgd", "norm": "linf", "eps": 0.12, "restarts": 3}), transfers=True
    )
    asked = stands(judge, attack(robust, pixels, labels, keys, judge), labels)
    unasked = stands(judge, attack(robust, pixels, labels, keys), labels)
    assert asked.sum() <= unasked.sum()
    assert not asked.all()


# On a GPU ----------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations for whose result the host would wait for a GPU, while tensors are the CPU's."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self._calls = _HostReads(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        if func.overloadpacket in (aten._local_scalar_dense, aten.nonzero, aten.is_nonzero, aten.equal):
            self.count += 1
        if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index):
            self.count += any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
        if func.overloadpacket in (aten.masked_select, aten._unique2, aten.unique_consecutive, aten.repeat_interleave):
            self.count += 1
        return func(*args, **(kwargs or {}))

    def __enter__(self) -> "Waits":
        self._calls.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._calls.__exit__(*error)


class _HostReads(TorchFunctionMode):
    """Those that a CPU's tensor answers without any operation."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.tolist, Tensor.numpy, Tensor.cpu):
            self._waits.count += 1
        return func(*args, **(kwargs or {}))


def test_waits_are_counted():
    x = torch.arange(6)
    for wait in (
        lambda: x.sum().item(),
        lambda: bool((x > 2).any()),
        lambda: int(x[1]),
        lambda: x[x > 2],
        lambda: x.index_put((x > 2,), torch.tensor(0)),
        lambda: x.nonzero(),
        lambda: x.masked_select(x > 2),
        lambda: torch.equal(x, x),
        lambda: x.tolist(),
        lambda: x.cpu().numpy(),
    ):
        with Waits() as waits:
            wait()
        assert waits.count >= 1
    with Waits() as waits:
        y = x[torch.tensor([1, 2])]
        x[y] = torch.where(y > 1, y, -y)
        x.argsort(dim=0, stable=True)
    assert waits.count == 0


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Compaction:
    monkeypatch.setitem(COMPACTIONS, "cpu", COMPACTIONS["cuda"])
    return COMPACTIONS["cuda"]


ON_GPUS: dict[str, Any] = {
    "pgd": (RestartedPGD, {"steps": 2, "restarts": 8}),
    "apgd-ce": (AutoPGD, {"steps": 43, "restarts": 2}),
    "apgd-t": (AutoPGD, {"steps": 30, "num_targets": 4}),
    "transferred": (AutoPGD, {"steps": 20, "restarts": 2, "stops": False}),
}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", ON_GPUS)
def test_looking_now_and_then_finds_the_same_pictures(robust, norm, kind, monkeypatch):
    """Float64: a batch that shrinks at other steps rounds in another way."""
    net = deepcopy(robust).double()
    pixels, labels, keys = right_ones_in_double(net)
    make, values = ON_GPUS[kind]
    attack = make(norm, RADII[norm], **values)
    at_each_step = attack(net, pixels, labels, keys)
    monkeypatch.setitem(COMPACTIONS, "cpu", COMPACTIONS["cuda"])
    now_and_then = attack(net, pixels, labels, keys)
    torch.testing.assert_close(now_and_then, at_each_step, rtol=0, atol=1e-9)
    verdicts = stands(net, at_each_step, labels)
    assert torch.equal(stands(net, now_and_then, labels), verdicts)
    assert 0 < verdicts.sum() < len(labels)


def test_a_sample_keeps_the_first_picture_that_it_fell_by(robust, as_on_a_gpu):
    """Written out: every pass of the attack in order, and for each sample the first wrong one among them."""
    assert as_on_a_gpu.every > 1
    net = deepcopy(robust).double()
    pixels, labels, keys = right_ones_in_double(net)
    passes: list[Tensor] = []

    def watched(x: Tensor) -> Tensor:
        passes.append(x.detach().clone())
        return net(x)

    # Radius and steps leave more than half of the samples standing: nobody leaves, so that rows stay rows.
    found = AutoPGD("linf", 0.05, 12)(watched, pixels, labels, keys)
    assert {len(x) for x in passes} == {len(pixels)}
    looks = passes[1:]
    for row in range(len(pixels)):
        wrong = [x[row] for x in looks if net(x[row : row + 1]).argmax() != labels[row]]
        if wrong:
            assert torch.equal(found[row], wrong[0])
            assert len(wrong) == 1 or not torch.equal(wrong[0], wrong[-1]), "it went on"
    assert 0 < int((~stands(net, found, labels)).sum()) < len(pixels) / 2


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("kind", ON_GPUS)
def test_the_host_waits_once_in_five_steps(robust, norm, kind, as_on_a_gpu):
    pixels, labels, keys = right_ones(robust, 60)
    make, values = ON_GPUS[kind]
    attack = make(norm, RADII[norm], **values)
    steps = values["steps"] * max(values.get("restarts", 1), values.get("num_targets", 1))
    with Waits() as waits:
        attack(robust, pixels, labels, keys)
    assert as_on_a_gpu == Compaction(every=5, below=0.5)
    assert 0 < waits.count <= steps / 5


def test_a_batch_shrinks_when_fewer_than_half_stand_and_ends_when_none_does(robust, as_on_a_gpu):
    pixels, labels, keys = right_ones(robust, 120)
    sizes: list[int] = []

    def watched(x: Tensor) -> Tensor:
        sizes.append(len(x))
        return robust(x)

    with Waits() as waits:
        pictures = AutoPGD("linf", 0.23, 60)(watched, pixels, labels, keys)
    assert stands(robust, pictures, labels).any()
    assert waits.count == 11, "a look before the steps 5, 10 to 55, and none for anything else"
    shrunk = sorted(set(sizes), reverse=True)
    assert sizes == sorted(sizes, reverse=True)
    assert len(shrunk) > 1
    assert all(after < as_on_a_gpu.below * before for before, after in pairwise(shrunk))
    sizes.clear()
    pictures = AutoPGD("linf", 0.6, 60)(watched, pixels, labels, keys)
    assert not stands(robust, pictures, labels).any()
    assert len(sizes) < 20, "all have fallen long before"


def test_the_other_classes_are_ranked_without_the_label():
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 7), torch.randint(0, 7, (50,))
    logits[:10, 1:4] = 2.0
    logits[10, :] = 0.0
    logits[11, labels[11] - 1] = -torch.inf
    ranked = _ranked_others(logits, labels)
    everybody = logits.argsort(1, descending=True).tolist()
    expected = [[c for c in row if c != label] for row, label in zip(everybody, labels.tolist(), strict=True)]
    assert ranked.tolist() == expected
