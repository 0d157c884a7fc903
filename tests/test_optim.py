"""The learning rate at its boundaries, who is decayed, and the moving average written out."""

import math

import pytest
import timm
import torch
from toys import ToyNet, toy_classifier, toy_setting

from arat_dist.config import ARATConfig, OptimConfig
from arat_dist.objectives import ARAT
from arat_dist.optim import build_optimizer, lr_at


def config(**keys) -> OptimConfig:
    return OptimConfig.model_validate({"lr": 0.1, **keys})


def test_milestones_take_effect_in_the_first_batch_that_begins_at_or_after_them():
    step = config(schedule="step", milestones=(75, 90))

    def at(n: int, num_samples: int) -> float:
        return lr_at(n, step, num_samples=num_samples, batch_size=128, epochs=100)

    assert [at(n, 391 * 128) for n in (0, 75 * 391 - 1, 75 * 391, 90 * 391 - 1, 90 * 391, 39099)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01, 0.001, 0.001], rel=1e-12
    )
    # 50,000 / 128 = 390.625 steps an epoch: epoch 75 ends within step 29296, so 29297 is the first of the new rate.
    assert [at(n, 50_000) for n in (29296, 29297, 35156, 35157)] == pytest.approx([0.1, 0.01, 0.01, 0.001], rel=1e-12)


def test_warm_up_reaches_the_rate_at_its_last_step_and_is_absent_unless_asked_for():
    for schedule in ({"schedule": "constant"}, {"schedule": "step", "milestones": (9,)}, {"schedule": "cosine"}):
        assert lr_at(0, config(**schedule), num_samples=100, batch_size=10, epochs=10) == 0.1
    warm = config(schedule="constant", warmup_epochs=1.25)  # 12.5 steps: 13 of them
    rates = [lr_at(n, warm, num_samples=100, batch_size=10, epochs=10) for n in range(15)]
    assert rates == pytest.approx([0.1 * (n + 1) / 13 for n in range(13)] + [0.1, 0.1])
    assert rates[12] == rates[13] == 0.1


@pytest.mark.parametrize("per_epoch", [10, 10.4])
def test_cosine_goes_from_the_rate_to_the_last_step_above_the_minimum(per_epoch):
    cosine = config(schedule="cosine", warmup_epochs=1, min_lr=0.01)
    warmup, total = math.ceil(per_epoch), math.ceil(5 * per_epoch)
    rates = [lr_at(n, cosine, num_samples=round(10 * per_epoch), batch_size=10, epochs=5) for n in range(total + 3)]
    assert rates[warmup - 1] == rates[warmup] == pytest.approx(0.1)
    for n in range(warmup, total):
        angle = math.pi * (n - warmup) / (total - warmup)
        assert rates[n] == pytest.approx(0.01 + 0.09 * 0.5 * (1 + math.cos(angle)))
    assert rates[total - 1] > 0.01
    assert rates[total:] == pytest.approx([0.01] * 3)
    assert sorted(rates[warmup:], reverse=True) == rates[warmup:]


def test_a_milestone_counts_from_the_first_batch_that_begins_at_or_after_it():
    """Exactly: with 10.8 steps an epoch, that of epoch 90 begins at sample 9720 of 90 * 108."""
    steps = config(schedule="step", milestones=(90,))
    rates = [lr_at(n, steps, num_samples=108, batch_size=10, epochs=100) for n in (971, 972)]
    assert rates == [0.1, pytest.approx(0.01)]


def test_the_rate_is_a_pure_function_of_the_step():
    cosine = config(schedule="cosine", warmup_epochs=1)
    forward = [lr_at(n, cosine, num_samples=70, batch_size=10, epochs=4) for n in range(28)]
    backward = [lr_at(n, cosine, num_samples=70, batch_size=10, epochs=4) for n in reversed(range(28))]
    assert forward == backward[::-1]


def exempt_names(module: torch.nn.Module, **keys) -> set[str]:
    """Names of the parameters that aren't decayed; every parameter must be in one group."""
    optimizer = build_optimizer(module, config(weight_decay=0.1, **keys))
    names = {id(p): name for name, p in module.named_parameters()}
    grouped = {float(g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in optimizer.param_groups}
    assert set(grouped) == {0.0, 0.1}
    assert grouped[0.0] | grouped[0.1] == set(names.values())
    assert not grouped[0.0] & grouped[0.1]
    return grouped[0.0]


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_of_both_branches_and_the_predictors_are_not_decayed(name):
    arat = ARAT(toy_classifier(), toy_setting(ARAT), ARATConfig(name="arat"))
    decayed = {f"classifier.backbone.{part}.weight" for part in ("conv1", "conv2", "fc")}
    decayed |= {f"predictors.{i}.{j}.weight" for i in (0, 1) for j in (0, 3)}
    everything = {n for n, _ in arat.named_parameters()}
    assert decayed < everything
    assert exempt_names(arat, name=name) == everything - decayed


def test_what_a_timm_net_names_is_not_decayed_wherever_the_net_sits():
    vit = timm.create_model("vit_tiny_patch16_224", depth=1, embed_dim=12, num_heads=1, img_size=32, num_classes=3)
    holder = torch.nn.ModuleDict({"classifier": torch.nn.ModuleDict({"backbone": vit})})
    exempt = exempt_names(holder)
    named = {f"classifier.backbone.{name}" for name in ("pos_embed", "cls_token")}
    assert named < exempt
    small = {n for n, p in holder.named_parameters() if n.endswith(".bias") or "norm" in n}
    assert exempt == named | small


def test_the_optimizer_is_the_one_that_the_recipe_names():
    net = ToyNet()
    sgd = build_optimizer(net, config(momentum=0.8, nesterov=True))
    assert isinstance(sgd, torch.optim.SGD)
    assert sgd.param_groups[0]["momentum"] == 0.8
    assert sgd.param_groups[0]["nesterov"]
    adamw = build_optimizer(net, config(name="adamw", betas=(0.8, 0.9)))
    assert isinstance(adamw, torch.optim.AdamW)
    assert tuple(adamw.param_groups[0]["betas"]) == (0.8, 0.9)
