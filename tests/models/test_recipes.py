"""Every shipped recipe names a net, a split and taps that exist."""

import pytest

from arat_dist.config import ARATConfig
from arat_dist.models.classifier import build_classifier
from arat_dist.recipe import find_recipe, load_recipe, recipe_names

NAMES = recipe_names()
PUBLISHED = """
    at      83.77/42.42 86.06/46.26 55.82/19.50 59.83/23.94
    trades  81.25/48.54 84.33/51.75 54.74/23.60 57.61/26.88
    mart    82.15/47.83 86.10/49.11 54.54/26.04 57.75/24.89
    lbgat   85.00/48.85 88.19/52.56 65.87/23.19 68.17/26.92
    arrest  86.63/46.14 90.24/50.20 -           73.05/24.32
    arat    87.82/49.02 90.89/50.77 67.51/23.38 72.51/24.18
    arat_swa 86.44/50.28 90.06/54.03 67.17/24.36 72.37/27.31
"""
"""Clean and AutoAttack accuracy in the paper's table: C10 RN-18, C10 WRN-34-10, C100 RN-18, C100 WRN-34-10."""
CELLS = {
    f"paper/{cell}_{row.split()[0]}": figures
    for row in PUBLISHED.strip().splitlines()
    for cell, figures in zip(
        ("cifar10_resnet18", "cifar10_wrn34_10", "cifar100_resnet18", "cifar100_wrn34_10"), row.split()[1:], strict=True
    )
    if figures != "-"
}


def test_there_is_a_recipe_for_each_cell_of_the_papers_table():
    assert {name for name in NAMES if name.startswith("paper/")} == set(CELLS)


@pytest.mark.parametrize("name", CELLS)
def test_a_cell_of_the_papers_table(name):
    recipe = load_recipe(name)
    data, net = name.removeprefix("paper/").split("_")[0], "wrn" in name
    method = name.removeprefix(f"paper/{data}_").removeprefix("resnet18_").removeprefix("wrn34_10_")
    assert recipe.objective.name == method.removesuffix("_swa")
    assert recipe.model.name == ("cifar_wrn_34_10" if net else "cifar_resnet18")
    assert (recipe.data.num_classes, recipe.data.train) == (int(data[5:]), f"data/{data}/train.beton")
    assert (recipe.train.swa_start_epoch, recipe.train.swa_every) == (75 if "swa" in name else None, 500)
    if isinstance(recipe.objective, ARATConfig):
        assert (recipe.objective.gamma, len(recipe.objective.taps)) == ((100, 11) if net else (30, 4))
    # All else is the same in every cell.
    common = load_recipe("cifar10_resnet18")
    for section in ("attack", "optim", "eval"):
        assert getattr(recipe, section) == getattr(common, section)
    assert recipe.train.model_copy(update={"swa_start_epoch": None}) == common.train
    clean, attacked = CELLS[name].split("/")
    assert f"{clean} clean / {attacked} AutoAttack" in find_recipe(name).read_text()


def test_an_ablation_differs_from_the_method_in_what_it_switches_off():
    whole = load_recipe("cifar10_resnet18")
    switched = {}
    for name in (name for name in NAMES if name.startswith("ablation/")):
        recipe = load_recipe(name)
        assert recipe.model_copy(update={"objective": whole.objective}) == whole
        before, after = whole.objective.model_dump(), recipe.objective.model_dump()
        switched[name.removeprefix("ablation/")] = {key: after[key] for key in after if after[key] != before[key]}
    assert switched == {
        "fixed_balance": {"balance": "fixed"},
        "mse": {"distance": "mse"},
        "no_predictor": {"predictor": False},
        "no_split_norm": {"split_norm": "none"},
        "no_stop_gradient": {"stop_gradient": False},
        "symmetric": {"symmetric": True},
        "plain_invariance": {
            "stop_gradient": False,
            "predictor": False,
            "split_norm": "none",
            "balance": "fixed",
        },
    }


@pytest.mark.parametrize("name", [*(n for n in NAMES if "/" not in n), "paper/cifar10_wrn34_10_arat"])
def test_the_net_of_a_shipped_recipe_builds(name):
    recipe = load_recipe(name)
    objective = recipe.objective
    classifier = build_classifier(
        recipe.model.model_copy(update={"pretrained": False}),
        num_classes=recipe.data.num_classes,
        image_size=recipe.data.image_size,
        split=getattr(objective, "split_norm", "none"),
        taps=getattr(objective, "taps", None),
    )
    assert classifier.is_split
    assert len(classifier.tap_dims) == len(classifier.taps) > 0


def test_the_resnet50_recipes_differ_in_their_engine_alone():
    plain, sharded = load_recipe("imagenet_resnet50"), load_recipe("imagenet_resnet50_zero2")
    assert (sharded.engine.kind, sharded.engine.zero_stage) == ("deepspeed", 2)
    assert sharded.model_copy(update={"engine": plain.engine}) == plain


def test_the_cifar_recipe_holds_the_papers_settings():
    recipe = load_recipe("cifar10_resnet18")
    assert recipe.objective.name == "arat"
    assert recipe.objective.gamma == 30
    assert (recipe.attack.eps, recipe.attack.step_size, recipe.attack.steps) == (8 / 255, 2 / 255, 10)
    assert (recipe.optim.lr, recipe.optim.momentum, recipe.optim.weight_decay) == (0.1, 0.9, 5e-4)
    assert (recipe.optim.milestones, recipe.optim.decay_factor) == ((75, 90), 0.1)
    assert (recipe.train.epochs, recipe.train.global_batch_size) == (100, 128)
