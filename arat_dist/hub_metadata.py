"""What the Hugging Face hub reads of a model: the YAML at the top of its card."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import timm
from huggingface_hub import EvalResult, ModelCardData

from arat_dist.config import Recipe
from arat_dist.export import is_own_net
from arat_dist.measured import Measurement

_TASK = "image-classification"


def front_matter(name: str, recipe: Recipe, formats: Sequence[str], measured: Sequence[Measurement]) -> ModelCardData:
    """The card's YAML. It names no licence: that is for whoever publishes the weights.

    Args:
        name: the run's.
        recipe: the resolved recipe.
        formats: timm, onnx: what the folder holds.
        measured: its accuracies.
    """
    library = "timm" if "timm" in formats else "onnx"
    return ModelCardData(
        library_name=library,
        pipeline_tag=_TASK,
        tags=sorted({_TASK, *formats, "adversarial-robustness", recipe.objective.name}),
        base_model=base_model(recipe),
        model_name=name,
        eval_results=list(_eval_results(measured)) or None,
    )


def base_model(recipe: Recipe) -> str | None:
    """Name on the hub of the weights that training began with, if they were timm's."""
    if not recipe.model.pretrained or is_own_net(recipe.model.name):
        return None
    cfg = timm.get_pretrained_cfg(recipe.model.name)
    if cfg is None or not cfg.hf_hub_id:
        return None
    return f"{cfg.hf_hub_id}{cfg.architecture}.{cfg.tag}" if cfg.hf_hub_id.endswith("/") else cfg.hf_hub_id


def _eval_results(measured: Sequence[Measurement]) -> Iterator[EvalResult]:
    """Every accuracy in the form of the hub's model-index."""
    seen = set()
    for each in measured:
        values = [("accuracy", "Clean accuracy", each.clean_accuracy)]
        if each.robust_accuracy is not None:
            name = f"Robust accuracy ({each.attack}, {each.norm}, eps {radius(each.norm, each.eps)})"
            values.append(("robust_accuracy", name, each.robust_accuracy))
        for metric, name, value in values:
            if (each.data, each.num_samples, name) not in seen:
                seen.add((each.data, each.num_samples, name))
                yield EvalResult(
                    task_type=_TASK,
                    dataset_type=each.data,
                    dataset_name=each.data,
                    # What sets two results of one set apart; under the same name the first one's would be shown.
                    dataset_config=f"{each.num_samples} pictures",
                    metric_type=metric,
                    metric_name=name,
                    metric_value=value,
                )


def radius(norm: str, eps: float) -> str:
    """Eps as people write it: linf in 255ths."""
    return f"{eps * 255:.3g}/255" if norm == "linf" else f"{eps:.4g}"
