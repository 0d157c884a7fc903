"""A run taken home: which weights, which files, which figures, and nothing half done."""

import json
import shutil
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from exports import noisy
from huggingface_hub import ModelCard, ModelCardData
from torch import Tensor
from toys import Sets, toy_recipe

import arat_dist.export_onnx
import arat_dist.export_run
from arat_dist.checkpoint import Checkpoint, save_checkpoint
from arat_dist.data.manifest import load_manifest
from arat_dist.errors import UserError
from arat_dist.export import load_exported, read_metadata
from arat_dist.export_run import default_formats, export_run
from arat_dist.models.classifier import Classifier
from arat_dist.objectives import build_objective
from arat_dist.run import Run
from arat_dist.targets import load_run, open_target

OURS = {"name": "cifar_resnet18", "args": {"channels": [8, 8, 8, 8]}}
STEP = 9
SUMMARY = {
    "weights": "ema",
    "steps": STEP,
    "num_samples": 23,
    "clean_accuracy": 0.75,
    "robust_accuracy": 0.5,
    "robust_attack": "pgd2",
    "norm": "linf",
    "eps": 8 / 255,
}
RESULT = {
    "attack": "autoattack",
    "norm": "l2",
    "eps": 0.5,
    "num_samples": 20,
    "clean_accuracy": 0.7,
    "robust_accuracy": 0.125,
    "weights": "ema",
    "data": "/far/away/sets/val.beton",
    "warnings": ["Gradients vanish."],
}


def make_run(sets: Sets, storage: str, **model: Any) -> Run:
    """A run with one checkpoint, of raw weights and their EMA, and no summary."""
    recipe = toy_recipe(sets, train={"ema_decay": 0.9}, model=model or {})
    run = Run(storage, "mine")
    run.open(recipe, load_manifest(sets.train).sha256)
    objective = build_objective(recipe)
    weights = {"model": noisy(objective.state_dict()), "ema": noisy(objective.classifier.state_dict())}
    save_checkpoint(run.checkpoints, Checkpoint(STEP, weights), keep=1)
    return run


@pytest.fixture(params=["folder", "memory"])
def run(request: pytest.FixtureRequest, sets: Sets, tmp_path: Path) -> Run:
    storage = str(tmp_path / "runs") if request.param == "folder" else f"memory://{tmp_path.name}"
    return make_run(sets, storage)


def logits(classifier: Classifier, branch: Any = "adv") -> Tensor:
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), classifier.branch(branch):
        return classifier.eval()(pixels)


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def test_the_averaged_weights_attacked_branch_goes_out(run: Run, tmp_path):
    run.finish(SUMMARY)
    exported = export_run(run, tmp_path / "out")
    assert (exported.formats, exported.max_difference <= 1e-4) == (("timm",), True)
    assert sorted(path.name for path in exported.folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    found, ema = logits(load_exported(exported.folder)), load_run(run, run.recipe(), "ema")
    torch.testing.assert_close(found, logits(ema))
    for other in (logits(ema, "clean"), logits(load_run(run, run.recipe(), "raw"))):
        assert (found - other).abs().max() > 1e-2
    notes = read_metadata(exported.folder)
    assert (notes["weights"], notes["step"], notes["eps"]) == ("ema", STEP, 8 / 255)
    assert (notes["clean_accuracy"], notes["robust_accuracy"], notes["robust_attack"]) == (0.75, 0.5, "pgd2")


def test_figures_are_those_of_the_exported_weights(run: Run, tmp_path):
    run.finish(SUMMARY)
    for name, changes in {
        "same": {},
        "other-weights": {"weights": "raw", "attack": "square"},
        "other-step": {"step": STEP - 1, "attack": "fab-t"},
        "other-branch": {"branch": "clean", "attack": "apgd-ce"},
        "transfer": {
            "branch": "adv",
            "transfer_from": "/far/net",
            "precision": "bf16",
            "restarts": 5,
            "attack": "pgd9",
        },
    }.items():
        (run.folder / "evaluations" / name).write_json("result.json", RESULT | changes)
    (run.folder / "evaluations/unfinished").write("verdicts.parquet", b"")

    text = text_of(export_run(run, tmp_path / "out").folder)
    assert "| sets/val | 20 | 0.7000 | autoattack | l2 | 0.5 | 0.1250 |" in text
    assert "| 23 | 0.7500 | pgd2 | linf | 8/255 | 0.5000 |" in text
    assert "- Gradients vanish." in text
    assert "square" not in text
    assert "fab-t" not in text
    assert "apgd-ce" not in text
    assert "| pgd9 x5 in bf16 transferred from another net | l2 | 0.5 |" in text
    assert "far" not in text
    data = ModelCard.load(tmp_path / "out/README.md", ignore_metadata_errors=False).data
    assert isinstance(data, ModelCardData)
    assert [each.metric_value for each in data.eval_results or []] == [0.75, 0.5, 0.7, 0.125, 0.125]

    text = text_of(export_run(run, tmp_path / "raw", "raw").folder)
    assert "| sets/val | 20 | 0.7000 | square | l2 | 0.5 | 0.1250 |" in text
    assert "pgd2" not in text
    assert read_metadata(tmp_path / "raw")["robust_accuracy"] is None


def test_an_older_checkpoint_has_not_the_summarys_figures(run: Run, tmp_path):
    run.finish(SUMMARY | {"steps": STEP + 1})
    assert "Not measured." in text_of(export_run(run, tmp_path / "out").folder)


def test_our_own_nets_go_out_as_onnx_too(sets: Sets, tmp_path):
    run = make_run(sets, str(tmp_path / "runs"), **OURS)
    exported = export_run(run, tmp_path / "out")
    assert exported.formats == default_formats(run.recipe()) == ("timm", "onnx")
    files = ["README.md", "config.json", "model.json", "model.onnx", "model.safetensors"]
    assert sorted(path.name for path in exported.folder.iterdir()) == files
    assert read_metadata(exported.folder)["requires"] == "arat_dist.models"
    assert "import arat_dist.models" in text_of(exported.folder)
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    (found,) = onnxruntime.InferenceSession(tmp_path / "out/model.onnx").run(None, {"pixels": pixels.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), logits(load_run(run, run.recipe())), rtol=0, atol=1e-4)
    # Nothing of this machine is in it.
    for path in exported.folder.iterdir():
        assert str(Path(sets.train).parent).encode() not in path.read_bytes(), path
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_an_onnx_folder_is_replaced_by_another_export_and_not_evaluated(sets: Sets, tmp_path):
    run = make_run(sets, str(tmp_path / "runs"))
    out = export_run(run, tmp_path / "out", formats=("onnx",)).folder
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.json", "model.onnx"]
    assert json.loads((out / "model.json").read_text())["label_names"] == ["ant", "bee", "cow"]
    assert "local-dir" not in text_of(out)
    with pytest.raises(UserError, match=f"^{out}: an ONNX export; .*--format timm, would be right$"):
        open_target(str(out), val=sets.val)
    export_run(run, out)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]


def test_an_export_that_fails_leaves_the_earlier_one_and_nothing_else(sets: Sets, tmp_path, monkeypatch):
    run = make_run(sets, str(tmp_path / "runs"))
    before = {path.name: path.read_bytes() for path in export_run(run, tmp_path / "out").folder.iterdir()}

    def differ(*args: Any) -> float:
        raise RuntimeError("its logits differ")

    monkeypatch.setattr(arat_dist.export_run, "verify_export", differ)
    with pytest.raises(RuntimeError, match="logits differ"):
        export_run(run, tmp_path / "out", "raw")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "runs"]


def test_sets_that_are_elsewhere_by_now_are_not_described(sets: Sets, tmp_path):
    for name in ("train", "val"):
        shutil.copy(Path(sets.val).with_name(f"{name}.beton"), tmp_path)
        shutil.copy(Path(sets.val).with_name(f"{name}.manifest.json"), tmp_path)
    moved = Sets(str(tmp_path / "train.beton"), str(tmp_path / "val.beton"))
    sha256 = load_manifest(moved.train).sha256
    run = make_run(moved, str(tmp_path / "runs"))
    assert f"/train | 44 | {sha256} |" in text_of(export_run(run, tmp_path / "out").folder)

    # Another set in its place: the run's own hash, no number; the validation set knows the names of the classes.
    for suffix in (".beton", ".manifest.json"):
        shutil.copy((tmp_path / "val").with_suffix(suffix), (tmp_path / "train").with_suffix(suffix))
    assert f"/train |  | {sha256} |" in text_of(export_run(run, tmp_path / "out").folder)
    assert "3 classes: ant, bee, cow" in text_of(tmp_path / "out")

    for file in tmp_path.glob("*.beton"):
        file.unlink()
    export_run(run, tmp_path / "out")
    assert "3 classes: Their names weren't at hand." in text_of(tmp_path / "out")
    assert "label_names" not in json.loads((tmp_path / "out/config.json").read_text())


def test_what_is_refused_writes_nothing(sets: Sets, tmp_path, monkeypatch):
    run = make_run(sets, str(tmp_path / "runs"))
    with pytest.raises(UserError, match=r"^--weights: swa: .*raw or ema would be right$"):
        export_run(run, tmp_path / "deep/out", "swa")
    monkeypatch.setattr(arat_dist.export_onnx, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"^--format: onnx: not installed"):
        export_run(run, tmp_path / "deep/out", formats=("onnx",))
    run.storage.delete("mine/checkpoints")
    with pytest.raises(UserError, match="has no whole checkpoint yet"):
        export_run(run, tmp_path / "deep/out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
