"""`arat eval` as users meet it: what it leaves, what it does when it is killed, and what bad input gets."""

import io
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from small import ARAT, as_options, marked_processes, tiny_overrides, wait_until_gone

from arat_dist.data.loader import val_loader
from arat_dist.evaluation.corruptions import Corruption
from arat_dist.evaluation.ledger import Ledger
from arat_dist.run import Run
from arat_dist.targets import open_target
from launcher.cli import main

ATTACKS = ["--attack", "pgd3,apgd100", "--eps", "6/255", "--limit", "120", "--batch-size", "4", "--threads", "1"]
"""Some thirty batches a stage, so that a kill comes in the middle of one. One thread: convolutions of few pictures
round in another way on two."""


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> Path:
    """A finished run of the tiny recipe, long enough to be right now and then, and its export."""
    storage = tmp_path_factory.mktemp("finished")
    longer = tiny_overrides(digits, storage) | {"train.max_steps": "60", "train.epochs": "2"}
    assert main(["train", "digits", "--name", "done", *as_options(longer)]) == 0
    assert main(["export", f"{storage}/done", f"{storage}/export"]) == 0
    return storage


@pytest.fixture(scope="module")
def uninterrupted(finished, tmp_path_factory) -> Any:
    out = tmp_path_factory.mktemp("uninterrupted")
    assert main(["eval", f"{finished}/done", *ATTACKS, "--out", str(out)]) == 0
    (folder,) = out.iterdir()
    return verdicts(folder)


def verdicts(folder: Path) -> Any:
    return pd.read_parquet(io.BytesIO((folder / "verdicts.parquet").read_bytes()))


def evaluate(capsys: Any, *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *arguments, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_an_evaluation_leaves_its_result_and_a_verdict_for_each_sample(finished, capsys):
    result = evaluate(capsys, f"{finished}/done", *ATTACKS)
    (folder,) = (finished / "done/evaluations").glob("pgd3+apgd100-linf-6_255-raw-120-val-*")
    assert sorted(path.name for path in folder.iterdir()) == ["result.json", "verdicts.parquet"]
    assert json.loads((folder / "result.json").read_text()) == result
    table = verdicts(folder)
    assert list(table.columns) == [
        *("sample", "label", "clean_prediction", "clean_right"),
        *(f"{kind}_{name}" for name in ("pgd3", "apgd100") for kind in ("right", "prediction")),
        "robust",
    ]
    assert table["sample"].is_monotonic_increasing
    assert len(table) == result["num_samples"] == 120
    assert (table["clean_right"] == (table["clean_prediction"] == table["label"])).all()
    assert result["clean_accuracy"] == table["clean_right"].mean()
    stands = table["clean_right"]
    for attack in result["attacks"]:
        right = table[f"right_{attack['name']}"]
        assert (right.notna() == stands).all(), "an attack is tried on what the ones before have left"
        assert attack["num_attacked"] == stands.sum()
        stands = stands & (right == True)  # noqa: E712 - nulls are not right
        assert attack["robust_accuracy"] == stands.mean()
    assert (table["robust"] == stands).all()
    assert result["robust_accuracy"] == stands.mean()
    assert 0 < result["robust_accuracy"] < result["clean_accuracy"] < 1
    assert result["attack_steps"] == 100
    assert result["probes"]["num_samples"] == min(32, table["clean_right"].sum())

    # The same question has its answer: nothing is computed or written.
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    began = time.perf_counter()
    assert evaluate(capsys, f"{finished}/done", *ATTACKS) == result
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert time.perf_counter() - began < result["wall_s"] + 60


def start(run: Path, out: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [ARAT, "eval", str(run), *ATTACKS, "--out", str(out), "--json", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_batches(out: Path, stage: str, count: int, process: subprocess.Popen[str]) -> None:
    """Until so many batches of a stage are finished."""
    deadline = time.monotonic() + 600
    while len(list(out.glob(f"*/ledger/{stage}/*.json"))) < count:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_killed_worker_is_replaced_and_the_verdicts_are_the_same(finished, uninterrupted, tmp_path):
    process = start(finished / "done", tmp_path, "--workers", "2")
    wait_for_batches(tmp_path, "apgd100", 3, process)
    os.kill(max(marked_processes("ray::RayTrainWorker")), signal.SIGKILL)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert json.loads(out)["num_samples"] == 120
    (folder,) = tmp_path.iterdir()
    pd.testing.assert_frame_equal(verdicts(folder), uninterrupted)


def test_a_killed_evaluation_goes_on_at_another_number_of_workers(
    finished, uninterrupted, tmp_path, monkeypatch, caplog
):
    process = start(finished / "done", tmp_path, "--workers", "2")
    wait_for_batches(tmp_path, "apgd100", 3, process)
    workers = marked_processes("ray::RayTrainWorker")
    process.kill()
    process.communicate()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    (folder,) = tmp_path.iterdir()
    assert not (folder / "result.json").exists()
    kept = {(path.parent.name, int(path.stem)) for path in folder.glob("ledger/*/*.json")}
    # One file is damaged meanwhile.
    (folder / "ledger/pgd3/000001.json").write_bytes((folder / "ledger/pgd3/000001.json").read_bytes()[:40])

    saved: list[tuple[str, int]] = []
    save = Ledger.save
    monkeypatch.setattr(Ledger, "save", lambda self, *args: (saved.append(args[:2]), save(self, *args)))
    assert main(["eval", f"{finished}/done", *ATTACKS, "--out", str(tmp_path)]) == 0
    assert "000001.json: damaged, or of other samples: this batch is computed anew" in caplog.text
    assert kept & set(saved) == {("pgd3", 1)}, "what is sound is not computed again"
    assert len([batch for batch in kept if batch[0] == "apgd100"]) >= 3
    assert ("apgd100", 10) in saved
    pd.testing.assert_frame_equal(verdicts(folder), uninterrupted)
    wait_until_gone(90)


def test_ctrl_c_keeps_what_is_finished(finished, uninterrupted, tmp_path):
    process = start(finished / "done", tmp_path)
    wait_for_batches(tmp_path, "apgd100", 2, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "interrupted; the same command goes on where it stopped" in err
    again = start(finished / "done", tmp_path)
    assert again.wait(timeout=600) == 0
    again.communicate()
    (folder,) = tmp_path.iterdir()
    pd.testing.assert_frame_equal(verdicts(folder), uninterrupted)


def test_transferred_pictures_are_weaker_than_those_made_on_the_net(finished, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    target = ["export", "--threads", "1", "--attack", "apgd10", "--limit", "90", "--data", f"{digits}/val.beton"]
    Path("export").symlink_to(finished / "export")
    own = evaluate(capsys, *target)
    other = tiny_overrides(digits, tmp_path / "runs") | {"train.seed": "9", "train.max_steps": "30"}
    assert main(["train", "digits", "--name", "other", *as_options(other)]) == 0
    transferred = evaluate(capsys, *target, "--transfer-from", "runs/other")
    assert transferred["clean_accuracy"] == own["clean_accuracy"]
    assert own["robust_accuracy"] <= transferred["robust_accuracy"] <= own["clean_accuracy"]
    assert transferred["transfer_from"] == "runs/other"
    assert {path.name for path in Path("evaluations").iterdir()} == {"export"}
    # From the net itself they are as good as its own.
    itself = evaluate(capsys, *target, "--transfer-from", str(finished / "done"))
    assert itself["robust_accuracy"] == pytest.approx(own["robust_accuracy"], abs=2 / 90)


def test_corruptions_are_measured_by_severity(finished, tmp_path, capsys):
    names = ["--corruptions", "gaussian_noise,contrast", "--attack", "none", "--limit", "60", "--out", str(tmp_path)]
    result = evaluate(capsys, f"{finished}/done", *names)
    assert [(each["name"], each["severity"]) for each in result["corruptions"]] == [
        (name, severity) for name in ("gaussian_noise", "contrast") for severity in range(1, 6)
    ]
    # One of them by hand: each picture corrupted and classified alone.
    target = open_target(f"{finished}/done")
    right = 0
    with val_loader(target.data, 1) as loader, torch.no_grad():
        for images, labels, keys in loader.iterate([np.array([i * 6]) for i in range(60)]):
            picture = images[0].permute(1, 2, 0).numpy()
            corrupted = torch.from_numpy(Corruption("gaussian_noise", 3)(picture, int(keys)).copy())
            right += int(target.classifier(corrupted.permute(2, 0, 1)[None] / 255).argmax(1) == labels)
    assert result["corruptions"][2]["accuracy"] == right / 60 != result["clean_accuracy"]
    assert result["robust_accuracy"] is None
    assert main(["eval", f"{finished}/done", *names]) == 0
    assert "accuracy under common corruptions" in capsys.readouterr().out


def test_the_clean_branch_is_measured_when_asked_for_and_warned_of(finished, tmp_path, capsys):
    options = ["--attack", "pgd2", "--limit", "48", "--out", str(tmp_path), "--threads", "1"]
    adv = evaluate(capsys, f"{finished}/done", *options)
    clean = evaluate(capsys, f"{finished}/done", *options, "--branch", "clean")
    assert (adv["branch"], clean["branch"]) == ("adv", "clean")
    assert any("the clean branch was measured" in each for each in clean["warnings"])
    assert not any("the clean branch was measured" in each for each in adv["warnings"])


def test_listed_samples_are_measured(finished, tmp_path, capsys):
    (tmp_path / "list.txt").write_text("9\n4\n300\n")
    options = ["--attack", "none", "--samples", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")]
    assert evaluate(capsys, f"{finished}/done", *options)["num_samples"] == 3
    (folder,) = (tmp_path / "out").iterdir()
    assert verdicts(folder)["sample"].tolist() == [4, 9, 300]
    assert verdicts(folder)["robust"].isna().all()


def test_both_codes_are_timed_on_the_same_pictures_and_agree(finished, capsys):
    options = ["--eps", "6/255", "--limit", "24", "--repeats", "1", "--threads", "1", "--json"]
    assert main(["bench", "eval", f"{finished}/done", *options, "--workers", "2", "--attack", "pgd3,apgd5"]) == 0
    result = json.loads(capsys.readouterr().out)
    for name in ("apgd-ce", "apgd-t"):
        each = result[name]
        assert 0 < each["num_attacked"] <= 24
        assert each["speedup"] == pytest.approx(each["theirs_s"] / each["ours_s"])
        assert each["agreement"] >= 0.9
    assert result["scale"]["ratio"] == pytest.approx(result["scale"]["1x1_s"] / result["scale"]["2x1_s"])


def test_bad_evaluations_are_refused_before_anything_is_written(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = f"{finished}/done"
    Path("bad.txt").write_text("0\nabc\n")
    Path("out").write_text("a file")
    before = sorted(finished.rglob("*"))
    for options, part in [
        (["--attack", "apgd-ce,apgd-ce"], "--attack: 'apgd-ce,apgd-ce'"),
        (["--attack", "autoattack,pgd20"], "--attack: 'autoattack,pgd20'"),
        (["--corruptions", "rain"], "--corruptions: rain: all, or some of"),
        (["--severity", "3"], "--severity: 3: goes with --corruptions"),
        (["--samples", "bad.txt"], "--samples: bad.txt: line 2: abc"),
        (["--samples", "nowhere.txt"], "--samples: nowhere.txt: can't be read"),
        (["--transfer-from", "nowhere"], "nowhere: a run ("),
        (["--transfer-from", run, "--attack", "none"], "--transfer-from: "),
        (["--norm", "l2", "--eps", "60"], "l2 eps is at most image_size*sqrt(3)"),
        (["--seed", str(2**31)], "--seed: "),
        (["--out", "out"], "--out: "),
        (["--branch", "clean"], None),
    ]:
        target = f"{finished}/export" if options[0] == "--branch" else run
        data = ["--data", Run(str(finished), "done").recipe().data.val]
        capsys.readouterr()
        assert main(["eval", target, *options, *data]) == 2, options
        err = capsys.readouterr().err
        assert err.count("\n") == 1, err
        assert (part or "--branch: clean: ") in err
    assert sorted(finished.rglob("*")) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.txt", "out"]
