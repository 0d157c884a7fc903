"""A run's net taken home: which files, what is known of it, and the check that they give its logits."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from arat_dist.config import DataConfig, Recipe
from arat_dist.data.manifest import load_manifest
from arat_dist.errors import UserError
from arat_dist.evaluate import eval_config
from arat_dist.export import handover, is_own_net, new_folder, plain_net, verify_export, write_timm
from arat_dist.export_onnx import check_onnx, verify_onnx, write_onnx
from arat_dist.measured import data_name, final_summary, measurements
from arat_dist.model_card import Card, DataSet, write_card
from arat_dist.models.backbone import with_centre_crop
from arat_dist.run import DATA, Run
from arat_dist.targets import Loaded, Weights, load_weights

Format = Literal["timm", "onnx"]
"""A timm folder, or a file for onnxruntime."""


@dataclass(frozen=True)
class Exported:
    """An exported folder.

    folder: where it is.
    formats: what it holds.
    max_difference: by how much its logits differ at most from the net's that it came from.
    """

    folder: Path
    formats: tuple[Format, ...]
    max_difference: float


def export_run(
    run: Run, out_dir: Path, weights: Weights | None = None, formats: tuple[Format, ...] | None = None
) -> Exported:
    """Write a run's adv branch, whole or not at all, read it back and compare the logits.

    Args:
        run: the run.
        out_dir: the folder; an earlier export in it is replaced.
        weights: which of them; default: the averaged ones where it keeps them.
        formats: default: timm, and onnx as well if timm alone doesn't know the net.

    Raises:
        UserError: the run has no such weights, or out_dir is something else.
        RuntimeError: what was written gives other logits.
    """
    recipe = run.recipe()
    formats = formats or default_formats(recipe)
    if "onnx" in formats:
        check_onnx()
    loaded = load_weights(run, recipe, weights)
    data, sets = recipe.data, data_sets(run, recipe)
    backbone = plain_net(loaded.classifier.state_dict(), recipe.model, data.num_classes, data.image_size)
    about = handover(
        backbone,
        recipe.model,
        data.image_size,
        next((each.class_names for each in sets if each.class_names is not None), None),
        _metadata(run, recipe, loaded),
        crop_pct=evaluated_crop(with_centre_crop(data, backbone)),
    )
    measured = measurements(run, loaded.weights, loaded.step, data.val)
    differences = []
    with new_folder(out_dir) as folder:
        if "timm" in formats:
            write_timm(folder, backbone, recipe.model, about)
            differences.append(verify_export(folder, loaded.classifier))
        if "onnx" in formats:
            write_onnx(folder, backbone, about)
            differences.append(verify_onnx(folder, loaded.classifier, data.image_size))
        write_card(folder, Card(run.name, recipe, loaded.weights, loaded.step, about, formats, sets, measured))
    return Exported(Path(out_dir).resolve(), formats, max(differences))


def default_formats(recipe: Recipe) -> tuple[Format, ...]:
    """What a run goes out as unless a user says otherwise: a net that timm alone can't build needs ONNX beside it."""
    return ("timm", "onnx") if is_own_net(recipe.model.name) else ("timm",)


def data_sets(run: Run, recipe: Recipe) -> list[DataSet]:
    """What is known of the recipe's two sets here: of one that was moved away or is another by now, its name."""
    known = {"train": run.folder.read_json(DATA).get("train_sha256")}
    return [
        _data_set(role, path, known.get(role))
        for role, path in (("train", recipe.data.train), ("val", recipe.data.val))
    ]


def _data_set(role: str, path: str, sha256: str | None) -> DataSet:
    if not Path(path).exists():
        return DataSet(role, data_name(path), sha256=sha256)
    manifest = load_manifest(path)
    if sha256 not in (None, manifest.sha256):
        return DataSet(role, data_name(path), sha256=sha256)
    return DataSet(role, data_name(path), manifest.num_samples, manifest.sha256, manifest.class_names)


def evaluated_crop(data: DataConfig) -> float:
    """Side of the centre crop that validation pictures get: all of those that have the net's size already."""
    with contextlib.suppress(UserError):
        if load_manifest(data.val).all_are(data.image_size):
            return 1.0
    assert data.val_crop is not None
    return data.val_crop


def _metadata(run: Run, recipe: Recipe, loaded: Loaded) -> dict[str, Any]:
    """Notes for whoever opens the export, `arat eval` among them; accuracies as of the run's end."""
    attack = eval_config(recipe)
    summary = final_summary(run, loaded.weights, loaded.step)
    return {
        "run": run.name,
        "recipe_sha256": recipe.sha256(),
        "objective": recipe.objective.name,
        "weights": loaded.weights,
        "step": loaded.step,
        "norm": attack.norm,
        "eps": attack.eps,
        **{key: summary.get(key) for key in ("clean_accuracy", "robust_accuracy", "robust_attack")},
    }
