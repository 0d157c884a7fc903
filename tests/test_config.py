"""The recipe schema: what it reads, what it refuses, and that every refusal is one line a user can act on."""

import copy
import dataclasses
import hashlib
import json
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from arat_dist.config import ARATConfig, ATConfig, Recipe
from arat_dist.errors import UserError
from arat_dist.recipe import find_recipe, iter_keys, load_recipe, parse_recipe, shipped_recipes

MINIMAL = {
    "data": {"train": "train.beton", "val": "val.beton", "num_classes": 10, "image_size": 32},
    "model": {"name": "resnet18"},
    "objective": {"name": "arat"},
    "train": {"epochs": 10, "global_batch_size": 64},
}
SECTIONS = list(Recipe.model_fields)


def tree_with(**changes):
    """The minimal recipe with `section__key=value` changes."""
    tree = copy.deepcopy(MINIMAL)
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        tree.setdefault(section, {})[key] = value
    return tree


def refusal(tree) -> str:
    """The one line that parsing the recipe ends with."""
    with pytest.raises(UserError) as caught:
        parse_recipe(tree, source="my.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("my.yaml: ")
    return message.removeprefix("my.yaml: ")


def answer_to(tree) -> str:
    """What parsing the recipe says, or nothing."""
    try:
        parse_recipe(tree)
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture
def recipe_file(tmp_path):
    """Writes a recipe tree or text and returns its path."""

    def write(content) -> Path:
        path = tmp_path / "my.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


# --- what it reads


def test_fractions_are_numbers():
    recipe = parse_recipe(
        tree_with(
            attack__eps="4/255", attack__step_size=" 1 / 255 ", data__crop_scale=["1/4", 1], model__std=["1/2"] * 3
        )
    )
    assert recipe.attack.eps == 4 / 255
    assert recipe.attack.step_size == 1 / 255
    assert recipe.data.crop_scale == (0.25, 1.0)
    assert recipe.model.std == (0.5, 0.5, 0.5)


def test_exponents_without_a_dot_are_numbers(recipe_file):
    text = yaml.safe_dump(MINIMAL) + "optim: {weight_decay: 5e-4, lr: 1e-1}\n"
    text = text.replace("name: resnet18", "name: resnet18\n  args: {drop_path_rate: 1e-1, act_layer: relu}")
    assert yaml.safe_load("5e-4") == "5e-4", "PyYAML reads it as a number now: _scientific can go"
    recipe = load_recipe(recipe_file(text))
    assert (recipe.optim.weight_decay, recipe.optim.lr) == (5e-4, 0.1)
    assert recipe.model.args == {"drop_path_rate": 0.1, "act_layer": "relu"}


def test_augmentation_is_off_unless_asked_for():
    assert (parse_recipe(MINIMAL).data.color_jitter, parse_recipe(MINIMAL).data.rand_augment) == (None, None)
    data = parse_recipe(tree_with(data__color_jitter=[0.4, "2/5", 0, 0.1], data__rand_augment=[2, "9/2"])).data
    assert data.color_jitter == (0.4, 0.4, 0, 0.1)
    assert data.rand_augment == (2, 4.5)


def test_the_objective_picks_its_section():
    assert parse_recipe(MINIMAL).objective == ARATConfig(name="arat")
    assert parse_recipe(tree_with(objective__name="at")).objective == ATConfig(name="at")


def test_world_size_counts_this_process():
    assert parse_recipe(tree_with(cluster__workers=0)).world_size == 1
    assert parse_recipe(tree_with(cluster__workers=4)).world_size == 4
    assert parse_recipe(tree_with(cluster__workers=[2, 4])).world_size == 4


# --- the resolved recipe

FULL = tree_with(
    model__args={"stem": "cifar", "drop_path_rate": 0.1, "chans": [1, 2]},
    model__mean=[0.49, 0.48, 0.45],
    objective__taps=["layer4.0", "layer4.1"],
    attack__eps="8/255",
    optim__schedule="step",
    optim__milestones=[5, "15/2"],
    optim__weight_decay=1e-16,
    train__ema_decay=0.999,
    eval__eps="1/3",
    data__train="1e5",
    track__experiment="yes",
)


@pytest.mark.parametrize("tree", [MINIMAL, FULL, tree_with(objective__name="standard")])
def test_print_config_round_trip(tree, recipe_file):
    recipe = parse_recipe(tree)
    again = load_recipe(recipe_file(recipe.to_yaml()))
    assert again == recipe
    assert again.sha256() == recipe.sha256()
    assert again.to_yaml() == recipe.to_yaml()


@given(
    lr=st.floats(min_value=1e-30, max_value=1e30),
    eps=st.floats(min_value=1e-9, max_value=1.0),
    name=st.text(min_size=1, max_size=8),
)
def test_round_trip_is_exact(lr, eps, name):
    recipe = parse_recipe(tree_with(optim__lr=lr, attack__eps=eps, attack__step_size=eps / 4, data__train=name))
    assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


def test_print_config_shows_every_key():
    shown = yaml.safe_load(parse_recipe(MINIMAL).to_yaml())
    assert list(shown) == SECTIONS
    for section, field in shown.items():
        assert field == json.loads(getattr(parse_recipe(MINIMAL), section).model_dump_json())


def test_sha256_follows_the_content_alone():
    recipe = parse_recipe(tree_with(attack__eps="8/255"))
    turned = parse_recipe(dict(reversed(tree_with(attack__eps=8 / 255).items())))
    assert turned.sha256() == recipe.sha256()
    assert parse_recipe(tree_with(attack__eps="7/255")).sha256() != recipe.sha256()
    content = json.dumps(recipe.model_dump(mode="json"), sort_keys=True)
    assert recipe.sha256() == hashlib.sha256(content.encode()).hexdigest()


def test_a_recipe_is_frozen():
    recipe = parse_recipe(MINIMAL)
    for section in [recipe, *(getattr(recipe, name) for name in SECTIONS)]:
        key = next(iter(type(section).model_fields))
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, getattr(section, key))


def test_every_key_is_described():
    keys = list(iter_keys())
    assert {name.split(".")[0] for name, _, _ in keys} == set(SECTIONS)
    assert [name for name, _, text in keys if not text] == []
    assert ("train.epochs", "required", "Passes over the training set.") in keys
    assert ("objective.gamma", "30.0") in {(name, default) for name, default, _ in keys}


# --- unknown keys

MISSPELLED = {
    "data": ("imagesize", "image_size"),
    "model": ("pretrain", "pretrained"),
    "objective": ("gama", "gamma"),
    "attack": ("epss", "eps"),
    "optim": ("weigth_decay", "weight_decay"),
    "train": ("epoch", "epochs"),
    "engine": ("zero-stage", "zero_stage"),
    "eval": ("atack", "attack"),
    "track": ("experimnt", "experiment"),
    "cluster": ("worker", "workers"),
}


@pytest.mark.parametrize("section", SECTIONS)
def test_an_unknown_key_names_the_nearest(section):
    wrong, right = MISSPELLED[section]
    message = refusal(tree_with(**{f"{section}__{wrong}": 1}))
    assert message.startswith(f"{section}.{wrong}: unknown key")
    assert message.endswith(f"; did you mean {section}.{right}?")


@pytest.mark.parametrize(
    ("key", "answer"),
    [
        ("train.lr", "train.lr: unknown key; did you mean optim.lr?"),
        ("train.wholly_different", "train.wholly_different: unknown key"),
        ("objective.lr", "objective.lr: unknown key of arat; did you mean optim.lr?"),
    ],
)
def test_an_unknown_key_of_another_place(key, answer):
    assert refusal(tree_with(**{key.replace(".", "__"): 1})) == answer


def test_a_key_of_another_objective_is_not_suggested_to_itself():
    assert refusal(tree_with(objective__name="at", objective__gamma=3)) == "objective.gamma: unknown key of at"


def test_an_unknown_section():
    assert refusal(MINIMAL | {"trian": {}}) == "trian: unknown key; did you mean train?"


# --- wrong values


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        (
            {"objective__name": "trade"},
            "objective.name: 'trade': one of standard, at, trades, mart",
        ),
        ({"objective__taps": "layer4"}, "objective.taps: 'layer4': input should be 'auto' or input should be a list"),
        ({"objective__gamma": -1}, "objective.gamma: -1: "),
        ({"attack__eps": "3/0"}, "attack.eps: '3/0': "),
        ({"attack__eps": "1/2/3"}, "attack.eps: '1/2/3': "),
        ({"attack__eps": "inf/2"}, "attack.eps: inf: input should be a finite number"),
        ({"attack__eps": "/"}, "attack.eps: '/': "),
        ({"attack__eps": 0}, "attack.eps: 0: input should be greater than 0"),
        ({"attack__eps": True}, "attack.eps: True: a number would be right"),
        ({"attack__eps": math.nan}, "attack.eps: nan: "),
        ({"attack__norm": "l0"}, "attack.norm: 'l0': input should be 'linf', 'l2' or 'l1'"),
        ({"attack__steps": 2.5}, "attack.steps: 2.5: "),
        ({"optim__lr": math.inf}, "optim.lr: inf: input should be a finite number"),
        ({"optim__betas": [0.9, 1]}, "optim.betas.1: 1: input should be less than 1"),
        ({"train__epochs": True}, "train.epochs: True: a number would be right"),
        ({"train__epochs": "ten"}, "train.epochs: 'ten': "),
        ({"train__global_batch_size": 1}, "train.global_batch_size: 1: "),
        ({"train__ema_decay": 1}, "train.ema_decay: 1: input should be less than 1"),
        (
            {"eval__attack": "pgd0"},
            "eval.attack: 'pgd0': none, pgdN (N steps), such as pgd20, apgd, apgdN, apgd-ce, apgd-t, fab-t",
        ),
        ({"eval__attack": "pgd"}, "eval.attack: 'pgd': "),
        ({"eval__attack": "apgd0"}, "eval.attack: 'apgd0': "),
        ({"data__val_crop": 0}, "data.val_crop: 0: "),
        (
            {"data__color_jitter": [0.4, 0.4, 0.4, 0.6]},
            "data.color_jitter.3: 0.6: input should be less than or equal to",
        ),
        (
            {"data__color_jitter": [-0.1, 0, 0, 0]},
            "data.color_jitter.0: -0.1: input should be greater than or equal to 0",
        ),
        ({"data__color_jitter": 0.4}, "data.color_jitter: 0.4: input should be a list"),
        ({"data__rand_augment": [2, 11]}, "data.rand_augment.1: 11: input should be less than or equal to 10"),
        ({"data__rand_augment": [0, 9]}, "data.rand_augment.0: 0: input should be greater than or equal to 1"),
        ({"data__rand_augment": [2]}, "data.rand_augment.1: missing"),
        ({"model__std": [0, 1, 1]}, "model.std.0: 0: input should be greater than 0"),
        ({"model__mean": [0.5, 0.5]}, "model.mean.2: missing"),
        ({"model__args": 3}, "model.args: 3: a section with keys below it would be right"),
        ({"data__train": "two\nlines", "data__num_classes": "two\nlines"}, r"data.num_classes: 'two\nlines': "),
    ],
)
def test_a_wrong_value_names_key_value_and_remedy(changes, start):
    assert refusal(tree_with(**changes)).startswith(start)


@pytest.mark.parametrize("section", ["data", "model", "objective", "train"])
def test_a_missing_section(section):
    tree = copy.deepcopy(MINIMAL)
    del tree[section]
    assert refusal(tree) == f"{section}: missing"


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("value", [None, 3, "text", [1]])
def test_a_section_that_is_none(section, value):
    message = refusal(MINIMAL | {section: value})
    assert message == f"{section}: {value!r}: a section with keys below it would be right"


def test_several_mistakes_are_counted():
    assert refusal(tree_with(attack__eps=0, optim__lr=0)).endswith(" (and 1 more)")
    assert refusal({"objective": {}}).endswith(" (and 3 more)")


@given(key=st.text(max_size=20), value=st.one_of(st.none(), st.text(), st.floats(), st.integers(), st.lists(st.text())))
def test_whatever_is_refused_is_one_line(key, value):
    odd_objective = {"objective": {"name": value, key: 1}}
    for tree in (MINIMAL | {key: value}, tree_with(attack__eps=value), MINIMAL | odd_objective):
        assert "\n" not in answer_to(tree)


# --- keys that must fit each other


@dataclasses.dataclass(frozen=True)
class Clash:
    changes: dict
    says: list[str]
    "Key, value, and a word of what would be right."
    but: dict
    "Changes that make the same recipe pass."


NOT_COMPILED = {"train__compile": False}
CLASHES = [
    Clash({"attack__eps": 2}, ["attack.eps: 2", "at most 1"], {"attack__norm": "l2"}),
    Clash({"eval__eps": 2}, ["eval.eps: 2", "at most 1"], {"eval__norm": "l2"}),
    Clash({"attack__norm": "l1", "attack__eps": 3073}, ["attack.eps: 3073", "3*32^2 (3072)"], {"attack__eps": 3072}),
    Clash({"eval__norm": "l1", "eval__eps": 3073}, ["eval.eps: 3073", "3*32^2 (3072)"], {"eval__eps": 3072}),
    Clash({"attack__norm": "l1", "attack__eps": 12, "eval__eps": 3073}, ["eval.eps: 3073"], {"eval__norm": "l2"}),
    Clash({"eval__norm": "l2"}, ["eval.norm: l2", "eval.eps"], {"eval__eps": 0.5}),
    Clash({"attack__step_size": 0.5}, ["attack.step_size: 0.5", "attack.eps"], {"attack__eps": 0.25}),
    Clash({"optim__warmup_epochs": 10}, ["optim.warmup_epochs: 10", "train.epochs (10)"], {"train__epochs": 11}),
    Clash({"optim__schedule": "step"}, ["optim.milestones: []", "step"], {"optim__milestones": [5]}),
    Clash({"optim__milestones": [5]}, ["optim.milestones: [5.0]", "cosine"], {"optim__schedule": "step"}),
    Clash(
        {"optim__schedule": "step", "optim__milestones": [7, 5]},
        ["optim.milestones: [7.0, 5.0]", "ascending"],
        {"optim__milestones": [5, 7]},
    ),
    Clash({"optim__min_lr": 0.2}, ["optim.min_lr: 0.2", "optim.lr (0.1)"], {"optim__lr": 0.3}),
    Clash(
        {"optim__nesterov": True, "optim__momentum": 0}, ["optim.nesterov: true", "sgd, 0"], {"optim__momentum": 0.9}
    ),
    Clash({"optim__nesterov": True, "optim__name": "adamw"}, ["optim.nesterov: true", "adamw"], {"optim__name": "sgd"}),
    Clash(
        {"cluster__workers": 4, "train__global_batch_size": 7},
        ["train.global_batch_size: 7", "2 a worker (4)"],
        {"train__global_batch_size": 8},
    ),
    Clash(
        {"cluster__workers": [1, 4], "train__global_batch_size": 7},
        ["train.global_batch_size: 7", "2 a worker (4)"],
        {"cluster__workers": [1, 3]},
    ),
    Clash(
        {"cluster__placement": "strict_spread", "cluster__workers": 2},
        ["cluster.placement: strict_spread", "cluster.address"],
        {"cluster__address": "10.0.0.1:6379"},
    ),
    Clash({"data__crop_scale": [0, 1]}, ["data.crop_scale: [0.0, 1.0]", "above 0"], {"data__crop_scale": [0.1, 1]}),
    Clash({"data__crop_scale": [1, 0.5]}, ["data.crop_scale: [1.0, 0.5]", "smaller"], {"data__crop_scale": [0.5, 1]}),
    Clash(
        {"model__pretrained": True, "model__checkpoint": "a.pth"},
        ["model.checkpoint: a.pth", "model.pretrained"],
        {"model__pretrained": False},
    ),
    Clash(
        {"cluster__workers": 2, "train__global_batch_size": 16, "train__micro_batches": 5},
        ["train.micro_batches: 5", "at most 4", "2 workers", "(16)"],
        {"train__micro_batches": 4},
    ),
    Clash(
        {"train__compile": True, "train__sync_norms": True}, ["train.compile: true", "train.sync_norms"], NOT_COMPILED
    ),
    Clash(
        {"train__compile": True, "train__grad_checkpointing": True}, ["without train.grad_checkpointing"], NOT_COMPILED
    ),
    Clash({"train__compile": True, "track__diagnostics_every": 5}, ["without track.diagnostics_every"], NOT_COMPILED),
]


@pytest.mark.parametrize("clash", CLASHES, ids=lambda clash: " ".join(clash.changes))
def test_keys_must_fit_each_other(clash):
    message = refusal(tree_with(**clash.changes))
    for part in clash.says:
        assert part in message
    parse_recipe(tree_with(**clash.changes | clash.but))


@pytest.mark.parametrize("workers", [[4, 1], [0, 2], [1], "1:4", -1])
def test_workers_are_a_number_or_the_least_and_the_most(workers):
    assert "cluster.workers: " in refusal(tree_with(cluster__workers=workers))


# --- overrides


def test_overrides_are_typed(recipe_file):
    recipe = load_recipe(
        recipe_file(MINIMAL),
        [
            ("attack.eps", "4/255"),
            ("attack.targeted", "on"),
            ("train.max_steps", "3"),
            ("train.ema_decay", "null"),
            ("optim.weight_decay", "5e-4"),
            ("optim.betas", "[0.9, 0.95]"),
            ("objective.split_norm", "none"),
            ("model.args.drop_rate", "0.1"),
            ("cluster.workers", 2),
        ],
    )
    assert recipe.attack.eps == 4 / 255
    assert recipe.attack.targeted is True
    assert recipe.train.max_steps == 3
    assert recipe.train.ema_decay is None
    assert recipe.optim.weight_decay == 5e-4
    assert recipe.optim.betas == (0.9, 0.95)
    assert isinstance(recipe.objective, ARATConfig)
    assert recipe.objective.split_norm == "none"
    assert recipe.model.args == {"drop_rate": 0.1}
    assert recipe.cluster.workers == 2


def test_overrides_reach_a_section_that_is_empty_in_the_file(recipe_file):
    path = recipe_file(yaml.safe_dump(MINIMAL) + "attack:\n")
    assert load_recipe(path, [("attack.steps", "3")]).attack.steps == 3


def test_a_new_objective_drops_the_old_ones_keys_and_says_so(recipe_file, caplog):
    path = recipe_file(tree_with(objective__gamma=5, objective__label_smoothing=0.1))
    assert load_recipe(path, [("objective.name", "at")]).objective == ATConfig(name="at")
    assert caplog.messages == ["objective.name: at in place of arat, whose keys go: gamma, label_smoothing"]


def test_naming_the_same_objective_changes_nothing(recipe_file, caplog):
    path = recipe_file(tree_with(objective__gamma=5))
    assert load_recipe(path, [("objective.name", "arat")]) == load_recipe(path)
    assert caplog.messages == []


@pytest.mark.parametrize("step", [1, -1])
def test_keys_given_beside_a_new_objective_stay_in_any_order(recipe_file, step):
    overrides = [("objective.name", "arat"), ("objective.gamma", "7")][::step]
    objective = load_recipe(recipe_file(tree_with(objective__name="at")), overrides).objective
    assert objective == ARATConfig(name="arat", gamma=7)


@pytest.mark.parametrize(
    ("key", "value", "answer"),
    [
        ("epochs", "3", "--epochs: a recipe key has a section, as in --train.epochs 10; did you mean train.epochs?"),
        ("trian.epochs", "3", "trian: unknown key; did you mean train?"),
        ("train.epoch", "3", "train.epoch: unknown key; did you mean train.epochs?"),
        ("train.epochs.more", "3", "--train.epochs.more: epochs is not a section"),
        ("train.epochs", "[", "--train.epochs: '[' is not a YAML value"),
        ("train.epochs", "many", "train.epochs: 'many': input should be a valid integer"),
    ],
)
def test_a_wrong_override(recipe_file, key, value, answer):
    with pytest.raises(UserError) as caught:
        load_recipe(recipe_file(MINIMAL), [(key, value)])
    assert "\n" not in str(caught.value)
    assert answer in str(caught.value)


# --- files


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("", "a recipe is a mapping of sections, this holds NoneType"),
        ("- 1", "this holds list"),
        ("train: {epochs: 1", "not a YAML file"),
        ("a: !!python/object/apply:os.getcwd []", "not a YAML file"),
        ("train:\n  epochs: 1\n  epochs: 2\n", "key 'epochs' stands twice"),
    ],
)
def test_a_file_that_is_no_recipe(recipe_file, text, answer):
    path = recipe_file(text)
    with pytest.raises(UserError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert answer in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "my.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"my\.yaml: not a YAML file"):
        load_recipe(path)


def test_yaml_merges_still_work(recipe_file):
    text = yaml.safe_dump(MINIMAL) + "optim: &o {lr: 0.2}\neval: {}\ncluster: {<<: {workers: 2}, workers: 3}\n"
    recipe = load_recipe(recipe_file(text))
    assert (recipe.optim.lr, recipe.cluster.workers) == (0.2, 3)


def test_an_unknown_recipe_lists_the_shipped_ones():
    with pytest.raises(UserError, match="no-such-recipe: no such recipe") as caught:
        find_recipe("no-such-recipe")
    for file in shipped_recipes().glob("*.yaml"):
        assert file.stem in str(caught.value)


@pytest.mark.parametrize("path", sorted(shipped_recipes().glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_load_by_path_and_by_name(path):
    assert load_recipe(path) == load_recipe(path.stem) == load_recipe(f"recipes/{path.name}")


# --- recipes on top of others


def test_a_base_gives_what_a_recipe_leaves_out(tmp_path):
    write = lambda name, tree: (tmp_path / name).write_text(yaml.safe_dump(tree))  # noqa: E731
    write("one.yaml", MINIMAL | {"objective": {"name": "arat", "gamma": 7, "label_smoothing": 0.1}})
    write("two.yaml", {"base": "one.yaml", "train": {"epochs": 3}, "optim": {"lr": 0.5}})
    write("three.yaml", {"base": "two.yaml", "objective": {"name": "at"}})
    one, two, three = (load_recipe(tmp_path / f"{name}.yaml") for name in ("one", "two", "three"))
    assert (two.train.epochs, two.train.global_batch_size, two.optim.lr) == (3, 64, 0.5)
    assert two.objective == one.objective
    # The keys of another method are not taken over.
    assert three.objective == ATConfig(name="at")
    assert three.train == two.train
    assert load_recipe(tmp_path / "three.yaml", [("train.epochs", "4")]).train.epochs == 4
    assert "base" not in yaml.safe_load(three.to_yaml())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ("../{folder}/a.yaml", "base: a.yaml -> b.yaml -> a.yaml: goes round in a circle"),
        (3, "base: 3: a recipe's name or its file, beside this one, would be right"),
        ("nowhere", "nowhere: no such recipe"),
    ],
)
def test_a_base_that_is_none(tmp_path, base, message):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text(f"base: {base}\n".replace("{folder}", tmp_path.name))
    with pytest.raises(UserError, match=message) as raised:
        load_recipe(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)


def test_another_attack_takes_no_step_from_the_one_before(recipe_file, caplog):
    tree = tree_with(attack__step_size="2/255", attack__steps=7, attack__eps="4/255")
    recipe = load_recipe(recipe_file(tree), [("attack.eps", "6/255"), ("attack.name", "fgsm")])
    assert (recipe.attack.step_size, recipe.attack.steps, recipe.attack.eps) == (None, None, 6 / 255)
    assert "attack.name: fgsm in place of the default, whose keys go: step_size, steps" in caplog.text
    given = load_recipe(recipe_file(tree), [("attack.step_size", "1/255"), ("attack.name", "nfgsm")])
    assert given.attack.step_size == 1 / 255


@pytest.mark.parametrize(
    ("changes", "start"),
    [
        ({"attack__name": "fgsm", "attack__steps": 2}, "attack.steps: 2: fgsm takes 1 step"),
        ({"attack__name": "nfgsm", "attack__norm": "l2"}, "attack.name: nfgsm: goes with norm linf"),
        ({"attack__name": "apgd", "attack__step_size": 0.01}, "attack.step_size: 0.01: goes without apgd"),
        ({"attack__targeted": True, "attack__loss": "kl"}, "attack.targeted: true: goes with attack.loss ce or dlr"),
        ({"attack__loss": "dlr", "data__num_classes": 2}, "attack.loss: dlr: needs 3 classes"),
        ({"attack__steps_from": [[3, 2], [1, 3]]}, "attack.steps_from: [[3.0, 2], [1.0, 3]]: ascending epochs"),
        ({"attack__steps_from": [[10, 2]]}, "attack.steps_from: [[10.0, 2]]: epochs below train.epochs (10)"),
        (
            {"data__image_sizes_from": [[3, 24], [1, 16]]},
            "data.image_sizes_from: [[3.0, 24], [1.0, 16]]: ascending epochs",
        ),
        (
            {"data__image_sizes_from": [[10, 24]]},
            "data.image_sizes_from: [[10.0, 24]]: epochs below train.epochs (10)",
        ),
        (
            {"data__image_sizes_from": [[0, 24]], "data__augment": "pad_crop"},
            "data.image_sizes_from: [[0.0, 24]]: goes without data.augment pad_crop, whose pictures have one size; "
            "random_resized_crop would be right",
        ),
        ({"data__image_sizes_from": [[0, 7]]}, "data.image_sizes_from.0.1: 7: "),
        ({"data__image_sizes_from": [[0, 16]], "attack__norm": "l1", "attack__eps": 800}, "attack.eps: 800: "),
        # The evaluation takes it over, at data.image_size.
        (
            {"data__image_sizes_from": [[0, 64]], "attack__norm": "l1", "attack__eps": 5000},
            "attack.eps: 5000: pixels are in [0,1], so l1 eps is at most 3*32^2 (3072)",
        ),
        ({"data__stage_to": "local"}, "data.stage_to: 'local': an absolute path would be right"),
        ({"data__stage_to": "s3://bucket/x"}, "data.stage_to: 's3://bucket/x': an absolute path would be right"),
        ({"attack__eps_warmup_epochs": 10}, "attack.eps_warmup_epochs: 10: less than train.epochs (10)"),
        ({"attack__loss": "kl", "attack__start": "none"}, "attack.start: none: KL from the clean prediction"),
        ({"objective__name": "trades", "attack__start": "none"}, "attack.start: none: KL from the clean prediction"),
        ({"attack__norm": "l1", "attack__eps": 3100}, "attack.eps: 3100: "),
        ({"objective__taps": []}, "objective.gamma: goes with at least one of objective.taps"),
        ({"train__swa_start_epoch": 10}, "train.swa_start_epoch: 10: less than train.epochs (10)"),
        (
            {"objective": {"name": "lbgat", "teacher": {"name": "x", "pretrained": True, "checkpoint": "x.pth"}}},
            "objective.teacher.checkpoint: x.pth: goes without objective.teacher.pretrained",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together(changes, start):
    tree = tree_with(**{key: value for key, value in changes.items() if "__" in key})
    assert refusal(tree | {key: value for key, value in changes.items() if "__" not in key}).startswith(start)


def test_image_sizes_are_a_course_over_the_epochs():
    data = parse_recipe(tree_with(data__image_sizes_from=[[2, 16], [5.5, 24]])).data
    assert [data.image_size_at(epoch) for epoch in (0, 1.99, 2, 5.49, 5.5, 9.9)] == [32, 32, 16, 16, 24, 24]
    assert data.training_sizes == [16, 24, 32]
    assert parse_recipe(tree_with(data__image_sizes_from=[[0, 24], [3, 16]])).data.training_sizes == [16, 24]
    assert parse_recipe(tree_with()).data.training_sizes == [32]
