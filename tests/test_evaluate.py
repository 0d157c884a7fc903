"""Counts against a loop written out over the pictures, one by one."""

from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from torch import Tensor
from toys import BlotchSource, Sets, toy_classifier, toy_recipe

from arat_dist.attacks import PGD
from arat_dist.config import DataConfig, EvalConfig
from arat_dist.data.loader import val_loader
from arat_dist.engine import Rank
from arat_dist.errors import UserError
from arat_dist.evaluate import attack_steps, eval_config, evaluate, subset
from arat_dist.evaluation.attacks import RestartedPGD, evaluation_attacks
from arat_dist.evaluation.ledger import Ledger
from arat_dist.evaluation.stages import Runner
from arat_dist.evaluation.verdicts import Nets, measure
from arat_dist.models.classifier import Classifier

CPU = torch.device("cpu")
VAL = BlotchSource(23, 1)


@pytest.fixture(scope="module")
def net() -> Classifier:
    return trained_net()


def trained_net() -> Classifier:
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
def test_a_limit_takes_pictures_from_all_over(limit):
    chosen = subset(23, config(limit=limit)).tolist()
    assert len(set(chosen)) == len(chosen) == min(limit or 23, 23)
    # Sets are often sorted by class.
    if limit == 5:
        assert chosen == [0, 4, 9, 13, 18]


def scores_at(rank: Rank, data: DataConfig) -> dict[str, Any]:
    """What one of several processes finds, the net having been built there."""
    return evaluate(trained_net(), data, config(attack="pgd3,apgd5", eps=0.005), rank).summary()


def test_all_ranks_find_what_one_finds(net, sets: Sets, tmp_path):
    data = toy_recipe(sets).data
    alone = evaluate(net, data, config(attack="pgd3,apgd5", eps=0.005), Rank(0, 1, CPU))
    together = on_ranks(partial(scores_at, data=data), tmp_path, 3)
    assert together == [alone.summary()] * 3
    assert 0 < (alone.num_robust or 0) < alone.num_clean


def test_a_sample_that_is_wrong_before_the_attack_is_never_robust(net, sets: Sets):
    """An attack that brings the right picture back: it isn't tried on samples that are wrong already."""
    data, seen = toy_recipe(sets).data, []

    class Helpful:
        name, steps, cost = "helpful", 5, 1

        def __call__(self, net: Any, pixels: Tensor, labels: Tensor, keys: Tensor, judge: Any = None) -> Tensor:
            seen.extend(keys.tolist())
            return PGD("linf", 0.3, 0.1, 5)(lambda x: -F.cross_entropy(net(x), labels, reduction="none"), pixels, keys)

    with val_loader(data, 23) as loader:
        runner = Runner(loader, Ledger(None), Rank(0, 1, CPU), 23)
        verdicts = measure(Nets(net, net, net.dtype), [Helpful()], runner, np.arange(23))
    assert verdicts.standing().tolist() == verdicts.clean_right.tolist()
    assert seen == np.flatnonzero(verdicts.clean_right).tolist()
    assert 0 < len(seen) < 23


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
    assert evaluation_attacks(taken) == [RestartedPGD("l2", 0.5, 7, 1, 4)]
    told = eval_config(toy_recipe(sets, attack=attack, eval={"norm": "linf", "eps": "4/255"}))
    assert evaluation_attacks(told) == [RestartedPGD("linf", 4 / 255, 2, 1, 0)]


@pytest.mark.parametrize(
    ("cluster", "gpu", "batch_size"),
    [
        ({"workers": 2, "gpus_per_worker": 1}, False, 1024),
        ({"workers": 2, "gpus_per_worker": 0}, True, 128),
        ({"workers": 0, "gpus_per_worker": 0}, True, 128),
        ({"workers": 2}, True, 128),
        ({"workers": 0}, True, 1024),
        ({"workers": 0}, False, 128),
    ],
)
def test_the_batch_size_goes_by_the_device_unless_told_otherwise(sets: Sets, monkeypatch, cluster, gpu, batch_size):
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    unsaid, said = (toy_recipe(sets, eval={"batch_size": value}, cluster=cluster) for value in (None, 5))
    assert unsaid.eval.batch_size is None
    assert eval_config(unsaid).batch_size == batch_size
    assert eval_config(said).batch_size == 5


def test_a_gpu_that_is_too_small_is_answered_with_a_smaller_batch(net, sets: Sets):
    class Full(Classifier):
        def forward(self, pixels: Tensor) -> Tensor:
            if len(pixels) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            return super().forward(pixels)

    full = deepcopy(net)
    full.__class__ = Full
    data, rank = toy_recipe(sets).data, Rank(0, 1, CPU)
    with pytest.raises(UserError, match=r"^--batch-size: 6: .*; --batch-size 3 \(eval.batch_size in a recipe\) would"):
        evaluate(full, data, config(batch_size=6), rank)
    small = evaluate(full, data, config(batch_size=3), rank)
    assert small.summary() == evaluate(net, data, config(batch_size=3), rank).summary()


def test_an_evaluation_of_training_is_not_stopped_in_the_middle(net, sets: Sets):
    """A stop without a checkpoint would lose what was trained since the last one: the loop itself stops, later."""
    scores = evaluate(net, toy_recipe(sets).data, config(), Rank(0, 1, CPU, stop_wanted=lambda: True))
    assert scores.num_samples == 23


@pytest.mark.parametrize(("name", "steps"), [("apgd5", 5), ("autoattack", 100), ("square", 0), ("none", 0)])
def test_the_summary_names_the_attack_and_its_steps(name, steps):
    assert attack_steps(config(attack=name)) == steps
