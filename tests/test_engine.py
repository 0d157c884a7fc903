"""Two gloo processes against one: the same gradients and weights, in float64, attack and unequal shares included."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_two_ranks
from toys import Sets, toy_batch, toy_classifier, toy_recipe, toy_setting

from arat_dist.averaging import MeasuredNorms
from arat_dist.config import ARATConfig, EngineConfig, OptimConfig
from arat_dist.data.order import SampleOrder
from arat_dist.engine import DDPEngine, Rank, averaged_statistics, build_engine
from arat_dist.objectives import ARAT, AT, Objective, build_objective
from arat_dist.objectives.base import Output, Setting
from arat_dist.train import diagnose

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, clip_grad_norm=0.5)
BATCH = 10  # dealt to two ranks as 6 and 4
STEPS = 3
SIDE = 32

# Keys of each method on a net with BatchNorm, and further ones that leave it without batch statistics.
RECIPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "standard": ({}, {}),
    "at": ({"label_smoothing": 0.1}, {}),
    "trades": ({}, {}),
    "mart": ({}, {}),
    "lbgat": ({"beta": 6}, {}),
    "arrest": ({}, {}),
    "arat": ({"gamma": 3, "adv_weight": 0.25}, {"split_norm": "none", "predictor": False}),
}
NORMS = ("batch", "group")


def objective(kind: str) -> Objective:
    """Nets whose samples know nothing of each other, so that a batch may be cut anywhere."""
    if kind == "at":
        return AT(toy_classifier(norm="group", split=False), toy_setting(AT, steps=2))
    keys = {"split_norm": "none", "predictor": False, "gamma": 3, "adv_weight": 0.25}
    config = ARATConfig.model_validate({"name": "arat", **keys})
    arat = ARAT(toy_classifier(norm="group", split=False), toy_setting(ARAT, steps=2), config)
    return arat.double()


def from_recipe(name: str, norm: str) -> Objective:
    """The method on a small timm net with BatchNorm over all ranks, or with GroupNorm, which keeps samples apart."""
    keys, without_statistics = RECIPES[name]
    args = {"channels": [8, 8, 8, 8], "stem_width": 8, "zero_init_last": False}
    if norm == "group":
        args, keys = {**args, "norm_layer": "groupnorm1"}, {**keys, **without_statistics}
    recipe = toy_recipe(
        Sets("", ""),
        data={"image_size": SIDE},
        model={"args": args},
        objective={"name": name, **keys},
        attack={"steps": 2},
        train={"sync_norms": norm == "batch"},
    )
    torch.manual_seed(0)
    return build_objective(recipe).double()


def run_steps(module: Objective, rank: Rank, num_steps: int = STEPS) -> dict[str, Any]:
    """Steps as `train` takes them, on this rank's share."""
    if rank.index:  # DDP hands out the first rank's weights
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(1)
    engine = build_engine(module, EngineConfig(), OPTIM, rank)
    order = SampleOrder(BATCH * num_steps, BATCH, 1, 0)
    images, labels, _ = toy_batch(BATCH * num_steps, side=SIDE)
    result: dict[str, Any] = {"gradients": [], "norms": [], "sizes": []}
    for step in range(num_steps):
        keys = torch.from_numpy(order.share(step, rank.index, rank.world_size))
        engine.set_lr(0.1 / (step + 1))
        out = engine(images[keys], labels[keys], keys)
        engine.backward(out.loss * (len(keys) * rank.world_size / BATCH))
        parameters = engine.objective.named_parameters()
        result["gradients"].append({name: p.grad.clone() for name, p in parameters if p.grad is not None})
        result["norms"].append(engine.step())
        result["sizes"].append(len(keys))
    engine.objective.end_epoch(rank.all_reduce)
    result["state"] = engine.objective.state_dict()
    result["optimizer"] = engine.state_dict()["state"]
    return result


def run_statistics(rank: Rank) -> dict[str, Any]:
    """Two steps of a net with BatchNorm: statistics before and after they are averaged."""
    engine = build_engine(BothBranches(toy_classifier(), Setting()), EngineConfig(), OPTIM, rank)
    images, labels, keys = toy_batch(BATCH)
    half = slice(0, 6) if rank.index == 0 else slice(6, 10)
    for _ in range(2):
        engine.backward(engine(images[half], labels[half], keys[half]).loss)
        engine.step()
    own = {name: value.clone() for name, value in engine.objective.named_buffers()}
    with averaged_statistics(engine.objective, rank):
        averaged = {name: value.clone() for name, value in engine.objective.named_buffers()}
    return {"own": own, "averaged": averaged, "after": dict(engine.objective.named_buffers())}


def run_diagnostics(rank: Rank, norm: str) -> dict[str, torch.Tensor]:
    """What the diagnostics measure in a first step."""
    module = from_recipe("arat", norm)
    images, labels, _ = toy_batch(BATCH, side=SIDE)
    keys = torch.from_numpy(SampleOrder(BATCH, BATCH, 1, 0).share(0, rank.index, rank.world_size))
    out = module(images[keys], labels[keys], keys)
    return diagnose(module, out.terms, len(keys) * rank.world_size / BATCH, rank)


def run_measured(rank: Rank) -> dict[str, torch.Tensor]:
    """Statistics of the first norm over pictures that are shared unevenly."""
    net = toy_classifier()
    images, _, _ = toy_batch(BATCH)
    share = images if rank.world_size == 1 else images[:6] if rank.index == 0 else images[6:]
    with MeasuredNorms(net) as norms:
        with torch.no_grad(), norms.measuring(), net.branch("clean"):
            net(share / 255.0)
        norms.write(rank)
    return {name: value for name, value in net.named_buffers() if "norm1" in name}


class BothBranches(Objective):
    """Both branches in one loss, each on its own pictures."""

    def losses(self, pixels: torch.Tensor, targets: torch.Tensor, keys: torch.Tensor) -> Output:
        with self.classifier.branch("adv"):
            adv = self.cross_entropy(self.classifier(pixels), targets)
        with self.classifier.branch("clean"):
            clean = self.cross_entropy(self.classifier(1 - pixels), targets)
        return Output(adv + clean, {})


def run_all(rank: Rank) -> dict[str, Any]:
    result = {kind: run_steps(objective(kind), rank) for kind in ("at", "arat")}
    result |= {f"{name} {norm}": run_steps(from_recipe(name, norm), rank, 1) for name in RECIPES for norm in NORMS}
    result["statistics"] = run_statistics(rank)
    result["diagnostics"] = {norm: run_diagnostics(rank, norm) for norm in NORMS}
    result["measured"] = run_measured(rank)
    return result


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    return on_two_ranks(run_all, tmp_path_factory.mktemp("two"))


def assert_close(a: torch.Tensor, b: torch.Tensor, what: object) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m: f"{what}: {m}")


def assert_gradients_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], what: str) -> None:
    assert set(a) == set(b) != set()
    for name, gradient in b.items():
        assert_close(a[name], gradient, f"{what}, gradient of {name}")


@pytest.mark.parametrize("kind", ["at", "arat"])
def test_two_processes_equal_one(two, kind):
    one = run_steps(objective(kind), Rank(0, 1, CPU))
    assert one["sizes"] == [10] * 3
    assert [part[kind]["sizes"] for part in two] == [[6] * 3, [4] * 3]
    for part in two:
        for step in range(STEPS):
            assert_gradients_close(part[kind]["gradients"][step], one["gradients"][step], f"step {step}")
            assert_close(part[kind]["norms"][step], one["norms"][step], f"step {step}, norm")
        for name, value in part[kind]["state"].items():
            assert_close(value, one["state"][name], name)
        for key, state in part[kind]["optimizer"].items():
            assert_close(state["momentum_buffer"], one["optimizer"][key]["momentum_buffer"], key)
    start = objective(kind).state_dict()
    assert any((one["state"][name] - value).abs().max() > 1e-3 for name, value in start.items())


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_method_is_the_same_on_two_ranks(two, name, norm):
    """The attack included: BatchNorm's statistics, in it too, span both ranks' unequal shares."""
    module = from_recipe(name, norm)
    one = run_steps(module, Rank(0, 1, CPU), 1)
    assert set(one["gradients"][0]) == {key for key, p in module.named_parameters() if p.requires_grad}
    parts = [part[f"{name} {norm}"] for part in two]
    assert [part["sizes"] for part in parts] == [[6], [4]]
    for part in parts:
        assert_gradients_close(part["gradients"][0], one["gradients"][0], norm)
        for key, value in one["state"].items():
            assert_close(part["state"][key], value, key)


@pytest.mark.parametrize("norm", NORMS)
def test_the_diagnostics_are_the_same_on_two_ranks(two, norm):
    one = run_diagnostics(Rank(0, 1, CPU), norm)
    assert {"gradient_cosine", "gradient_opposed", "gradient_cosine_layer1", "gradient_opposed_layer4"} < set(one)
    assert ("branch_mean_distance" in one) == (norm == "batch")
    for part in two:
        assert set(part["diagnostics"][norm]) == set(one)
        for name, value in one.items():
            assert_close(part["diagnostics"][norm][name], value, name)


def test_measured_statistics_are_summed_over_the_ranks(two):
    one = run_measured(Rank(0, 1, CPU))
    before = dict(toy_classifier().named_buffers())
    assert not torch.equal(one["backbone.norm1.clean.running_mean"], before["backbone.norm1.clean.running_mean"])
    assert torch.equal(one["backbone.norm1.adv.running_mean"], before["backbone.norm1.adv.running_mean"])
    for part in two:
        for name, value in one.items():
            assert_close(part["measured"][name], value, name)


def test_statistics_are_each_ranks_own_until_they_are_averaged(two):
    first, second = (part["statistics"] for part in two)
    names = [name for name in first["own"] if name.endswith(("running_mean", "running_var"))]
    assert len(names) == 8  # two norms, two branches
    for name in names:
        assert not torch.equal(first["own"][name], second["own"][name]), name
        mean = (first["own"][name] + second["own"][name]) / 2
        for part in (first, second):
            assert_close(part["averaged"][name], mean, name)
            assert torch.equal(part["after"][name], part["own"][name]), name
    for name in set(first["own"]) - set(names):
        assert torch.equal(first["averaged"][name], first["own"][name]), name


def test_gradient_norm_and_clipping_written_out():
    engine = DDPEngine(objective("at"), OPTIM, Rank(0, 1, CPU))
    images, labels, keys = toy_batch()
    engine.set_lr(0.1)
    engine.backward(engine(images, labels, keys).loss)
    parameters = dict(engine.objective.named_parameters())
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    before = {name: p.detach().clone() for name, p in parameters.items()}
    norm = sum(float((g**2).sum()) for g in gradients.values()) ** 0.5
    assert norm > 0.5  # so that it is clipped
    assert float(engine.step()) == pytest.approx(norm, rel=1e-12)
    for name, parameter in parameters.items():
        decay = 0.01 if name.endswith(("conv1.weight", "conv2.weight", "fc.weight")) else 0
        step = 0.1 * (gradients[name] * 0.5 / (norm + 1e-6) + decay * before[name])
        assert_close(parameter.detach(), before[name] - step, name)
        assert parameter.grad is None


@pytest.mark.parametrize("optim", [OPTIM, OptimConfig(name="adamw", lr=0.1)], ids=["sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_no_number_changes_nothing(optim, first):
    """As if the step had not been: also in the optimizer's state, and also in the very first step."""

    def run(at: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
        engine = DDPEngine(objective("at"), optim, Rank(0, 1, CPU))
        images, labels, keys = toy_batch()
        for step in range(3):
            engine.set_lr(0.1)
            engine.backward(engine(images, labels, keys).loss)
            if step == at:
                engine.objective.classifier.backbone.get_parameter("fc.bias").grad[0] = float("inf")  # pyright: ignore
            assert engine.step().isfinite() == (step != at)
        return engine.objective.state_dict(), engine.state_dict()["state"]

    def without(left_out: int) -> tuple[dict[str, Any], dict[str, Any]]:
        engine = DDPEngine(objective("at"), optim, Rank(0, 1, CPU))
        images, labels, keys = toy_batch()
        for step in range(3):
            engine.set_lr(0.1)
            if step != left_out:
                engine.backward(engine(images, labels, keys).loss)
                engine.step()
        return engine.objective.state_dict(), engine.state_dict()["state"]

    at = 0 if first else 1
    (weights, state), (expected_weights, expected_state) = run(at), without(at)
    assert all(torch.equal(value, expected_weights[name]) for name, value in weights.items())
    assert state.keys() == expected_state.keys() != set()
    for key, values in state.items():
        assert all(torch.equal(value, expected_state[key][name]) for name, value in values.items()), key


def test_one_rank_needs_no_process_group():
    assert not dist.is_initialized()
    rank = Rank(0, 1, CPU)
    assert rank.is_first
    assert not Rank(1, 2, CPU).is_first
    assert torch.equal(rank.all_reduce(torch.ones(2)), torch.ones(2))
    classifier = toy_classifier()
    before = {name: value.clone() for name, value in classifier.named_buffers()}
    with averaged_statistics(classifier, rank):
        pass
    assert all(torch.equal(before[name], value) for name, value in classifier.named_buffers())
