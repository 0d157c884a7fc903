"""Activation checkpointing changes nothing but the memory: gradients, features and buffers stay the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import pytest
import torch
from toys import Sets, toy_batch, toy_recipe

from arat_dist.errors import UserError
from arat_dist.models.classifier import Classifier
from arat_dist.models.recompute import recompute_stages
from arat_dist.objectives import Objective, build_objective

SIDE = 32
VIT = {"name": "vit_tiny_patch16_224", "args": {"depth": 4, "embed_dim": 24, "patch_size": 8, "drop_path_rate": 0.2}}


def objective(*, recomputed: bool, **sections: Any) -> Objective:
    torch.manual_seed(0)
    recipe = toy_recipe(
        Sets("", ""),
        data={"image_size": SIDE},
        attack={"steps": 2},
        train={"grad_checkpointing": recomputed},
        **sections,
    )
    return build_objective(recipe).double().train()


def step(module: Objective) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    torch.manual_seed(1)  # drop-path
    loss = module(*toy_batch(6, side=SIDE)).loss
    loss.backward()
    gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, dict(module.named_buffers())


@contextmanager
def kept_bytes() -> Iterator[list[int]]:
    """What autograd keeps for backward passes inside."""
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
        yield kept


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"objective": {"name": "arat", "symmetric": True, "stop_gradient": False}},
        {"objective": {"name": "trades"}},
        {"objective": {"name": "arrest"}},
        {"model": VIT, "objective": {"name": "arat", "split_norm": "layer"}},
    ],
    ids=["arat", "symmetric", "trades", "arrest", "vit"],
)
def test_a_step_is_the_same(sections):
    expected_loss, expected, buffers = step(objective(recomputed=False, **deepcopy(sections)))
    loss, gradients, found = step(objective(recomputed=True, **deepcopy(sections)))
    torch.testing.assert_close(loss, expected_loss, rtol=0, atol=1e-12)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-10, msg=name)
    for name, buffer in buffers.items():
        torch.testing.assert_close(found[name], buffer, rtol=0, atol=1e-12, msg=name)


def test_it_saves_memory():
    sizes = {}
    for recomputed in (False, True):
        module = objective(recomputed=recomputed, model={"name": "cifar_resnet18", "args": {"channels": [8, 8, 8, 8]}})
        with kept_bytes() as kept:
            module(*toy_batch(6, side=SIDE))
        sizes[recomputed] = sum(kept)
    assert sizes[True] < sizes[False] / 2


def test_a_copy_recomputes_itself_not_the_original():
    """As averages of weights do."""
    net = objective(recomputed=True).classifier
    copy = deepcopy(net)
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.mul_(1.5)
    pixels = torch.rand(4, 3, SIDE, SIDE, dtype=torch.float64)
    plain = objective(recomputed=False).classifier
    plain.load_state_dict(copy.state_dict())
    for classifier in (plain, copy):
        classifier.forward_with_taps(pixels)[1][0].square().sum().backward()
    for (name, p), q in zip(plain.named_parameters(), copy.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, msg=name)
    assert all(p.grad is None for p in net.parameters())


def test_a_net_without_stages_is_refused():
    with pytest.raises(UserError, match=r"^train\.grad_checkpointing: true: Linear names no stages"):
        recompute_stages(Classifier(torch.nn.Linear(2, 2), [0.0], [1.0]))
