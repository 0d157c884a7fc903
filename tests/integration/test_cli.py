"""The command line as users and scripts meet it: what bad input gets, and what each verb leaves and prints."""

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import timm
import yaml
from PIL import Image
from safetensors.torch import save_file
from small import ARAT, NoisePictures, as_options, tiny_overrides

from arat_dist.data.beton_writer import write_beton
from arat_dist.data.manifest import load_manifest
from launcher.cli import main

SUMMARY_KEYS = {
    "name",
    "recipe_sha256",
    "objective",
    "model",
    "epochs",
    "steps",
    "samples_seen",
    "world_size",
    "clean_accuracy",
    "robust_accuracy",
    "robust_attack",
    "eps",
    "attack_steps",
    "train_images_per_second",
    "wall_s",
    "mlflow_tracking_uri",
    "mlflow_run_id",
    "checkpoint",
    "restarts",
    "losses",
}
EVAL_KEYS = {"clean_accuracy", "robust_accuracy", "attack", "norm", "eps", "num_samples", "wall_s", "warnings"}


def files_below(folder: Path) -> dict[str, int]:
    """Path and time of change of every file."""
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def refusal(capsys, arguments: list[str]) -> str:
    """The one line that refuses these arguments; it must come with status 2 and leave nothing behind."""
    before = files_below(Path.cwd())
    capsys.readouterr()
    status = main(arguments)
    out, err = capsys.readouterr()
    assert status == 2, err
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith("arat: ")
    assert files_below(Path.cwd()) == before
    return err


def train_digits(tiny: dict[str, str], **more: str) -> list[str]:
    return ["train", "digits", *as_options(tiny | {key.replace("__", "."): value for key, value in more.items()})]


def write_pictures(folder: Path, names: list[str], side: int = 16) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index, name in enumerate(names):
        pixels = np.random.default_rng(index).integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory) -> Path:
    """A finished run of the tiny recipe, with its export beside it."""
    storage = tmp_path_factory.mktemp("finished")
    arguments = as_options(tiny_overrides(digits, storage))
    assert main(["train", "digits", "--name", "done", *arguments]) == 0
    assert main(["export", f"{storage}/done", f"{storage}/export"]) == 0
    return storage


# Bad input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ({"data.train": "nowhere.beton"}, ["nowhere.beton: no such file", "arat data write"]),
        ({"model.name": "resnet10x"}, ["model.name: resnet10x", "did you mean"]),
        ({"objective.taps": "[layer9]"}, ["objective.taps", "layer9"]),
        ({"train.epoch": "3"}, ["train.epoch", "did you mean train.epochs?"]),
        ({"trian.epochs": "3"}, ["trian", "did you mean train"]),
        ({"attack.eps": "a lot"}, ["attack.eps: 'a lot'", "number"]),
        ({"attack.eps": "8"}, ["attack.eps: 8", "at most 1"]),
        ({"eval.attack": "pdg20"}, ["eval.attack: 'pdg20'", "pgd20"]),
        ({"cluster.workers": "17"}, ["17", "at least 2 a worker"]),
        ({"cluster.workers": "15"}, ["cluster.workers: 15", "at most 14 would be right"]),
        ({"data.num_classes": "9"}, ["data.num_classes: 9", "has 10 classes"]),
        ({"data.image_size": "28"}, ["data.image_size", "28"]),
        ({"engine.kind": "deepspeed", "train.precision": "fp16"}, ["train.precision: fp16", "bf16 or fp32"]),
        ({"model.checkpoint": "nowhere.pth"}, ["model.checkpoint: nowhere.pth: no such file"]),
        ({"cluster.gpus_per_worker": "1"}, ["cluster.gpus_per_worker: 1", "no GPU"]),
        ({"cluster.storage": "nosuchscheme://x"}, ["cluster.storage", "nosuchscheme"]),
        ({"cluster.storage": __file__}, ["cluster.storage", "Not a directory"]),
        ({"data.padding": "17"}, ["data.padding: 17: at most half of data.image_size (32)"]),
        ({"optim.schedule": "step", "optim.milestones": "[9999]"}, ["optim.milestones: [9999", "below train.epochs"]),
    ],
    ids=lambda value: next(iter(value.items()))[0] if isinstance(value, dict) else "",
)
def test_a_bad_recipe_is_refused_by_one_line(overrides, parts, tiny, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    line = refusal(capsys, ["train", "digits", *as_options(tiny | overrides)])
    for part in parts:
        assert part in line


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["train", "nowhere.yaml"], ["nowhere.yaml: no such recipe", "digits"]),
        (["train", "digits", "stray"], ["stray: unknown argument"]),
        (["train", "digits", "--train.epochs"], ["--train.epochs: a value is missing"]),
        (["train", "digits", "--epochs", "3"], ["--epochs", "section"]),
        (["eval", "nowhere", "--atack", "none"], ["--atack: unknown argument"]),
        (["eval", "nowhere"], ["nowhere: a run", "an export", "timm:"]),
        (["eval", "timm:resnet10t"], ["--data: missing"]),
        (["export", "nowhere", "out"], ["nowhere: not a run"]),
        (["report", "nowhere", "--out", "out"], ["nowhere: not a run"]),
        (["report", "nowhere", "--out", "out", "--picture", "3"], ["--picture: unknown argument"]),
        (["data", "check", "nowhere.beton"], ["nowhere.beton: no such file"]),
        (["data", "write", "dir:x", "x.beton"], ["dir:x: not a SOURCE", "folder:PATH"]),
        (["data", "write", "digits:train", "x.ffcv"], ["x.ffcv", "ends in .beton"]),
        (["data", "write", "folder:nowhere", "x.beton"], ["nowhere: no such folder"]),
        (["train", "odd.yaml"], ["odd.yaml: not a YAML file", "a key is a word"]),
    ],
    ids=" ".join,
)
def test_a_bad_argument_is_refused_by_one_line(arguments, parts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_text("? [a, b]\n: 1\n")
    line = refusal(capsys, arguments)
    for part in parts:
        assert part in line


@pytest.mark.parametrize("name", ["a/b", ".hidden", ""])
def test_a_name_that_is_no_folder_name_is_refused(name, tiny, capsys):
    assert f"--name: {name!r}" in refusal(capsys, [*train_digits(tiny), "--name", name])


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        [],
        ["train"],
        ["data", "shred", "x.beton"],
        ["eval", "x", "--weights", "best"],
        ["eval", "x", "--limit", "0"],
        ["eval", "x", "--workers", "-1"],
        ["data", "write", "digits:val", "x.beton", "--jpeg-quality", "101"],
        ["data", "write", "digits:val", "x.beton", "--max-side", "65501"],
        ["data", "write", "digits:val", "x.beton", "--on-error", "ignore"],
        ["train", "digits", "--workers", "two"],
        ["train", "digits", "--workers", "1:2:3"],
        ["export", "x", "y", "--format", "tflite"],
    ],
    ids=" ".join,
)
def test_bad_usage_shows_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("usage: arat")


def test_a_damaged_beton_is_refused(digits, tiny, tmp_path, capsys):
    for name in ("train.beton", "train.manifest.json"):
        shutil.copy(digits / name, tmp_path)
    content = bytearray((tmp_path / "train.beton").read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "train.beton").write_bytes(content)
    damaged = str(tmp_path / "train.beton")
    assert f"{damaged}: damaged: SHA-256" in refusal(capsys, train_digits(tiny, data__train=damaged))
    assert f"{damaged}: damaged: SHA-256" in refusal(capsys, ["data", "check", damaged])
    (tmp_path / "train.beton").write_bytes(content[:-1])
    assert "its manifest says" in refusal(capsys, train_digits(tiny, data__train=damaged))


def test_a_key_that_stands_twice_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main(["train", "digits", "--print-config"])
    Path("twice.yaml").write_text(capsys.readouterr().out + "cluster: {workers: 1}\n")
    assert "'cluster' stands twice" in refusal(capsys, ["train", "twice.yaml"])


def test_an_empty_class_folder_and_an_unreadable_picture_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "set/ant", ["a.png", "b.png"])
    (tmp_path / "set/bee").mkdir()
    assert "set/bee: no pictures in this class folder" in refusal(capsys, ["data", "write", "folder:set", "x.beton"])
    (tmp_path / "set/bee/broken.jpg").write_bytes(b"no picture")
    for processes in ("1", "2"):
        line = refusal(capsys, ["data", "write", "folder:set", "x.beton", "--processes", processes])
        assert "set/bee/broken.jpg: not a readable picture" in line


def test_bad_evaluations_are_refused(finished, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, export = f"{finished}/done", f"{finished}/export"
    write_beton(NoisePictures(7), tmp_path / "seven.beton")
    for arguments, part in [
        (["eval", run, "--eps", "300/255"], "--eps: "),
        (["eval", run, "--eps", "-1"], "--eps: "),
        (["eval", run, "--eps", "big"], "big"),
        (["eval", run, "--attack", "deepfool"], "--attack: 'deepfool'"),
        (["eval", run, "--norm", "l2"], "--eps: missing"),
        (["eval", run, "--norm", "l7"], "--norm: 'l7'"),
        (
            ["eval", run, "--norm", "l1", "--eps", "3073"],
            "--eps: 3073: pixels are in [0,1], so l1 eps is at most 3*image_size^2",
        ),
        (["eval", run, "--weights", "ema"], "--weights: ema"),
        (["eval", run, "--data", "seven.beton"], "seven.beton: has 7 classes, the net has 10"),
        (["eval", export], "--data: missing"),
        (["eval", export, "--data", "seven.beton"], "seven.beton: has 7 classes, the net has 10"),
        (["eval", "timm:resnet10t:nowhere.pth", "--data", f"{digits}/val.beton"], "nowhere.pth: no such file"),
        (["eval", "timm:resnet10x", "--data", f"{digits}/val.beton"], "resnet10x"),
        (["eval", str(tmp_path), "--data", f"{digits}/val.beton"], "a run ("),
        (["export", run, str(tmp_path)], "is no earlier export"),
        (["export", run, "out", "--weights", "ema"], "--weights: ema"),
        (["export", run, f"{digits}/val.beton/out"], "Not a directory"),
        (["export", run, "s3://bucket/out"], "s3:/bucket/out: a folder of this machine would be right"),
        (["export", export, "out"], f"{export}: not a run (no recipe.yaml in it)"),
    ]:
        assert part in refusal(capsys, arguments), arguments


def test_weights_whose_classifier_does_not_fit_are_refused(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("resnet10t", num_classes=7).state_dict(), "seven.safetensors")
    line = refusal(capsys, ["eval", "timm:resnet10t:seven.safetensors", "--data", f"{digits}/val.beton"])
    assert "seven.safetensors" in line
    assert "number of classes" in line


# What works ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["digits", "imagenet_vit_small"])
def test_a_printed_recipe_is_a_recipe_that_prints_itself(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", recipe, "--attack.eps", "3/255", "--workers", "2:3", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert yaml.safe_load(printed)["cluster"]["workers"] == [2, 3]
    assert yaml.safe_load(printed)["attack"]["eps"] == 3 / 255
    Path("again.yaml").write_text(printed)
    assert main(["train", "again.yaml", "--print-config"]) == 0
    assert capsys.readouterr().out == printed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.yaml"]


def test_a_training_prints_its_summary_alone_and_is_done_once(tiny, capsys):
    command = [ARAT, *train_digits(tiny, track__mlflow="true"), "--name", "first", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    summary = json.loads(line)
    assert set(summary) >= SUMMARY_KEYS
    run = Path("runs/first")
    assert summary == json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["samples_seen"], summary["world_size"]) == (6, 6 * 32, 1)
    assert summary["mlflow_run_id"]
    assert (run / "checkpoints" / Path(summary["checkpoint"]).name / "manifest.json").is_file()
    assert "step 6/6" in done.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [2, 4, 6]

    before = files_below(Path("runs"))
    capsys.readouterr()
    assert main(command[1:]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == summary
    assert "finished already" in err
    assert files_below(Path("runs")) == before


def test_another_recipe_under_the_name_of_a_run_is_refused(finished, digits, capsys, monkeypatch):
    monkeypatch.chdir(finished)
    shutil.copytree("done", "unfinished", dirs_exist_ok=True)
    Path("unfinished/summary.json").unlink()
    for name in ("unfinished", "done"):
        other = tiny_overrides(digits, finished) | {"optim.lr": "0.2"}
        line = refusal(capsys, ["train", "digits", "--name", name, *as_options(other)])
        assert f"--name: {name}" in line
        assert "optim.lr" in line


def test_a_run_its_export_and_its_weights_score_the_same(finished, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data = ["--data", f"{digits}/val.beton"]
    # The export's own eps and norm are the run's; a bare timm net has to be told.
    results = []
    for arguments in ([f"{finished}/done"], [f"{finished}/export", *data]):
        assert main(["eval", *arguments, "--attack", "pgd2", "--limit", "90", "--json"]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert set(results[0]) >= EVAL_KEYS
    for result in results:
        assert (result["num_samples"], result["attack"], result["norm"]) == (90, "pgd2", "linf")
        assert result["eps"] == pytest.approx(24 / 255)
    assert {r["clean_accuracy"] for r in results} == {results[0]["clean_accuracy"]}
    assert results[0]["robust_accuracy"] == pytest.approx(results[1]["robust_accuracy"], abs=1.5 / 90)


def test_a_timm_net_with_a_weights_file_is_evaluated(digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    save_file(timm.create_model("resnet10t", num_classes=10).state_dict(), "ten.safetensors")
    arguments = ["eval", "timm:resnet10t:ten.safetensors", "--data", f"{digits}/val.beton", "--limit", "8", "--json"]
    assert "--eps: missing" in refusal(capsys, arguments)
    assert main([*arguments, "--eps", "8/255", "--norm", "linf", "--attack", "none"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["num_samples"], result["robust_accuracy"], result["attack"]) == (8, None, "none")


def test_an_export_loads_with_timm_alone(finished, tmp_path):
    script = (
        "import sys, timm, torch\n"
        f"net = timm.create_model('local-dir:{finished}/export', pretrained=True).eval()\n"
        "assert net(torch.zeros(1, 3, 32, 32)).shape == (1, 10)\n"
        "assert not {'arat_dist', 'launcher', 'ray'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_goes_out_as_onnx(finished, digits, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["export", f"{finished}/done", "net", "--format", "onnx", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["export"], result["formats"]) == (f"{tmp_path}/net", ["onnx"])
    assert 0 < result["max_difference"] <= 1e-4
    session = onnxruntime.InferenceSession("net/model.onnx")
    (logits,) = session.run(None, {"pixels": np.zeros((3, 3, 32, 32), np.float32)})
    assert isinstance(logits, np.ndarray)
    assert logits.shape == (3, 10)
    assert "net: an ONNX export" in refusal(capsys, ["eval", "net", "--data", f"{digits}/val.beton"])


def test_a_net_of_our_own_goes_out_in_both_forms(digits, tmp_path, capsys):
    own = {"model.name": "cifar_resnet18", "train.max_steps": "1", "eval.limit": "8"}
    arguments = as_options(tiny_overrides(digits, tmp_path) | own)
    assert main(["train", "digits", "--name", "own", *arguments, "--model.args", "{channels: [8, 8, 8, 8]}"]) == 0
    capsys.readouterr()
    assert main(["export", f"{tmp_path}/own", f"{tmp_path}/out"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert f"import arat_dist.models; timm.create_model('local-dir:{tmp_path}/out'" in first
    assert f"timm alone doesn't know this architecture, so {tmp_path}/out/model.onnx is there as well" in second
    options = ["--data", f"{digits}/val.beton", "--attack", "none", "--limit", "8", "--out", f"{tmp_path}/evaluation"]
    assert main(["eval", f"{tmp_path}/out", *options]) == 0


def test_folders_are_written_and_checked(tmp_path, monkeypatch, capsys):
    """Class folders for training; for validation, as ILSVRC comes, one flat folder and a list."""
    monkeypatch.chdir(tmp_path)
    for name in ("n01440764", "n01443537"):
        write_pictures(tmp_path / "train" / name, [f"{name}_{i}.JPEG" for i in range(3)], side=24)
    write_pictures(tmp_path / "val", [f"ILSVRC2012_val_{i:08d}.JPEG" for i in range(1, 5)], side=24)
    rows = [f"ILSVRC2012_val_{i:08d},{'n01443537' if i % 2 else 'n01440764'} 1 2 3 4" for i in range(1, 5)]
    Path("LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]) + "\n")
    assert main(["data", "write", "folder:train", "train.beton", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert (manifest["num_samples"], manifest["class_names"]) == (6, ["n01440764", "n01443537"])
    flat = ["--labels", "LOC_val_solution.csv", "--classes-from", "train.beton", "--max-side", "12"]
    assert main(["data", "write", "folder:val", "val.beton", *flat]) == 0
    written = load_manifest("val.beton")
    assert (written.class_counts, written.max_size) == ((2, 2), (12, 12))
    capsys.readouterr()
    assert main(["data", "check", "val.beton"]) == 0
    out, err = capsys.readouterr()
    assert "val.beton: whole, 4 pictures of 2 classes" in out
    assert err == ""


def test_unreadable_pictures_can_be_left_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "set/ant", ["a.png", "b.png"])
    write_pictures(tmp_path / "set/bee", ["a.png", "b.png"])
    for name in ("ant/b.png", "bee/a.png"):
        Path("set", name).write_bytes(b"no picture")
    for processes in ("1", "2"):
        arguments = ["data", "write", "folder:set", "x.beton", "--processes", processes]
        assert ": not a readable picture: no picture format" in refusal(capsys, arguments)
        assert main([*arguments, "--on-error", "skip", "--json"]) == 0
        out, err = capsys.readouterr()
        written = json.loads(out)
        assert (written["num_samples"], written["class_counts"]) == (2, [1, 1])
        assert [line.partition(":")[0] for line in written["skipped"]] == ["set/ant/b.png", "set/bee/a.png"]
        assert err == ("x.beton: 2 of 4 pictures couldn't be read and were left out; x.manifest.json lists them\n")
        assert main(["data", "check", "x.beton", "--deep"]) == 0
        for path in ("x.beton", "x.manifest.json"):
            Path(path).unlink()
    for name in ("ant/a.png", "bee/b.png"):
        Path("set", name).write_bytes(b"")
    line = refusal(capsys, [*arguments, "--on-error", "skip"])
    assert "folder:set: none of its pictures can be read; the first: set/ant/a.png: " in line


def test_a_deep_check_decodes_every_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "set/ant", [f"{index}.png" for index in range(3)], side=140)
    assert main(["data", "write", "folder:set", "x.beton"]) == 0
    capsys.readouterr()
    assert main(["data", "check", "x.beton", "--json"]) == 0
    plain = capsys.readouterr().out
    assert main(["data", "check", "x.beton", "--deep", "--json"]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (plain, "")
    assert main(["data", "check", "x.beton", "--deep"]) == 0
    assert "SHA-256 agrees, every picture decodes" in capsys.readouterr().out.replace("\n", " ")

    content = bytearray(Path("x.beton").read_bytes())
    second = content.index(b"\xff\xd8\xff", content.index(b"\xff\xd8\xff") + 1)
    content[second : second + 64] = bytes(64)
    Path("x.beton").write_bytes(content)
    assert "x.beton: damaged: SHA-256" in refusal(capsys, ["data", "check", "x.beton", "--deep"])
    # Broken before the hash was taken: only decoding tells.
    manifest = json.loads(Path("x.manifest.json").read_text())
    Path("x.manifest.json").write_text(json.dumps(manifest | {"sha256": hashlib.sha256(content).hexdigest()}))
    assert main(["data", "check", "x.beton"]) == 0
    assert "x.beton: 1 of 3 pictures are broken: 1; " in refusal(capsys, ["data", "check", "x.beton", "--deep"])
    path = Path("x.manifest.json")
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"min_size": [5, 5]}))
    assert "x.manifest.json: min_size: not that of the .beton" in refusal(capsys, ["data", "check", "x.beton"])


def test_what_libraries_print_does_not_reach_stdout(finished, capsys, monkeypatch):
    """With --json nothing else is on stdout, whatever the libraries below print."""
    import launcher.evaluate

    work = launcher.evaluate.evaluate_target

    def chatty(*args: Any, **kwargs: Any) -> dict[str, Any]:
        sys.stdout.write("chatter\n")
        return work(*args, **kwargs)

    monkeypatch.setattr(launcher.evaluate, "evaluate_target", chatty)
    assert main(["eval", f"{finished}/done", "--attack", "none", "--limit", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["num_samples"] == 4
    assert "chatter" in err


def test_the_demo_compares_with_plain_training_and_exports(tiny, capsys):
    del tiny["data.train"], tiny["data.val"]
    assert main(["demo", "--json", "--objective.gamma", "3", *as_options(tiny)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert set(summary) >= SUMMARY_KEYS | {"export", "standard_robust_accuracy"}
    assert (Path(summary["export"]) / "config.json").is_file()
    assert load_manifest("data/digits/train.beton").num_samples == 1437
    standard = json.loads(Path("runs/demo-standard/summary.json").read_text())
    assert (standard["objective"], standard["samples_seen"]) == ("standard", summary["samples_seen"])


def test_a_failure_is_status_1(tiny, capsys):
    assert main([*train_digits(tiny, optim__lr="1e20"), "--name", "nan"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[-1].startswith("arat: the training broke down: step 6: ")
    assert not Path("runs/nan/summary.json").exists()


def test_the_trainers_cost_is_measured_on_a_run_of_its_own(tiny, capsys):
    before = files_below(Path.cwd())
    options = as_options(tiny | {"train.log_every": "1", "train.checkpoint_every": "3"})
    assert main(["bench", "train", "digits", "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 5  # the first of 6 is the warm-up
    parts = result["loader_wait_fraction"], result["checkpoint_fraction"]
    assert all(part > 0 for part in parts)
    assert sum(parts) <= result["overhead_fraction"] < 1
    assert result["images_per_second"] > 0
    assert files_below(Path.cwd()) == before


def test_a_run_too_short_to_measure_is_refused(tiny, capsys):
    assert main(["bench", "train", "digits", *as_options(tiny | {"train.log_every": "50"})]) == 2
    assert "train.log_every: at least two lines" in capsys.readouterr().err


def test_the_step_is_measured_against_its_floor(capsys):
    options = ["--model", "cifar_resnet18", "--model.args", "{channels: [8, 8, 8, 8]}", "--num-classes", "10"]
    options += ["--image-size", "32", "--batch-size", "4", "--attack-steps", "1", "--repeats", "1"]
    assert main(["bench", "step", "--json", *options]) == 0
    keys = {"forward_ms", "floor_ms", "step_ms", "floor_ratio", "speedup_fp32", "speedup_bf16", "peak_memory_mb"}
    result = json.loads(capsys.readouterr().out)
    assert keys | {"reference_peak_memory_mb", "breakdown_ms"} <= result.keys()
    assert all(result[key] > 0 for key in keys)
