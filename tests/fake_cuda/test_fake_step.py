"""A training step on a GPU that isn't there: nothing mixes devices, nothing waits for the GPU, all state is on it."""

import re
from typing import Any, NamedTuple

import pytest
from fake_training import FakeTraining, Sections, small_recipe
from watch import Findings, Watch

METHODS = ("standard", "at", "trades", "mart", "lbgat", "arrest", "arat")
ATTACKS: dict[str, dict[str, Any]] = {"pgd": {"steps": 2}, "apgd": {"steps": 2}, "fgsm": {}, "nfgsm": {}}
EPS = {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}
NETS: dict[str, dict[str, Any]] = {
    "cifar_resnet18": {"args": {"channels": [8, 8, 16, 16]}},
    "vit_tiny_patch16_224": {"args": {"depth": 2, "embed_dim": 48, "num_heads": 3, "drop_path_rate": 0.2}},
    "convnext_atto": {"args": {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16], "drop_path_rate": 0.2}},
}


def net(name: str, **objective: Any) -> Sections:
    """A net of a family, small, on pictures of 32x32."""
    return {
        "model": {"name": name, **NETS[name]},
        "data": {"image_size": 32},
        "objective": {"name": "arat", **objective},
    }


CASES: dict[str, Sections] = {
    **{method: {"objective": {"name": method}} for method in METHODS},
    **{
        f"{name} {norm}": {"attack": {"name": name, "norm": norm, "eps": eps, **keys}}
        for name, keys in ATTACKS.items()
        for norm, eps in EPS.items()
        if name != "nfgsm" or norm == "linf"
    },
    "targeted": {"attack": {"targeted": True}},
    "dlr": {"attack": {"loss": "dlr"}},
    "targeted dlr": {"attack": {"targeted": True, "loss": "dlr"}},
    "fp32": {"train": {"precision": "fp32"}},
    "micro-batches": {"train": {"micro_batches": 2}},
    "mixup and cutmix": {"data": {"mixup": 0.2, "cutmix": 1.0}},
    "augmentation": {"data": {"rand_augment": [2, 9], "color_jitter": [0.4, 0.4, 0.4, 0.1]}},
    "averages": {"train": {"ema_decay": 0.9, "swa_start_epoch": 0, "swa_every": 1}},
    "clipped": {"optim": {"clip_grad_norm": 1.0}},
    "recomputed": {"train": {"grad_checkpointing": True}},
    "adamw": {"optim": {"name": "adamw", "lr": 0.001}},
    "for a CUDA graph": {"train": {"cuda_graph": True}},
    "resnet": net("cifar_resnet18"),
    "resnet unsplit": net("cifar_resnet18", split_norm="none"),
    "vit": net("vit_tiny_patch16_224", split_norm="layer"),
    "vit unsplit": net("vit_tiny_patch16_224", split_norm="none"),
    "convnext": net("convnext_atto", split_norm="layer"),
}


class Second(NamedTuple):
    """What was found of a training's second step."""

    found: Findings
    on_host: list[str]
    """What is kept between steps and isn't on the GPU."""


def second_step(sections: Sections, *, diagnosed: bool = False) -> Second:
    """The first step mixes no devices either, but may wait: tables are made in it, once in a run."""
    with Watch():
        training = FakeTraining(small_recipe(sections))
        training.step()
    with Watch() as watch:
        training.step(diagnosed=diagnosed)
        training.objective.end_epoch(training.rank.all_reduce)
    with Watch():
        return Second(watch.found, [name for name, tensor in training.kept().items() if not tensor.is_cuda])


@pytest.mark.parametrize("name", CASES)
def test_a_step_never_waits_and_keeps_all_on_the_gpu(on_fake_gpu, name):
    found, on_host = on_fake_gpu(second_step, CASES[name])
    assert found.waits == []
    assert on_host == []
    assert len(found.kernels) > 20


@pytest.mark.parametrize("split_norm", ["batch", "none"])
def test_a_diagnosed_step_never_waits(on_fake_gpu, split_norm):
    sections: Sections = {"objective": {"name": "arat", "split_norm": split_norm}}
    found = on_fake_gpu(second_step, sections, diagnosed=True).found
    assert found.waits == []
    assert found.kernels.total() > on_fake_gpu(second_step, sections).found.kernels.total()


@pytest.mark.parametrize("clip", [None, 1.0])
def test_in_fp16_the_host_asks_for_the_scale_and_for_an_overflow_alone(on_fake_gpu, clip):
    sections: Sections = {"train": {"precision": "fp16"}, "optim": {"clip_grad_norm": clip}}
    found, on_host = on_fake_gpu(second_step, sections)
    assert 1 <= len(found.waits) <= 3
    assert all(re.match(r"item at engine.py:\d+ (loss_scale|is_finite)", wait) for wait in found.waits)
    assert on_host == []


def captured_step(sections: Sections) -> Findings:
    """The part of a step that a CUDA graph would hold."""
    with Watch():
        training = FakeTraining(small_recipe(sections))
        training.step()
        parts = training.begin_step()
    with Watch() as watch:
        training.take_step(parts)
    return watch.found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_for_a_cuda_graph_copies_nothing_between_host_and_gpu(on_fake_gpu, optimizer):
    """What is read from the host in a capture is the same in every replay."""
    sections: Sections = {"train": {"cuda_graph": True}, "optim": {"name": optimizer, "lr": 0.001}}
    found = on_fake_gpu(captured_step, sections)
    assert found.waits == []
    assert found.copies == []


def test_pictures_and_choices_of_the_augmentation_are_queued(on_fake_gpu):
    found = on_fake_gpu(second_step, CASES["augmentation"]).found
    assert any("apply_ops_" in copy for copy in found.copies)
    assert all("to the GPU" in copy for copy in found.copies)
