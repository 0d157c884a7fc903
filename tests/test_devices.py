"""Which device is taken, what is said where there is none, and how torch is told to compute."""

import os
import subprocess
import sys

import pytest
import torch
from toys import toy_classifier, toy_recipe

from arat_dist import devices
from arat_dist.config import ClusterConfig
from arat_dist.data.copies import copied_ahead
from arat_dist.data.loader import Batch
from arat_dist.devices import device_errors, own_device, why_no_gpu
from arat_dist.engine import Rank
from arat_dist.errors import UserError
from arat_dist.evaluation.net import attacked
from arat_dist.numerics import evaluation_numerics, training_numerics
from arat_dist.preflight import check_recipe

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("has_gpu", "gpus", "device"),
    [(True, None, "cuda"), (False, None, "cpu"), (True, 0, "cpu"), (True, 1, "cuda"), (False, 0, "cpu")],
)
def test_a_run_without_workers_takes_the_gpu_that_is_there(monkeypatch, has_gpu, gpus, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    cluster = ClusterConfig(workers=0, gpus_per_worker=gpus)
    assert own_device(cluster).type == device
    assert cluster.num_gpus == (gpus or 0)


def test_why_there_is_no_gpu_is_told_apart(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in why_no_gpu()
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(devices, "_has_driver", lambda: False)
    assert "no NVIDIA driver" in why_no_gpu()
    monkeypatch.setattr(devices, "_has_driver", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "CUDA_VISIBLE_DEVICES is '7'" in why_no_gpu()
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "too old for CUDA 13.0" in why_no_gpu()


def test_a_gpu_that_is_missing_is_explained_before_anything_starts(sets):
    with pytest.raises(UserError, match=r"cluster.gpus_per_worker: 1: this machine has no GPU .*\(no NVIDIA driver"):
        check_recipe(toy_recipe(sets, cluster={"gpus_per_worker": 1}))


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ({"global_batch_size": 16}, ["train.global_batch_size: 16", "16 images at a time", "train.micro_batches: 2"]),
        ({"global_batch_size": 16, "micro_batches": 2}, ["8 images at a time", "train.micro_batches: 4"]),
        ({"global_batch_size": 16, "micro_batches": 8}, ["2 images", "train.grad_checkpointing: true"]),
        ({"global_batch_size": 2, "grad_checkpointing": True}, ["2 images", "a smaller model"]),
    ],
)
def test_out_of_memory_is_one_line_with_what_would_fit(sets, train, words):
    with pytest.raises(UserError) as error, device_errors(toy_recipe(sets, train=train), Rank(0, 1, CPU)):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nGPU 0 has ...")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_each_worker_is_told_of_its_own_part(sets):
    recipe = toy_recipe(sets, train={"global_batch_size": 16})
    with pytest.raises(UserError, match="8 images at a time"), device_errors(recipe, Rank(1, 2, CPU)):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_an_operation_without_a_deterministic_algorithm_is_named(sets):
    said = "cumsum_cuda_kernel does not have a deterministic implementation, but you set 'torch.use_determ...'"
    recipe = toy_recipe(sets, train={"deterministic": True})
    line = "train.deterministic: true: cumsum_cuda_kernel does not have a deterministic implementation; false"
    with pytest.raises(UserError, match=line), device_errors(recipe, Rank(0, 1, CPU)):
        raise RuntimeError(said)
    with pytest.raises(RuntimeError, match="cumsum"), device_errors(toy_recipe(sets), Rank(0, 1, CPU)):
        raise RuntimeError(said)


def settings() -> tuple[str, bool, bool, bool]:
    return (
        str(torch.backends.cuda.matmul.fp32_precision),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
    )


@pytest.mark.parametrize("before", [True, False])
def test_training_and_evaluation_set_tf32_and_put_it_back(sets, monkeypatch, before):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = before
    outside = settings()
    fast = toy_recipe(sets, train={"tf32": True}).train
    same = toy_recipe(sets, train={"deterministic": True}).train
    try:
        with training_numerics(fast):
            assert settings() == ("tf32", True, True, False)
            with evaluation_numerics():
                assert settings()[1:] == (False, False, False)
                assert settings()[0] != "tf32"
            assert settings() == ("tf32", True, True, False)
            with attacked(toy_classifier()):
                assert settings()[0] != "tf32"
                assert settings()[1] is False
        assert settings() == outside
        with training_numerics(same):
            assert settings()[1:] == (False, False, True)
            with evaluation_numerics():
                assert settings()[3]
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert settings() == outside
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = False, True


def test_who_used_torchs_newer_interface_before_meets_no_error():
    code = (
        "import torch\n"
        "from arat_dist.numerics import evaluation_numerics\n"
        "torch.backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "torch.backends.cudnn.conv.fp32_precision = 'ieee'\n"
        "with evaluation_numerics():\n"
        "    print(torch.backends.cuda.matmul.fp32_precision != 'tf32')\n"
        "print(torch.backends.cuda.matmul.fp32_precision)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "tf32"]


def test_on_a_cpu_batches_are_the_loaders_own():
    batches = [Batch(torch.zeros(2, 3, 4, 4), torch.zeros(2), torch.arange(2)) for _ in range(3)]
    assert all(one is other for one, other in zip(copied_ahead(iter(batches), CPU), batches, strict=True))
