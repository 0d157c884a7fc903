"""Questions: the same one finds its folder again, another one doesn't; and which samples it is about."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from toys import Sets, toy_classifier, toy_recipe

from arat_dist.config import ClusterConfig, EvalConfig
from arat_dist.data.beton_writer import write_beton
from arat_dist.data.sources import open_source
from arat_dist.errors import UserError
from arat_dist.evaluation.corruptions import Corruption
from arat_dist.evaluation.question import Question, fingerprint, slug
from arat_dist.evaluation.samples import choose_samples
from arat_dist.targets import Target
from launcher.evaluate import Wanted, open_wanted


def config(**keys: Any) -> EvalConfig:
    values = {"attack": "autoattack", "norm": "linf", "eps": "8/255", "batch_size": 128, **keys}
    return EvalConfig.model_validate(values)


QUESTION = Question(
    target="runs/demo",
    weights="ema",
    branch="adv",
    fingerprint="a" * 64,
    data="/data/val.beton",
    data_sha256="b" * 64,
    cut=(32, 1.0, "ffcv"),
    samples=(0, 2, 4),
    config=config(),
)


def test_a_label_says_what_was_asked():
    assert QUESTION.label.startswith("autoattack-linf-8_255-ema-3-val-")
    assert QUESTION.label == replace(QUESTION, target="elsewhere", data="/moved/val.beton").label
    assert replace(QUESTION, config=config(norm="l2", eps=0.5, attack="pgd20,square")).label.startswith(
        "pgd20+square-l2-0.5-"
    )
    assert replace(QUESTION, config=config(attack="none")).label.startswith("none-ema-3-val-")
    assert all(c.isalnum() or c in "-_.+" for c in replace(QUESTION, data="/x/ä b%.beton").label.replace("ä", "a"))


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "c" * 64},
        {"data_sha256": "c" * 64},
        {"samples": (0, 2, 5)},
        {"branch": "clean"},
        {"cut": (32, 0.9, "ffcv")},
        {"source_fingerprint": "d" * 64},
        {"corruptions": (Corruption("fog", 1),)},
        *(
            {"config": config(**keys)}
            for keys in (
                {"eps": "4/255"},
                {"norm": "l2"},
                {"attack": "apgd-ce,apgd-t"},
                {"seed": 1},
                {"restarts": 2},
                {"precision": "bf16"},
                {"batch_size": 64},
            )
        ),
    ],
)
def test_all_that_decides_the_verdicts_is_in_the_hash(change):
    assert replace(QUESTION, **change).label[-8:] != QUESTION.label[-8:]


def test_what_does_not_decide_them_is_not():
    same = config(every=3, every_attack="pgd5", limit=7)
    assert replace(QUESTION, config=same).label == QUESTION.label
    named = config(attack="apgd-ce,apgd-t,fab-t,square")
    assert replace(QUESTION, config=named).label[-8:] == QUESTION.label[-8:]


def test_a_fingerprint_is_of_every_number_of_the_net():
    net: Any = toy_classifier()
    before = fingerprint(net)
    assert before == fingerprint(toy_classifier())
    for tensor in (net.backbone.norm1.adv.running_mean, net.backbone.fc.bias.data, net.mean):
        tensor.view(-1)[0] += 1e-12
        assert fingerprint(net) != before
        before = fingerprint(net)
    assert fingerprint(net.float()) != before
    net.backbone.conv1.weight.data = net.backbone.conv1.weight.data.to(torch.bfloat16)
    assert len(fingerprint(net)) == 64


# The default batch size ----------------------------------------------------------------------------------------------


def opened(
    monkeypatch: pytest.MonkeyPatch,
    sets: Sets,
    *,
    gpu: bool,
    num_workers: int = 0,
    said: int | None = None,
    is_run: bool = True,
    cluster: ClusterConfig | None = None,
    **changes: Any,
) -> EvalConfig:
    """The section that an evaluation of pictures of 16x16 asks by, on a machine with a GPU or without one."""
    recipe = toy_recipe(sets, eval={"batch_size": said}, cluster=(cluster or ClusterConfig()).model_dump())
    section = recipe.eval.model_copy(update={"norm": "linf", "eps": 8 / 255, "batch_size": said or 77})
    run: Any = SimpleNamespace(recipe=lambda: recipe) if is_run else None
    target = Target("there", toy_classifier(), recipe.cluster if is_run else None, recipe.data, section, run=run)
    monkeypatch.setattr("launcher.evaluate.open_target", lambda *_, **__: target)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    return open_wanted(Wanted("there", changes=changes), num_workers)[1]


@pytest.mark.parametrize("is_run", [True, False])
def test_the_default_goes_by_the_device_of_the_evaluation(monkeypatch, sets, is_run):
    """And not by what the target has in its section, which is for the device of its training."""
    assert opened(monkeypatch, sets, gpu=False, is_run=is_run).batch_size == 128
    assert opened(monkeypatch, sets, gpu=True, is_run=is_run).batch_size == 1024
    assert opened(monkeypatch, sets, gpu=True, is_run=is_run, batch_size=48).batch_size == 48


@pytest.mark.parametrize("gpu", [True, False])
def test_a_recipe_that_says_a_batch_size_keeps_it(monkeypatch, sets, gpu):
    assert opened(monkeypatch, sets, gpu=gpu, said=5).batch_size == 5
    assert opened(monkeypatch, sets, gpu=gpu, said=128).batch_size == 128
    assert opened(monkeypatch, sets, gpu=gpu, said=5, batch_size=48).batch_size == 48


@pytest.mark.parametrize(("gpus", "expected"), [(1, 1024), (0, 128)])
def test_in_a_cluster_the_device_is_that_of_the_runs_workers(monkeypatch, sets, gpus, expected):
    """This machine, which may have a GPU or none, is not where the workers are."""
    cluster = ClusterConfig(address="ray://there", gpus_per_worker=gpus)
    for gpu in (True, False):
        assert opened(monkeypatch, sets, gpu=gpu, cluster=cluster, num_workers=2).batch_size == expected
        assert opened(monkeypatch, sets, gpu=gpu, cluster=cluster).batch_size == (1024 if gpu else 128)


def test_on_a_cpu_a_question_finds_the_folder_of_before(monkeypatch, sets):
    """The label as it was when the default was a fixed 128."""
    before = "autoattack-linf-8_255-ema-3-val-89a8dbcf"
    asked = opened(monkeypatch, sets, gpu=False, attack="autoattack")
    assert replace(QUESTION, config=asked).label == before
    assert replace(QUESTION, config=config(batch_size=128)).label == before
    assert replace(QUESTION, config=opened(monkeypatch, sets, gpu=True, attack="autoattack")).label != before


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("runs/demo", "runs-demo"),
        ("/a/b/export/", "b-export"),
        ("timm:resnet50:w.pth", "timm-resnet50-w.pth"),
        ("s3://bucket/runs/x", "bucket-runs-x"),
        ("/", "target"),
    ],
)
def test_a_target_as_a_folders_name(target, name):
    assert slug(target) == name


# Samples ------------------------------------------------------------------------------------------------------------


def listed(tmp_path: Path, text: str) -> str:
    (tmp_path / "list.txt").write_text(text)
    return str(tmp_path / "list.txt")


def test_samples_are_all_or_evenly_spaced_or_listed(sets: Sets, tmp_path):
    assert choose_samples(sets.val, None, None).tolist() == list(range(23))
    assert choose_samples(sets.val, 5, None).tolist() == [0, 4, 9, 13, 18]
    file = listed(tmp_path, "7\n3\n\n 22 \n0\n")
    assert choose_samples(sets.val, None, file).tolist() == [0, 3, 7, 22]
    assert choose_samples(sets.val, 2, file).tolist() == [0, 7]
    assert choose_samples(sets.val, None, file).dtype == np.int64


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n23\n", "line 2: 23: no sample of"),
        ("1\n\n-1\n", "line 3: -1: "),
        ("1\n2\n1\n", "line 3: 1: the sample of line 1 again"),
        ("", "is empty; a line for each sample"),
        ("1\nant.png\n", "lists names, and .* was written from test, which can't be read now"),
    ],
)
def test_a_bad_line_of_a_list_is_named(sets: Sets, tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        choose_samples(sets.val, None, listed(tmp_path, text))


def test_a_list_that_is_not_there_is_refused(sets: Sets, tmp_path):
    with pytest.raises(UserError, match=r"--samples: .*nowhere.txt: can't be read"):
        choose_samples(sets.val, None, f"{tmp_path}/nowhere.txt")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"--samples: .*binary: can't be read"):
        choose_samples(sets.val, None, f"{tmp_path}/binary")


def test_names_are_found_in_the_folder_that_the_set_was_written_from(tmp_path):
    """As RobustBench lists ImageNet's: class folder and file, or the file alone, wherever they lie."""
    for name in ("ant/a.png", "ant/b.png", "bee/a.png", "bee/c.png"):
        (tmp_path / "val" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "val" / name)
    beton = str(tmp_path / "val.beton")
    write_beton(open_source(f"folder:{tmp_path}/val"), beton)
    file = listed(tmp_path, "bee/a.png\nval/ant/b.png\nc.png\n")
    assert choose_samples(beton, None, file).tolist() == [1, 2, 3]
    with pytest.raises(UserError, match=r"line 1: a\.png: no sample of"):
        choose_samples(beton, None, listed(tmp_path, "a.png\n"))
    (tmp_path / "val/bee/c.png").unlink()
    with pytest.raises(UserError, match="has changed since"):
        choose_samples(beton, None, file)
