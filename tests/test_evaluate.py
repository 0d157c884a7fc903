"""Counts against a loop written out over the pictures, one by one."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from toys import BlotchSource, Sets, toy_classifier, toy_recipe

from arat_dist.attacks import APGD, PGD
from arat_dist.config import EvalConfig
from arat_dist.data.loader import val_loader
from arat_dist.engine import Rank
from arat_dist.evaluate import count_correct, eval_config, evaluate, evaluation_attack, subset_shares
from arat_dist.models.classifier import Classifier

CPU = torch.device("cpu")
VAL = BlotchSource(23, 1)


class Lone(Rank):
    """One of several ranks, whose sum over all is left to the test."""

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor


@pytest.fixture(scope="module")
def net() -> Classifier:
    """A net that has learnt a little in its adv branch and nothing in the other."""
    torch.set_num_threads(1)
    classifier = toy_classifier()
    source = BlotchSource(44, 0)
    pictures, labels = zip(*(source[i] for i in range(44)), strict=True)
    pixels = torch.tensor(np.stack(pictures)).permute(0, 3, 1, 2) / 255.0
    optimizer = torch.optim.SGD(classifier.parameters(), lr=0.1)
    for _ in range(12):
        optimizer.zero_grad()
        F.cross_entropy(classifier(pixels.double()), torch.tensor(labels)).backward()
        optimizer.step()
    return classifier.eval()


def config(**keys: Any) -> EvalConfig:
    return EvalConfig.model_validate({"attack": "pgd3", "norm": "linf", "eps": 0.02, "batch_size": 4, **keys})


def written_out(net: Classifier, indices: range, settings: EvalConfig, branch: Any = "adv") -> tuple[int, int]:
    """Right before, and right before and after the attack; each picture alone."""
    clean = robust = 0
    assert settings.norm is not None
    assert settings.eps is not None
    with net.branch(branch):
        for index in indices:
            picture, label = VAL[index]
            x = torch.tensor(picture).permute(2, 0, 1)[None].double() / 255
            y = torch.tensor([label])
            steps = int(settings.attack[3:])
            attack = PGD(settings.norm, settings.eps, settings.eps / 4, steps, "uniform", settings.seed)
            moved = attack(lambda x, y=y: F.cross_entropy(net(x), y, reduction="none"), x, torch.tensor([index]))
            before, after = (int(net(each).argmax()) == label for each in (x, moved))
            clean, robust = clean + before, robust + (before and after)
    return clean, robust


def test_counts_equal_a_written_out_loop_on_the_adv_branch(net, sets: Sets):
    data = toy_recipe(sets).data
    scores = evaluate(net, data, config(), Rank(0, 1, CPU))
    assert (scores.num_clean, scores.num_robust) == written_out(net, range(23), config())
    assert scores.num_samples == 23
    assert 0 < (scores.num_robust or 0) < scores.num_clean < 23
    assert scores.num_clean != written_out(net, range(23), config(), "clean")[0]
    assert scores.clean_accuracy == scores.num_clean / 23
    assert scores.robust_accuracy == (scores.num_robust or 0) / 23
    assert scores.summary() == {
        "clean_accuracy": scores.num_clean / 23,
        "robust_accuracy": (scores.num_robust or 0) / 23,
        "robust_attack": "pgd3",
        "norm": "linf",
        "eps": 0.02,
        "attack_steps": 3,
        "num_samples": 23,
    }


@pytest.mark.parametrize("limit", [None, 1, 5, 22, 99])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 30])
def test_every_sample_once_over_any_number_of_ranks(world_size, limit):
    shares = [subset_shares(23, config(limit=limit), Rank(r, world_size, CPU)) for r in range(world_size)]
    assert all(0 < len(batch) <= 4 for share in shares for batch in share)
    seen = np.concatenate([batch for share in shares for batch in share])
    count = min(limit or 23, 23)
    assert len(seen) == len(set(seen.tolist())) == count
    assert set(seen.tolist()) <= set(range(23))
    # Sets are often sorted by class: a part is taken from all over.
    if count == 5:
        assert sorted(seen.tolist()) == [0, 4, 9, 13, 18]


@pytest.mark.parametrize("world_size", [2, 3, 30])
def test_the_sum_over_ranks_is_the_count_of_one(net, sets: Sets, world_size):
    data = toy_recipe(sets).data
    alone = evaluate(net, data, config(), Rank(0, 1, CPU))
    parts = [evaluate(net, data, config(), Lone(r, world_size, CPU)) for r in range(world_size)]
    assert sum(part.num_samples for part in parts) == 23
    assert sum(part.num_clean for part in parts) == alone.num_clean
    assert sum(part.num_robust or 0 for part in parts) == alone.num_robust
    assert (min(part.num_samples for part in parts) == 0) == (world_size == 30)


def test_a_sample_that_is_wrong_before_the_attack_is_never_robust(net, sets: Sets):
    """An attack that brings the right picture back: robust stays at most clean."""
    data = toy_recipe(sets).data

    def helpful(loss: Any, pixels: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        return PGD("linf", 0.3, 0.1, 5)(lambda x: -loss(x), pixels, keys)

    with val_loader(data, 23) as loader:
        attack: Any = helpful
        seen, clean, robust = count_correct(net, loader, [np.arange(23)], attack, CPU).tolist()
    assert (seen, robust) == (23, clean)
    assert clean < 23


@pytest.mark.parametrize("training", [True, False])
def test_the_nets_mode_branch_and_statistics_are_as_before(sets: Sets, training):
    net = toy_classifier().train(training)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with net.branch("clean"):
        evaluate(net, toy_recipe(sets).data, config(), Rank(0, 1, CPU))
        assert net._switch is not None
        assert net._switch.branch == "clean"
    assert all(module.training == training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_eps_norm_and_steps_are_those_given(net, sets: Sets):
    data, rank = toy_recipe(sets).data, Rank(0, 1, CPU)

    def robust(**keys: Any) -> int:
        scores = evaluate(net, data, config(**keys), rank)
        assert scores.num_robust is not None
        return scores.num_robust

    clean = evaluate(net, data, config(), rank).num_clean
    assert robust(eps=1e-9) == clean
    assert robust(eps=1) < robust(eps=0.005) <= clean
    assert robust(norm="l2", eps=1e-9) == clean
    assert robust(norm="l2", eps=0.02) > robust(norm="linf", eps=0.02)
    none = evaluate(net, data, config(attack="none"), rank)
    assert none.num_clean == clean
    assert none.num_robust is none.robust_accuracy is None
    assert none.attack_steps == 0


def test_the_attack_takes_norm_and_eps_from_training_unless_told_otherwise(sets: Sets):
    attack = {"norm": "l2", "eps": 0.5, "step_size": 0.1}
    taken = eval_config(toy_recipe(sets, attack=attack, eval={"attack": "pgd7", "seed": 4}))
    assert evaluation_attack(taken) == PGD("l2", 0.5, 0.125, 7, "uniform", 4)
    told = eval_config(toy_recipe(sets, attack=attack, eval={"norm": "linf", "eps": "4/255"}))
    assert evaluation_attack(told) == PGD("linf", 4 / 255, 1 / 255, 2, "uniform", 0)


@pytest.mark.parametrize(("name", "steps"), [("apgd", 100), ("apgd5", 5)])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_apgd_is_known_by_its_name(net, sets: Sets, norm, name, steps):
    assert evaluation_attack(config(attack=name, norm=norm, seed=4)) == APGD(norm, 0.02, steps, "uniform", 4)
    if name == "apgd5":
        radius = {"linf": 0.02, "l2": 0.3, "l1": 5.0}[norm]
        settings = config(attack=name, norm=norm, eps=radius)
        scores = evaluate(net, toy_recipe(sets).data, settings, Rank(0, 1, CPU))
        assert (scores.num_robust or 0) < scores.num_clean
        assert (scores.attack, scores.attack_steps, scores.norm) == ("apgd5", 5, norm)
