"""Taps: which layers' features are aligned, and how a layer's output becomes one vector per picture."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from arat_dist.errors import UserError
from arat_dist.models.split_norm import SplitNorm


def pool(output: Tensor, channels_last: bool = False) -> Tensor:
    """One vector per picture.

    Args:
        output: a feature map, of which the ReLU is averaged over the positions; tokens [B,N,d], averaged over the
            tokens; or pooled features [B,d], copied.
        channels_last: whether a map [B,n,n,n] has its features last; pictures are square, so others show it.

    Returns:
        [B,d], never a view of `output`: an activation that follows may work in place.
    """
    if output.ndim == 4:
        _, a, b, c = output.shape
        return output.relu().mean((1, 2) if a == b and (b != c or channels_last) else (2, 3))
    if output.ndim == 3:
        return output.mean(1)
    if output.ndim == 2:
        return output.clone()
    raise ValueError(f"output of shape {list(output.shape)}, not a map, tokens or pooled features")


class Recorder:
    """Pools the outputs of some modules of a net, for as long as the context lasts.

    Pooling happens inside the hook: an in-place activation after the module would alter its output.
    """

    def __init__(self, net: nn.Module, taps: Sequence[str]) -> None:
        self._modules = [net.get_submodule(tap) for tap in taps]
        self._channels_last = getattr(net, "output_fmt", None) == "NHWC"
        self.features: list[list[Tensor]] = [[] for _ in taps]

    @contextmanager
    def recording(self) -> Iterator[list[list[Tensor]]]:
        """For each tap the pooled outputs [B,d] of its calls so far; normally there is one call."""
        handles = [m.register_forward_hook(self._hook(i)) for i, m in enumerate(self._modules)]
        try:
            yield self.features
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Callable[[nn.Module, object, object], None]:
        def record(_module: nn.Module, _args: object, output: object) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(f"output of type {type(output).__name__}, not a tensor")
            self.features[index].append(pool(output, self._channels_last))

        return record


def automatic_taps(net: nn.Module) -> tuple[str, ...]:
    """The blocks of a timm net's last stage; of a net whose blocks are all alike (ViT), the last quarter of them.

    Raises:
        UserError: timm's feature_info doesn't name a last stage.
    """
    stages = _stages(net)
    if not stages:
        raise UserError(
            f"objective.taps: auto: {type(net).__name__} names no stages; a list of its module names is right"
        )
    last = stages[-1]["module"]
    parent, _, _ = last.rpartition(".")
    if len(stages) > 1 and len({stage["reduction"] for stage in stages}) == 1:
        blocks = [name for name, _ in net.get_submodule(parent).named_children()]
        return tuple(f"{parent}.{name}" for name in blocks[-math.ceil(len(blocks) / 4) :])
    return _blocks(net, last)


def check_taps(net: nn.Module, taps: Sequence[str]) -> None:
    """Raise UserError for the first tap that is not a module of the net, with close names that are."""
    halves = tuple(f"{path}." for path, m in net.named_modules() if isinstance(m, SplitNorm))
    known = [path for path, _ in net.named_modules() if path and not (halves and path.startswith(halves))]
    for tap in taps:
        if tap not in known:
            close = difflib.get_close_matches(tap, known, n=4, cutoff=0.5) or known[-4:]
            raise UserError(f"objective.taps: {tap}: no such module in the net; it has {', '.join(close)}")
    if len(set(taps)) < len(taps):
        raise UserError(f"objective.taps: {list(taps)}: module names, each once, would be right")


def _stages(net: nn.Module) -> list[dict]:
    """The entries of timm's feature_info (a list, or an object around one) that name modules which exist."""
    info = getattr(net, "feature_info", [])
    stages = info if isinstance(info, list) else getattr(info, "info", [])
    known = {path for path, _ in net.named_modules()}
    return [stage for stage in stages if stage.get("module") in known]


def _blocks(net: nn.Module, stage: str) -> tuple[str, ...]:
    """Names of the blocks that a stage runs one after the other; the stage itself where it isn't a row of blocks."""
    module = net.get_submodule(stage)
    blocks = getattr(module, "blocks", None)
    if isinstance(blocks, nn.Module):
        stage, module = f"{stage}.blocks", blocks
    names = [name for name, _ in module.named_children()]
    # RegNet's stage is no Sequential; its blocks are numbered: b1, b2. Branches of one block (norm1, attn) are not.
    in_a_row = isinstance(module, nn.Sequential | nn.ModuleList) or all(re.fullmatch(r"[A-Za-z]*\d+", n) for n in names)
    return tuple(f"{stage}.{name}" for name in names) if names and in_a_row else (stage,)
