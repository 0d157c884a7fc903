"""Every shipped recipe names a net, a split and taps that exist."""

import pytest

from arat_dist.models.classifier import build_classifier
from arat_dist.recipe import load_recipe, shipped_recipes

RECIPES = sorted(path.stem for path in shipped_recipes().glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
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
