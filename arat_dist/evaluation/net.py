"""The net as an evaluation runs it: the net itself, which judges, and a faster copy of it, which is attacked.

In the copy BatchNorms are folded into the convolutions before them and no weight asks for a gradient: the same function
up to rounding. Every verdict is the net's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from arat_dist.models.classifier import Classifier
from arat_dist.models.split_norm import AttackMode, Branch, SplitNorm
from arat_dist.numerics import evaluation_numerics

logger = logging.getLogger(__name__)

MAX_DIFFERENCE = 1e-9
"""Largest difference of the copy's logits from the net's in float64, as a share of the largest logit."""


def fast_copy(classifier: Classifier, probe: Tensor, branch: Branch = "adv") -> Classifier:
    """One branch of a net, in eval mode, on its device, for passes alone: folded, channels-last, its weights frozen.

    Args:
        classifier: the net; left as it is.
        probe: pictures in [0,1], [B,3,H,W]: the copy's logits must be the net's on them.
        branch: which of its branches.
    """
    plain = deepcopy(classifier).double().eval()
    keep_branch(plain, branch)
    probe = probe.to(plain.mean.device, torch.float64)
    folded = deepcopy(plain)
    fold_norms(folded, probe)
    with torch.no_grad():
        logits = plain(probe)
        difference = (folded(probe) - logits).abs().max() / logits.abs().max().clamp_min(1e-12)
    # Written so that a NaN falls back too.
    if not difference <= MAX_DIFFERENCE:
        logger.info("folding BatchNorm would change the logits (by %.1e): the net is attacked as it is", difference)
        folded = plain
    copy = folded.to(classifier.dtype).requires_grad_(False)
    return copy.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]


def keep_branch(classifier: Classifier, branch: Branch) -> None:
    """Put one branch in the place of each split norm, in place; `Classifier.branch` has no effect afterwards."""
    for path, module in list(classifier.backbone.named_modules(remove_duplicate=False)):
        if isinstance(module, SplitNorm):
            classifier.backbone.set_submodule(path, module.adv if branch == "adv" else module.clean)


def fold_norms(classifier: Classifier, probe: Tensor) -> int:
    """Fold, in place, every BatchNorm in eval mode that a convolution alone feeds into that convolution.

    Which those are shows in one pass: a norm takes the very tensor that a convolution gave. Where something else takes
    it too, the net is no longer the same function: compare.

    Returns:
        How many were folded.
    """
    pairs = _pairs(classifier, probe)
    for conv, norm in pairs.items():
        conv.weight, conv.bias = fuse_conv_bn_weights(  # pyright: ignore[reportAttributeAccessIssue]
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
    rest = {norm: _behind(norm) for norm in pairs.values()}
    for path, module in list(classifier.backbone.named_modules(remove_duplicate=False)):
        if module in rest:
            classifier.backbone.set_submodule(path, rest[module])
    return len(pairs)


def _behind(norm: nn.Module) -> nn.Module:
    """What is left of a norm without its normalisation: timm's BatchNormAct2d has an activation of its own."""
    parts = [part for name in ("drop", "act") if isinstance(part := getattr(norm, name, None), nn.Module)]
    return nn.Sequential(*parts) if parts else nn.Identity()


def _pairs(classifier: Classifier, probe: Tensor) -> dict[Any, Any]:
    """The norm behind each convolution that has one and runs, like it, once in a pass."""
    given: list[tuple[Tensor, nn.Module]] = []  # the tensors too, so that no address is used again
    pairs: list[tuple[nn.Module, nn.Module]] = []
    convolutions = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

    def after_conv(conv: nn.Module, _: Any, output: Tensor) -> None:
        given.append((output, conv))

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((conv, norm) for output, conv in given if output is inputs[0])

    modules = list(classifier.backbone.modules())
    handles = [m.register_forward_hook(after_conv) for m in modules if isinstance(m, convolutions)]
    handles += [m.register_forward_pre_hook(before_norm) for m in modules if isinstance(m, _BatchNorm)]
    try:
        with torch.no_grad():
            classifier(probe)
    finally:
        for handle in handles:
            handle.remove()
    once = {conv for conv in (c for _, c in given) if sum(c is conv for _, c in given) == 1}
    norms = [norm for _, norm in pairs]
    return {
        conv: norm
        for conv, norm in pairs
        if conv in once and norms.count(norm) == 1 and norm.track_running_stats and norm.running_mean is not None
    }


@contextmanager
def attacked(
    classifier: Classifier, precision: str = "fp32", beat: Callable[[], None] = lambda: None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Inside, the net as attacks see it: from pixels to logits of at least float32, in eval mode, its weights frozen.

    Args:
        classifier: a net of ours or a copy by `fast_copy`.
        precision: fp32, or bf16 or fp16 by autocast.
        beat: called at every pass.
    """
    device = classifier.mean.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    wanted = {parameter: parameter.requires_grad for parameter in classifier.parameters()}

    def net(pixels: Tensor) -> Tensor:
        beat()
        pixels = pixels.to(classifier.dtype)
        with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            logits = classifier(pixels)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    try:
        classifier.requires_grad_(False)
        with evaluation_numerics(), AttackMode(classifier)("running"):
            yield net
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
