"""The paper's own diagnostics: does the invariance loss pull against the classification, how far are branches apart.

A measurement costs two more backward passes through the step's graph and, with several ranks, one all-reduce of twice
the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from arat_dist.engine import Rank
from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import BATCH_NORMS, SplitNorm


def gradient_conflict(
    classifier: Classifier, terms: Mapping[str, Tensor], share: float, rank: Rank
) -> dict[str, Tensor]:
    """Compare the gradients of the classification and the invariance term on the net's weights; keeps the graph.

    Args:
        classifier: the net in training.
        terms: "classification" and "invariance", 0-d, means over this rank's samples.
        share: this rank's samples over the mean number of a rank's samples.
        rank: gradients are those of the mean over all ranks' samples.

    Returns:
        gradient_cosine, the cosine between the two, and gradient_opposed, the share of weights whose two derivatives
        differ in sign, over the weights that both terms reach; the same for each group of layers, as
        gradient_cosine_GROUP and gradient_opposed_GROUP. 0-d, equal on all ranks.
    """
    named = [(name, p) for name, p in classifier.backbone.named_parameters() if p.requires_grad]
    weights = [p for _, p in named]
    first, second = (
        torch.autograd.grad(terms[name] * share, weights, retain_graph=True, allow_unused=True)
        for name in ("classification", "invariance")
    )
    reached = [
        (layer_group(name), a, b) for (name, _), a, b in zip(named, first, second, strict=True) if None not in (a, b)
    ]
    if not reached:
        return {}
    sizes = [a.numel() for _, a, _ in reached]
    flat = torch.cat([g.flatten() for _, a, b in reached for g in (a, b)])
    pieces = (rank.all_reduce(flat) / rank.world_size).split([n for n in sizes for _ in range(2)])
    sums: dict[str, Tensor] = {}
    for (group, _, _), a, b in zip(reached, pieces[::2], pieces[1::2], strict=True):
        values = torch.stack([a @ b, a @ a, b @ b, (a * b < 0).sum().to(a), a.new_full((), a.numel())])
        sums[group] = sums.get(group, 0) + values
    metrics = _compare(torch.stack([*sums.values()]).sum(0))
    for group, values in sums.items():
        metrics |= {f"{name}_{group}": value for name, value in _compare(values).items()}
    return metrics


def layer_group(name: str) -> str:
    """The part of a timm net that a weight belongs to: layer3 of layer3.0.conv1.weight, blocks_7 of blocks.7.norm1."""
    first, _, rest = name.partition(".")
    second = rest.partition(".")[0]
    return f"{first}_{second}" if first in ("blocks", "stages", "layers") and second.isdigit() else first


def branch_distance(classifier: Classifier) -> dict[str, Tensor]:
    """How far the running statistics of the two branches are apart, means over all channels of all split BatchNorms.

    Returns:
        branch_mean_distance, |m_adv - m_clean| in units of the standard deviation (root of the mean of both variances),
        and branch_variance_distance, |ln(v_adv / v_clean)|; empty where nothing is split.
    """
    shifts, ratios = [], []
    for norm in classifier.modules():
        if isinstance(norm, SplitNorm) and isinstance(norm.adv, BATCH_NORMS):
            (adv_mean, adv_var), (clean_mean, clean_var) = (
                (branch.get_buffer("running_mean"), branch.get_buffer("running_var") + norm.adv.eps)
                for branch in (norm.adv, norm.clean)
            )
            shifts.append((adv_mean - clean_mean).abs() / ((adv_var + clean_var) / 2).sqrt())
            ratios.append((adv_var / clean_var).log().abs())
    if not shifts:
        return {}
    return {
        "branch_mean_distance": torch.cat(shifts).mean(),
        "branch_variance_distance": torch.cat(ratios).mean(),
    }


def _compare(sums: Tensor) -> dict[str, Tensor]:
    product, first, second, opposed, count = sums
    cosine = product / (first * second).sqrt().clamp_min(torch.finfo(sums.dtype).tiny)
    return {"gradient_cosine": cosine, "gradient_opposed": opposed / count}
