"""EMA and SWA against means written out, and the statistics of an averaged net against the pictures themselves."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from toys import Sets, toy_recipe

from arat_dist.averaging import build_averages, norm_loader, restate, swa_first_step
from arat_dist.engine import Rank
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import AttackMode, Branch
from arat_dist.objectives import build_objective
from arat_dist.objectives.base import to_pixels

CPU = torch.device("cpu")
ALONE = Rank(0, 1, CPU)


def moved(net: torch.nn.Module) -> None:
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 1)


def test_ema_and_swa_are_the_means_of_their_definitions(sets: Sets):
    recipe = toy_recipe(sets, train={"ema_decay": 0.75, "swa_start_epoch": 1, "swa_every": 2})
    net = build_objective(recipe).classifier.double()
    averages = build_averages(recipe, net, num_samples=44)
    assert averages["swa"].first == 6  # 5.5 steps an epoch: the first that ends after the first epoch's end
    ema, swa = None, []
    for done in range(1, 12):
        moved(net)
        for average in averages.values():
            average.update(net, done)
        weights = torch.cat([p.detach().flatten() for p in net.parameters()])
        # The first weights go in as they are, the next ones weigh more than they will in the end.
        decay = min(0.75, done / (done + 9))
        ema = weights if ema is None else decay * ema + (1 - decay) * weights
        swa += [weights] if done in (6, 8, 10) else []
        assert averages["swa"].has_begun == (done >= 6)
    for name, expected in (("ema", ema), ("swa", sum(swa) / 3)):
        got = torch.cat([p.flatten() for p in averages[name].classifier.parameters()])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert [averages["swa"].count(done) for done in (5, 6, 7, 8, 11)] == [0, 1, 1, 2, 3]
    counters = [b for name, b in averages["swa"].classifier.named_buffers() if name.endswith("num_batches_tracked")]
    assert counters
    assert {int(counter) for counter in counters} == {10}  # those of the last weights taken in: counters have no mean


@pytest.mark.parametrize(("start", "first"), [(0, 1), (1, 100), (1.5, 150), (0.001, 1), (75, 7500)])
def test_swa_begins_after_the_first_step_that_ends_at_the_epochs_end(start, first):
    assert swa_first_step(start, num_samples=800, batch_size=8) == first


@pytest.mark.parametrize("name", ["arat", "at", "standard", "trades"])
def test_statistics_are_those_of_the_pictures_that_each_branch_is_for(sets: Sets, name):
    objective_keys = {"name": name, **({"gamma": 2} if name == "arat" else {})}
    recipe = toy_recipe(sets, objective=objective_keys, train={"norm_samples": 20, "global_batch_size": 20})
    objective = build_objective(recipe).double().train()
    net = copy.deepcopy(objective.classifier)
    moved_before = {k: v.clone() for k, v in objective.classifier.state_dict().items()}
    untouched = copy.deepcopy(net)
    restate(objective, net, recipe, ALONE)

    # One batch holds all pictures, so that the first norm's statistics can be written out.
    with norm_loader(recipe, ALONE) as (loader, shares):
        assert [len(share) for share in shares] == [20]
        (batch,) = [tuple(tensor.clone() for tensor in batch) for batch in loader.iterate(shares)]
    pixels = to_pixels(batch[0], torch.float64)
    inputs = objective.inputs(untouched, pixels, *batch[1:])
    if name != "standard":
        assert (inputs["adv"] - pixels).abs().max() > 0.01
    assert (
        set(inputs)
        == {"arat": {"adv", "clean"}, "at": {"adv"}, "standard": {"clean"}, "trades": {"adv", "clean"}}[name]
    )
    backbone: Any = net.backbone
    first = backbone.conv1[0]
    groups = [[inputs["adv"]], [inputs["clean"]]] if name == "arat" else [[*inputs.values()]]
    norm = backbone.conv1[1]
    for layer, group in zip((norm.adv, norm.clean) if name == "arat" else (norm,), groups, strict=True):
        maps = torch.cat([first((x - net.mean) / net.std) for x in group]).detach()
        torch.testing.assert_close(layer.running_mean, maps.mean((0, 2, 3)), rtol=0, atol=1e-10)
        torch.testing.assert_close(layer.running_var, maps.transpose(0, 1).flatten(1).var(1), rtol=1e-9, atol=1e-10)
    # The net in training, whose hooks and modes are its own, is as it was.
    for key, value in objective.classifier.state_dict().items():
        assert torch.equal(value, moved_before[key]), key
    assert not any(module._forward_pre_hooks for module in net.modules())


def logits(net: Classifier, x: torch.Tensor, branch: Branch, norm_stats: str) -> torch.Tensor:
    with torch.no_grad(), net.branch(branch), AttackMode(net)(norm_stats):
        return net(x)


def test_a_deeper_norm_sees_what_its_branch_gives_it(sets: Sets):
    recipe = toy_recipe(sets, train={"norm_samples": 20, "global_batch_size": 20})
    objective = build_objective(recipe).double().train()
    stale = objective.classifier
    net = copy.deepcopy(stale)
    restate(objective, net, recipe, ALONE)
    with norm_loader(recipe, ALONE) as (loader, shares):
        (batch,) = [tuple(tensor.clone() for tensor in batch) for batch in loader.iterate(shares)]
    pixels = to_pixels(batch[0], torch.float64)
    for branch, x in objective.inputs(net, pixels, *batch[1:]).items():
        by_batch, by_running = logits(net, x, branch, "batch"), logits(net, x, branch, "running")
        # One batch's statistics are the running ones, but for n/(n-1) in each norm's variance.
        off = (by_running - by_batch).abs().mean()
        assert off < 0.1 * by_batch.std()
        assert off < 0.1 * (logits(stale, x, branch, "running") - by_batch).abs().mean()


@pytest.mark.parametrize(
    ("num_samples", "batch", "sizes"),
    [(44, 8, [7] * 6), (17, 8, [5] * 3), (41, 8, [6] * 6), (3, 2, [2]), (2, 2, [2]), (9, 2, [2] * 4), (5, 44, [5])],
)
def test_no_batch_of_the_measurement_is_a_handful(sets: Sets, num_samples, batch, sizes):
    recipe = toy_recipe(sets, train={"norm_samples": num_samples, "global_batch_size": batch})
    with norm_loader(recipe, ALONE) as (loader, shares):
        assert [len(share) for share in shares] == sizes
        assert [len(images) for images, _, _ in loader.iterate(shares)] == sizes


def test_ranks_share_the_pictures_without_overlap(sets: Sets):
    recipe = toy_recipe(sets, train={"norm_samples": 21, "global_batch_size": 8}, cluster={"workers": 2})
    seen = []
    for index in range(2):
        with norm_loader(recipe, Rank(index, 2, CPU)) as (_, shares):
            assert [len(share) for share in shares] == [3, 3, 3]
            seen.append(np.concatenate(shares))
    assert len(set(np.concatenate(seen).tolist())) == 18
    assert min(map(min, seen)) >= 44 * 3  # visits that the run itself never makes
