"""Taps: which layers' features are aligned, and how a layer's output becomes one vector per picture."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

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
    """Pools the outputs of some modules of a net, where and for as long as it is asked to.

    Its hooks stay on the modules: a compiled net doesn't notice hooks that come and go. Pooling happens inside them, as
    an in-place activation after the module would alter its output.
    """

    def __init__(self, net: nn.Module, taps: Sequence[str]) -> None:
        self.is_recording = False
        self._num_taps = len(taps)
        self.features: list[list[Tensor]] = [[] for _ in taps]
        channels_last = getattr(net, "output_fmt", None) == "NHWC"
        for index, tap in enumerate(taps):
            net.get_submodule(tap).register_forward_hook(_Hook(self, index, channels_last))

    @contextmanager
    def recording(self) -> Iterator[list[list[Tensor]]]:
        """For each tap the pooled outputs [B,d] of its calls inside; normally there is one call."""
        self.is_recording, self.features = True, [[] for _ in range(self._num_taps)]
        try:
            yield self.features
        finally:
            self.is_recording, self.features = False, [[] for _ in range(self._num_taps)]


@dataclass(frozen=True)
class _Hook:
    """Hands a module's output to the recorder. An object, no closure: a copied net's hooks have the copied recorder."""

    recorder: Recorder
    index: int
    channels_last: bool

    def __call__(self, _module: nn.Module, _args: object, output: object) -> None:
        if not self.recorder.is_recording:
            return
        if not isinstance(output, Tensor):
            raise ValueError(f"output of type {type(output).__name__}, not a tensor")
        self.recorder.features[self.index].append(pool(output, self.channels_last))


def automatic_taps(net: nn.Module) -> tuple[str, ...]:
    """The blocks of a timm net's last stage; of a net whose blocks are all alike (ViT), the last quarter of them.

    Raises:
        UserError: timm's feature_info doesn't name a last stage.
    """
    found = stages(net)
    if not found:
        raise UserError(
            f"objective.taps: auto: {type(net).__name__} names no stages; a list of its module names is right"
        )
    last = found[-1]["module"]
    parent, _, _ = last.rpartition(".")
    if len(found) > 1 and len({stage["reduction"] for stage in found}) == 1:
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


def stages(net: nn.Module) -> list[dict]:
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
