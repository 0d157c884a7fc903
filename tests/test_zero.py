"""DeepSpeed ZeRO on two gloo processes against DDP, with a ResNet and a ViT: a step, its state, and what is sharded."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from ranks import on_two_ranks
from torch import Tensor
from toys import Sets, toy_batch, toy_recipe

from arat_dist.config import EngineConfig, OptimConfig
from arat_dist.data.loader import Batch
from arat_dist.data.order import SampleOrder
from arat_dist.engine import Engine, Rank, build_engine
from arat_dist.objectives import Objective, build_objective
from arat_dist.step import compute_gradients, micro_batches

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
    return build_engine(objective_of(net, **sections), config, optim, rank)


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


def follow(net: str, rank: Rank) -> dict[str, Any]:
    """Steps of DDP, each taken by every stage too, from DDP's weights and state and with its x'."""
    ddp = engine_of(net, None, SGD, rank)
    others = {stage: engine_of(net, stage, SGD, rank) for stage in STAGES}
    result: dict[str, Any] = {"ddp": [], **{stage: [] for stage in STAGES}}
    for number in range(STEPS):
        weights = {key: value.clone() for key, value in ddp.model_state().items()}
        state = {name: {k: v.clone() for k, v in entry.items()} for name, entry in ddp.state_dict()["state"].items()}
        figures, found = step(ddp, rank, number)
        after = {key: value.clone() for key, value in ddp.model_state().items()}
        result["ddp"].append(figures)
        for stage, engine in others.items():
            engine.load_model_state(weights)
            engine.load_state_dict({"state": state, "loss_scale": None})
            figures, own = step(engine, rank, number, found)
            figures["same_pixels"] = (own[0] == found[0]).float().mean()
            reached = engine.model_state()
            figures["weights"] = torch.stack([(reached[k] - after[k]).abs().max().float() for k in reached] or [0 * own[0].sum()]).max()
            result[stage].append(figures)
    return result


def run_all(rank: Rank) -> dict[str, Any]:
    return {"follow": {net: follow(net, rank) for net in NETS}}
