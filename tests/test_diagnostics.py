"""The diagnostics against gradients and statistics taken one by one."""

import math
from typing import Any

import pytest
import torch
from toys import Sets, toy_batch, toy_classifier, toy_recipe, toy_setting

from arat_dist.config import ARATConfig
from arat_dist.diagnostics import branch_distance, gradient_conflict, layer_group
from arat_dist.engine import Rank
from arat_dist.objectives import ARAT
from arat_dist.run import Run
from arat_dist.train import train

ALONE = Rank(0, 1, torch.device("cpu"))


def arat(**keys) -> ARAT:
    config = ARATConfig.model_validate({"name": "arat", "gamma": 3, **keys})
    classifier = toy_classifier(split=config.split_norm != "none")
    return ARAT(classifier, toy_setting(ARAT), config).double().train()


def test_cosine_and_opposed_share_are_those_of_the_two_gradients():
    objective = arat()
    out = objective(*toy_batch())
    got = gradient_conflict(objective.classifier, out.terms, 1.0, ALONE)
    net = objective.classifier.backbone
    reached = {}
    for name, p in net.named_parameters():
        pair = [
            torch.autograd.grad(out.terms[term], p, retain_graph=True, allow_unused=True)[0]
            for term in ("classification", "invariance")
        ]
        if None not in pair:
            reached[name] = pair
    # With the stop-gradient, the clean branch's own norms feel the classification alone; so does the classifier.
    assert {name.partition(".")[0] for name in reached} == {"conv1", "conv2", "norm1", "norm2"}
    assert not any(".clean." in name for name in reached)
    for group in ("", "conv1", "conv2", "norm1", "norm2"):
        pairs = [pair for name, pair in reached.items() if name.startswith(group)]
        a, b = (torch.cat([pair[i].flatten() for pair in pairs]) for i in (0, 1))
        suffix = f"_{group}" if group else ""
        cosine = float(a @ b / (a.norm() * b.norm()))
        assert float(got[f"gradient_cosine{suffix}"]) == pytest.approx(cosine, abs=1e-12)
        opposed = sum(math.copysign(1, x) != math.copysign(1, y) for x, y in zip(a.tolist(), b.tolist(), strict=True))
        assert float(got[f"gradient_opposed{suffix}"]) == opposed / len(a)
    assert len(got) == 10
    out.loss.backward()  # the graph is still there


def test_equal_and_opposite_terms_are_the_ends_of_the_scale():
    objective = arat()
    term = objective(*toy_batch()).terms["classification"]
    same = gradient_conflict(objective.classifier, {"classification": term, "invariance": 2 * term}, 1.0, ALONE)
    against = gradient_conflict(objective.classifier, {"classification": term, "invariance": -term}, 1.0, ALONE)
    assert (float(same["gradient_cosine"]), float(same["gradient_opposed"])) == (pytest.approx(1), 0)
    assert float(against["gradient_cosine"]) == pytest.approx(-1)
    assert float(against["gradient_opposed"]) > 0.99  # all but exact zeros


def test_the_branches_distance_written_out():
    objective = arat()
    backbone: Any = objective.classifier.backbone
    norms = [backbone.norm1, backbone.norm2]
    shifts, ratios = [], []
    for norm in norms:
        for side in (norm.adv, norm.clean):
            side.running_mean.uniform_(-1, 1)
            side.running_var.uniform_(0.5, 2)
        va, vc = norm.adv.running_var + 1e-5, norm.clean.running_var + 1e-5
        shifts += ((norm.adv.running_mean - norm.clean.running_mean).abs() / ((va + vc) / 2) ** 0.5).tolist()
        ratios += [abs(math.log(a / c)) for a, c in zip(va.tolist(), vc.tolist(), strict=True)]
    got = branch_distance(objective.classifier)
    assert float(got["branch_mean_distance"]) == pytest.approx(sum(shifts) / len(shifts))
    assert float(got["branch_variance_distance"]) == pytest.approx(sum(ratios) / len(ratios))
    assert branch_distance(arat(split_norm="none").classifier) == {}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("layer3.0.conv1.weight", "layer3"),
        ("conv1.weight", "conv1"),
        ("blocks.7.norm1.bias", "blocks_7"),
        ("stages.2.blocks.0.conv_dw.weight", "stages_2"),
        ("pos_embed", "pos_embed"),
    ],
)
def test_groups_of_layers(name, group):
    assert layer_group(name) == group


@pytest.mark.parametrize("name", ["arat", "at", "trades"])
def test_they_are_logged_when_asked_for_and_change_nothing(sets: Sets, tmp_path, name):
    lines = {}
    for every in (None, 2):
        recipe = toy_recipe(
            sets, objective={"name": name}, track={"diagnostics_every": every}, train={"log_every": 3, "max_steps": 6}
        )
        run = Run(str(tmp_path), f"every-{every}")
        run.open(recipe, "a" * 64)
        train(recipe, run, ALONE)
        lines[every] = run.metrics()
    new = set(lines[2][0]) - set(lines[None][0])
    expected = {"arat": {"gradient_cosine", "branch_mean_distance"}, "at": set(), "trades": {"gradient_cosine"}}[name]
    assert expected <= new
    assert bool(new) == (name != "at")
    for with_them, without in zip(lines[2], lines[None], strict=True):
        assert with_them["loss"] == without["loss"]
