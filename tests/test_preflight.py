"""What is found before any worker starts: one line each, with the key first."""

import sys
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from toys import Sets, toy_recipe

from arat_dist.errors import UserError
from arat_dist.preflight import check_recipe

TOY = {"name": "resnet10t", "args": {"channels": [8, 8, 8, 8], "stem_width": 8, "zero_init_last": False}}
GROUP_NORM = {"name": "resnet50_gn", "args": {"channels": [32, 32, 32, 32], "layers": [1, 1, 1, 1]}}

NFNET = {"name": "dm_nfnet_f0", "args": {"depths": [1, 1, 1, 1], "channels": [256] * 4, "num_features": 128}}

NARROW = {"depth": 1, "embed_dim": 24}
ZERO3 = {"kind": "deepspeed", "zero_stage": 3}
VIT = {"name": "vit_tiny_patch16_224", "args": {**NARROW, "dynamic_img_size": True}}
"""A net of patches, that takes any number of them."""


def sizes(*sides: int) -> dict[str, Any]:
    """Keys of the data section that have one side an epoch, from the second on."""
    return {"augment": "random_resized_crop", "image_sizes_from": [[at, side] for at, side in enumerate(sides, 1)]}


def test_a_recipe_that_can_run_passes(sets: Sets):
    check_recipe(toy_recipe(sets))
    check_recipe(toy_recipe(sets, cluster={"workers": 2}))  # the smallest batch has 4 pictures
    check_recipe(toy_recipe(sets, data=sizes(32, 24)))
    check_recipe(toy_recipe(sets, data=sizes(32, 48), model=VIT, objective={"name": "at"}))


@pytest.mark.parametrize(
    ("changed", "start", "contains"),
    [
        # Batches of 8 feed 4 workers, but the last one holds 4 pictures.
        ({"cluster": {"workers": 3}}, "cluster.workers: 3:", "smallest of this run has 4"),
        ({"cluster": {"workers": 4}}, "cluster.workers: 4:", "at most 2 would be right"),
        ({"data": {"train": "/nowhere/x.beton"}}, "/nowhere/x.beton: no such file", "arat data write"),
        ({"data": {"val": "/nowhere/x.beton"}}, "/nowhere/x.beton: no such file", "arat data write"),
        ({"data": {"num_classes": 5}}, "data.num_classes: 5:", "has 3 classes"),
        ({"data": {"image_size": 20}}, "data.augment: pad_crop:", "16x16"),
        (
            {"model": VIT | {"args": NARROW}, "objective": {"name": "at"}, "data": sizes(16, 32)},
            "data.image_sizes_from: [[1.0, 16], [2.0, 32]]: vit_tiny_patch16_224 is built for pictures of one size",
            "",
        ),
        (
            {"model": VIT, "objective": {"name": "at"}, "data": sizes(32, 24)},
            "data.image_sizes_from: 24: vit_tiny_patch16_224 can't take 24x24: ",
            "divisible",
        ),
        (
            {"model": TOY, "objective": {"name": "lbgat", "teacher": VIT}, "data": sizes(32, 24)},
            "data.image_sizes_from: 24: vit_tiny_patch16_224 can't take",
            "",
        ),
        ({"model": {"name": "resnet10x"}}, "model.name: resnet10x:", "resnet10t"),
        ({"model": {**TOY, "args": {"chanels": [8]}}}, "model.args:", "chanels"),
        ({"model": {"name": "resnet10t", "pretrained": True}}, "model.pretrained: true:", "model.checkpoint"),
        ({"model": {"name": "cifar_resnet18", "pretrained": True}}, "model.pretrained: true:", "can't be had"),
        ({"objective": {"name": "arat", "taps": ["layer9"]}}, "objective.taps: layer9: no such module", "it has"),
        ({"model": GROUP_NORM}, "objective.split_norm: batch:", "none would be right"),
        ({"cluster": {"gpus_per_worker": 1}}, "cluster.gpus_per_worker: 1:", "no GPU"),
        ({"engine": {"kind": "deepspeed"}, "train": {"precision": "fp16"}}, "train.precision: fp16:", "bf16 or fp32"),
        ({"engine": ZERO3, "train": {"compile": True}}, "engine.zero_stage: 3:", "train.compile; 2 would be right"),
        ({"engine": ZERO3, "train": {"grad_checkpointing": True}}, "engine.zero_stage: 3:", "train.grad_checkpointing"),
        ({"engine": ZERO3, "track": {"diagnostics_every": 2}}, "engine.zero_stage: 3:", "track.diagnostics_every"),
        (
            {"engine": {"kind": "deepspeed"}, "model": NFNET, "objective": {"name": "at"}},
            "engine.kind: deepspeed: can't train dm_nfnet_f0, some of",
            "(stages.0.0.skipinit_gain); ddp would be right",
        ),
        ({"train": {"swa_start_epoch": 2, "max_steps": 10}}, "train.swa_start_epoch: 2: ends with step 11", "step 10"),
        ({"train": {"norm_samples": 1}}, "train.norm_samples: 1: at least 2 a worker", "(1)"),
        (
            {"objective": {"name": "lbgat", "teacher": {"name": "resnet10x"}}},
            "objective.teacher.name: resnet10x",
            "10t",
        ),
        (
            {"objective": {"name": "lbgat", "teacher": {"name": "resnet10t", "checkpoint": "no.pth"}}},
            "objective.teacher.checkpoint: no.pth: no such file",
            "",
        ),
        (
            {"objective": {"name": "arrest"}, "model": {"name": "resnetv2_50", "args": {"layers": [1, 1, 1, 1]}}},
            "objective.name: arrest: resnetv2_50 has no single layer",
            "arat",
        ),
    ],
    ids=str,
)
def test_what_can_not_run_is_one_line(sets: Sets, monkeypatch, changed: dict[str, Any], start, contains):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError) as caught:
        check_recipe(toy_recipe(sets, **changed))
    message = str(caught.value)
    assert message.startswith(start)
    assert contains in message
    assert "\n" not in message


def test_the_net_checked_is_the_one_that_training_builds(sets: Sets, monkeypatch):
    drawn = []
    monkeypatch.setattr("arat_dist.preflight.build_objective", lambda recipe: drawn.append(torch.rand(1)))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_recipe(toy_recipe(sets, train={"seed": 9}))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(9)
    assert torch.equal(drawn[0], torch.rand(1))


def test_a_gpu_is_fine_where_there_is_one_here_or_in_the_cluster(sets: Sets, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_recipe(toy_recipe(sets, cluster={"gpus_per_worker": 1}))
    check_recipe(toy_recipe(sets, cluster={"gpus_per_worker": 1, "workers": 1}))
    with pytest.raises(UserError, match=r"^cluster\.workers: 2: .* at most 1, or"):
        check_recipe(toy_recipe(sets, cluster={"gpus_per_worker": 1, "workers": 2}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_recipe(toy_recipe(sets, cluster={"gpus_per_worker": 1, "address": "ray://head:10001"}))


def test_a_teachers_weights_of_another_architecture_are_refused(sets: Sets, tmp_path):
    save_file(timm.create_model("resnet18", num_classes=3).state_dict(), tmp_path / "other.safetensors")
    teacher = {**TOY, "checkpoint": str(tmp_path / "other.safetensors")}
    with pytest.raises(UserError, match=r"^objective\.teacher\.checkpoint: .*not the weights of this net"):
        check_recipe(toy_recipe(sets, objective={"name": "lbgat", "teacher": teacher}))
    with pytest.raises(UserError, match=r"^model\.checkpoint: .*not the weights of this net"):
        check_recipe(toy_recipe(sets, objective={"name": "arrest"}, model=teacher))


def test_a_loader_out_of_reach_is_told_before_workers_start(sets: Sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "arat_dist.data.beton", None)
    with pytest.raises(ImportError):
        check_recipe(toy_recipe(sets))
    check_recipe(toy_recipe(sets, data={"loader": "torchvision"}))
    check_recipe(toy_recipe(sets, cluster={"workers": 2, "address": "ray://elsewhere:10001"}))
