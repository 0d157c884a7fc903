"""DeepSpeed ZeRO on two gloo processes against DDP, with a ResNet and a ViT: a step, its state, and what is sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks, on_two_ranks
from torch import Tensor
from toys import Sets, toy_batch, toy_recipe

from arat_dist import zero
from arat_dist.bench.engine import megabytes
from arat_dist.config import EngineConfig, OptimConfig
from arat_dist.data.loader import Batch
from arat_dist.data.order import SampleOrder
from arat_dist.engine import Engine, Rank, build_engine
from arat_dist.objectives import Objective, build_objective
from arat_dist.objectives.base import Output
from arat_dist.step import compute_gradients, micro_batches
from arat_dist.train import diagnose

BATCH = 10  # dealt to two ranks as 6 and 4
STEPS = 20
SIDE = 32
STAGES = (0, 1, 2, 3)
SGD = OptimConfig(lr=0.05, momentum=0.9, weight_decay=0.01, clip_grad_norm=5.0)
ADAMW = OptimConfig(name="adamw", lr=0.01, weight_decay=0.01)
NETS: dict[str, dict[str, dict[str, Any]]] = {
    "resnet": {
        "model": {"args": {"channels": [8, 8, 16, 16], "stem_width": 8, "zero_init_last": False}},
        "objective": {"gamma": 2},
    },
    "vit": {
        "model": {
            "name": "vit_tiny_patch16_224",
            "args": {"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        "objective": {"gamma": 2, "split_norm": "layer"},
    },
}


def objective_of(net: str, **sections: dict[str, Any]) -> Objective:
    keys = {**NETS[net], **sections}
    torch.manual_seed(0)
    return build_objective(toy_recipe(Sets("", ""), data={"image_size": SIDE}, attack={"steps": 3}, **keys)).train()


def engine_of(net: str, stage: int | None, optim: OptimConfig, rank: Rank, **sections: dict[str, Any]) -> Engine:
    """DDP for None, else ZeRO."""
    config = EngineConfig() if stage is None else EngineConfig(kind="deepspeed", zero_stage=stage)  # pyright: ignore
    with pytest.MonkeyPatch.context() as patch:
        if stage == 3 and net == "vit":
            # DeepSpeed keeps weights of less than 100,000 numbers whole, which all of these are.
            patch.setattr(zero, "_config", all_weights_move)
        return build_engine(objective_of(net, **sections), config, optim, rank)


def all_weights_move(stage: int, num_weights: int, made: Any = zero._config) -> dict[str, Any]:
    """DeepSpeed's settings with every weight gathered for each layer's work and given back afterwards."""
    config = made(stage, num_weights)
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def share_of(rank: Rank, step: int) -> Batch:
    images, labels, _ = toy_batch(BATCH, side=SIDE, seed=step)
    keys = torch.from_numpy(SampleOrder(BATCH, BATCH, 1, 0).share(0, rank.index, rank.world_size))
    return Batch(images[keys], labels[keys], keys)


@contextmanager
def recorded(objective: Objective, instead: list[Tensor] | None = None) -> Iterator[list[Tensor]]:
    """What the attack finds; what is trained on is that, or what is given instead."""
    found: list[Tensor] = []
    attack = objective.perturb

    def perturb(pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
        found.append(attack(pixels, targets, keys))
        return found[-1] if instead is None else instead[len(found) - 1]

    objective.perturb = perturb
    try:
        yield found
    finally:
        del objective.perturb


def step(
    engine: Engine, rank: Rank, number: int, instead: list[Tensor] | None = None, parts: int = 1
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """One step as `train` takes it: its loss and gradient norm, and what the attack found."""
    engine.set_lr(0.05 / (number + 1))
    batches = micro_batches(share_of(rank, number), parts, BATCH, rank)
    with recorded(engine.objective, instead) as found:
        result = compute_gradients(engine, batches, rank.world_size / BATCH, lambda: None)
    loss = sum(metrics["loss"] * count / BATCH for metrics, count in result.metrics)
    assert isinstance(loss, Tensor)
    return {"loss": rank.all_reduce(loss.clone()), "norm": engine.step()}, found


def copied(state: dict[str, Any]) -> dict[str, Any]:
    """A state that training doesn't go on to change."""
    return {
        key: copied(value) if isinstance(value, dict) else value.clone() if isinstance(value, Tensor) else value
        for key, value in state.items()
    }


def shared(state: dict[str, Any], rank: Rank) -> dict[str, Any]:
    """The first rank's, on every rank, as a checkpoint would bring it."""
    box = [copied(state)]
    dist.broadcast_object_list(box, 0)
    return box[0]


def follow(net: str, rank: Rank) -> dict[Any, Any]:
    """Steps of DDP, each taken by every stage too, from DDP's weights and state and with its x'."""
    ddp = engine_of(net, None, SGD, rank)
    others = {stage: engine_of(net, stage, SGD, rank) for stage in STAGES}
    result: dict[Any, Any] = {"ddp": [], **{stage: [] for stage in STAGES}}
    for number in range(STEPS):
        weights, state = copied(ddp.model_state()), copied(ddp.state_dict())
        figures, found = step(ddp, rank, number)
        after = copied(ddp.model_state())
        result["ddp"].append(figures)
        for stage, engine in others.items():
            engine.load_model_state(weights)
            engine.load_state_dict(state)
            figures, own = step(engine, rank, number, found)
            figures["same_pixels"] = (own[0] == found[0]).float().mean()
            reached = engine.model_state()
            assert reached.keys() == (after.keys() if rank.is_first else set())
            # Buffers are each rank's own in both.
            gaps = [(reached[k] - after[k]).abs().max().float() for k in reached]
            figures["gap"] = torch.stack(gaps).max() if gaps else torch.zeros(())
            result[stage].append(figures)
    return result


def handed_on(optim: OptimConfig, rank: Rank) -> dict[str, Any]:
    """A run that changes its engine after every step, and one that stays with DDP; weights and state at the end."""
    result = {}
    for name, course in (("ddp", [None] * 5), ("changing", [None, 2, 3, 1, None])):
        engine = engine_of("vit", course[0], optim, rank)
        attacks = result.get("attacks", [])
        for number, stage in enumerate(course):
            if number:
                weights, state = shared(engine.model_state(), rank), shared(engine.state_dict(), rank)
                engine = engine_of("vit", stage, optim, rank)
                engine.load_model_state(weights)
                engine.load_state_dict(state)
            _, found = step(engine, rank, number, attacks[number] if name == "changing" else None)
            if name == "ddp":
                attacks = [*attacks, found]
        result |= {"attacks": attacks, name: {"model": engine.model_state(), **copied(engine.state_dict())}}
    del result["attacks"]
    return result


def trials(stage: int | None, rank: Rank, pictures: dict[int, list[Tensor]]) -> dict[str, Any]:
    """A step in two parts; one whose gradient is no number; what is held; the weights whole for uneven passes.

    DDP, which comes first, leaves the attacked pictures for the others.
    """
    result: dict[str, Any] = {}
    # Without BatchNorms, the predictors' neither: of two samples they normalise next to nothing to ones.
    engine = engine_of("vit", stage, SGD, rank, objective={"split_norm": "layer", "predictor": False})
    result["parts"], found = step(engine, rank, 0, pictures.get(0), parts=2)
    pictures.setdefault(0, found)
    result["after_parts"] = copied(engine.model_state())

    engine = engine_of("resnet", stage, SGD, rank)
    _, found = step(engine, rank, 0, pictures.get(1))
    pictures.setdefault(1, found)

    before = copied({"model": engine.model_state(), **engine.state_dict()})
    broken = share_of(rank, 1)
    compute_gradients(engine, [broken], float("inf") if rank.index else 1.0, lambda: None)
    result["broken_norm"] = engine.step()
    after = {"model": engine.model_state(), **engine.state_dict()}
    result["unmoved"] = all(
        torch.equal(value, after["state"][name][key])
        for name, entry in before["state"].items()
        for key, value in entry.items()
    ) and all(
        torch.equal(value, after["model"][name])
        for name, value in before["model"].items()
        if name.endswith(("weight", "bias"))
    )
    held = engine.held()
    result["held"] = {name: megabytes(getattr(held, name)) for name in ("weights", "optimizer_state")}

    classifier = engine.objective.classifier.eval()
    with engine.gathered(), torch.no_grad():
        pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
        result["logits"] = [classifier(pixels) for _ in range(1 + rank.index)]
        result["whole"] = {name: p.detach().clone() for name, p in engine.objective.named_parameters()}
    with engine.gathered(), torch.no_grad():
        for _ in range(2 * rank.index):  # the first rank has none: it may have had fewer pictures
            classifier(pixels)
    engine.objective.train()
    given = shared(engine.model_state(), rank).items()
    result["next"], found = step(engine, rank, 2, pictures.get(2))
    pictures.setdefault(2, found)

    # Weights that have nothing to do with those that it holds.
    engine.load_model_state({name: value * 1.5 if value.is_floating_point() else value for name, value in given})
    result["loaded"], found = step(engine, rank, 3, pictures.get(3))
    pictures.setdefault(3, found)
    return result


def precise(stage: int | None, rank: Rank) -> dict[str, Tensor]:
    """In bf16, with norms over all ranks, under TRADES, whose attack begins with a pass that has no graph."""
    keys = {"objective": {"name": "trades"}, "train": {"precision": "bf16", "sync_norms": True}}
    engine = engine_of("resnet", stage, ADAMW, rank, **keys)
    return step(engine, rank, 0)[0]


def looked_into(stage: int | None, rank: Rank) -> dict[str, Tensor]:
    """With activation checkpointing, and the diagnostics' own backward passes through the step's graph."""
    engine = engine_of("vit", stage, SGD, rank, train={"grad_checkpointing": True})
    found: dict[str, Tensor] = {}

    def inspect(out: Output, share: float) -> None:
        found.update(diagnose(engine.objective, out.terms, share, rank))

    compute_gradients(engine, [share_of(rank, 0)], rank.world_size / BATCH, lambda: None, inspect)
    return found | {"norm": engine.step()}


def run_all(rank: Rank) -> dict[str, Any]:
    stages: tuple[int | None, ...] = (None, *STAGES)
    pictures: dict[int, list[Tensor]] = {}
    return {
        "follow": {net: follow(net, rank) for net in NETS},
        "handed_on": {optim.name: handed_on(optim, rank) for optim in (SGD, ADAMW)},
        "trials": {stage: trials(stage, rank, pictures) for stage in stages},
        "looked_into": {stage: looked_into(stage, rank) for stage in (None, 0, 1, 2)},
        "precise": {stage: precise(stage, rank) for stage in stages},
    }


def run_alone(rank: Rank) -> dict[Any, Any]:
    result = {stage: step(engine_of("resnet", stage, SGD, rank), rank, 0)[0] for stage in (None, 2, 3)}
    engine = engine_of("resnet", 2, SGD, rank)
    engine.objective.compile_backbones({BATCH})
    return result | {"compiled": step(engine, rank, 0)[0]}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes computed."""
    return on_two_ranks(run_all, tmp_path_factory.mktemp("two"))


def close(a: Tensor, b: Tensor, what: str, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a.float(), b.float(), rtol=tolerance, atol=tolerance, msg=lambda m: f"{what}: {m}")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("net", NETS)
def test_steps_from_the_same_weights_are_those_of_ddp(two, net, stage, record_property):
    for name in ("loss", "norm"):
        pairs = [
            (part["follow"][net][stage][n][name], part["follow"][net]["ddp"][n][name])
            for part in two
            for n in range(STEPS)
        ]
        record_property(f"{name} differs by at most", f"{max(abs(got / ddp - 1) for got, ddp in pairs):.1e}")
    for part in two:
        for number in range(STEPS):
            expected, got = part["follow"][net]["ddp"][number], part["follow"][net][stage][number]
            for name in ("loss", "norm"):
                torch.testing.assert_close(got[name], expected[name], rtol=1e-4, atol=0)
            assert got["gap"] < 1e-5, f"step {number}: other weights"
        # Sums in another order may turn signs in a step or two of float32, which depends on the CPU.
        same = sorted(figures["same_pixels"] for figures in part["follow"][net][stage])
        assert same[STEPS // 4] > 0.99, "the attack found other pictures"
    assert two[0]["follow"][net][stage][0]["norm"] == two[1]["follow"][net][stage][0]["norm"]


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_a_run_may_change_its_engine(two, optim):
    expected, got = two[0]["handed_on"][optim]["ddp"], two[0]["handed_on"][optim]["changing"]
    for name, value in expected["model"].items():
        close(got["model"][name], value, name, 1e-4)
    assert got["state"].keys() == expected["state"].keys() != set()
    for name, entry in expected["state"].items():
        assert got["state"][name].keys() == entry.keys() != set()
        for key, value in entry.items():
            close(got["state"][name][key], value, f"{name}.{key}", 1e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_make_one_update(two, stage):
    expected, got = two[0]["trials"][None], two[0]["trials"][stage]
    for name, value in expected["parts"].items():
        close(got["parts"][name], value, name)
    for name, value in expected["after_parts"].items():
        close(got["after_parts"][name], value, name)


@pytest.mark.parametrize("stage", STAGES)
def test_a_gradient_that_is_no_number_changes_nothing(two, stage):
    for part in two:
        assert not part["trials"][stage]["broken_norm"].isfinite()
        assert part["trials"][stage]["unmoved"]


@pytest.mark.parametrize("stage", STAGES)
def test_the_optimizers_state_is_sharded(two, stage):
    whole = two[0]["trials"][None]["held"]["optimizer_state"]
    for part in two:
        share = part["trials"][stage]["held"]["optimizer_state"] / whole
        assert share == pytest.approx(0.5 if stage else 1.0, rel=0.02)


@pytest.mark.parametrize("stage", STAGES)
def test_weights_are_whole_inside_and_the_next_step_is_right(two, stage):
    for expected, got in ((part["trials"][None], part["trials"][stage]) for part in two):
        assert got["whole"].keys() == expected["whole"].keys()
        for name, value in expected["whole"].items():
            close(got["whole"][name], value, name)
        for step_name in ("next", "loaded"):
            for name, value in expected[step_name].items():
                close(got[step_name][name], value, f"{step_name} {name}", 1e-4)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_activation_checkpointing_and_diagnostics(two, stage):
    expected = two[0]["looked_into"][None]
    assert {"gradient_cosine", "norm"} < expected.keys() == two[0]["looked_into"][stage].keys()
    for name, value in expected.items():
        close(two[0]["looked_into"][stage][name], value, name, 1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_bf16_with_synchronised_norms(two, stage):
    for name, value in two[0]["precise"][None].items():
        close(two[0]["precise"][stage][name], value, name, 2e-2)


def test_one_rank_alone(tmp_path):
    """In a process of its own: DeepSpeed needs a process group, and makes one."""
    (alone,) = on_ranks(run_alone, tmp_path, 1)
    for stage in (2, 3):
        for name, value in alone[None].items():
            close(alone[stage][name], value, name, 1e-4)
    close(alone["compiled"]["loss"], alone[None]["loss"], "compiled", 1e-2)
