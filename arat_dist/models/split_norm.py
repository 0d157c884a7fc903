"""Norm layers with two branches, `adv` for attacked pictures and `clean` for clean ones, and how an attack runs them.

Source: split batch normalisation as in ARAT (Waseda 2025, arXiv 2402.14648), around any norm of a timm net.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, Literal, get_args

from timm.layers.norm import RmsNorm, RmsNorm2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from arat_dist.errors import UserError

Branch = Literal["adv", "clean"]

BATCH_NORMS = (_BatchNorm,)
"""Every BatchNorm of torch and timm, the synchronised and the activating ones included."""
LAYER_NORMS = (nn.LayerNorm, nn.RMSNorm, RmsNorm, RmsNorm2d)
"""Every LayerNorm and RMSNorm of torch and timm, the 2d and the activating ones included."""


class Switch:
    """Which branch all split norms of one net run; `adv` unless told otherwise, so that inference is the adv branch."""

    def __init__(self) -> None:
        self.branch: Branch = "adv"

    @contextmanager
    def use(self, branch: Branch) -> Iterator[None]:
        """Run `branch` inside the context, and what ran before after it.

        Raises:
            ValueError: the branch is neither adv nor clean.
        """
        if branch not in get_args(Branch):
            raise ValueError(f"branch: {branch!r}: adv or clean would be right")
        before, self.branch = self.branch, branch
        try:
            yield
        finally:
            self.branch = before


class SplitNorm(nn.Module):
    """Two copies of one norm layer, each with its own affine parameters and running statistics.

    The layer is wrapped, not rebuilt: BatchNormAct2d keeps its activation, SyncBatchNorm its process group.
    """

    def __init__(self, norm: nn.Module, switch: Switch) -> None:
        super().__init__()
        self.adv = norm
        self.clean = deepcopy(norm)
        self.switch = switch

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, of the shape that the wrapped layer takes, in the branch that the switch names."""
        return self.adv(x) if self.switch.branch == "adv" else self.clean(x)


def split_norms(net: nn.Module, kind: Literal["batch", "layer"]) -> Switch:
    """Replace, in place, every norm layer of `net` by a SplitNorm whose branches both start from it.

    Args:
        net: a backbone, its norms synchronised or not; `synchronise_norms` may also follow.
        kind: batch (BatchNorm and kin), or layer (LayerNorm and kin too).

    Returns:
        The one switch that all split norms of the net obey.

    Raises:
        UserError: the net has no norm layer of that kind.
    """
    kinds = BATCH_NORMS if kind == "batch" else BATCH_NORMS + LAYER_NORMS
    # A module registered under two names stays one module, hence the duplicates and the memory of what was split.
    norms = [(path, m) for path, m in net.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    if not norms:
        raise UserError(_cannot_split(net, kind))
    switch = Switch()
    done: dict[nn.Module, SplitNorm] = {}
    for path, norm in norms:
        if norm not in done:
            done[norm] = SplitNorm(norm, switch)
        net.set_submodule(path, done[norm])
    return switch


def fold_branch(state_dict: Mapping[str, Tensor], branch: Branch = "adv") -> dict[str, Tensor]:
    """The state dict of a split net with one branch of each norm under the plain net's own keys, the other dropped.

    The way back is to load a plain state dict before the net is split. A state dict without split norms stays as it is.
    """
    other = "clean" if branch == "adv" else "adv"
    prefixes = {key.rpartition(f".{other}.")[0] for key in state_dict if f".{other}." in key}
    split = {p for p in prefixes if any(key.startswith(f"{p}.{branch}.") for key in state_dict)}
    folded = {}
    for key, value in state_dict.items():
        prefix, own, rest = key.rpartition(f".{branch}.")
        if own and prefix in split:
            folded[f"{prefix}.{rest}"] = value
        elif key.rpartition(f".{other}.")[0] not in split:
            folded[key] = value
    return folded


class AttackMode:
    """Puts a net into the mode that an attack wants: `with attack_mode("batch"): ...`.

    The modules are listed once, here: make it after norms are split. `synchronise_norms`, which keeps them, may follow.
    """

    def __init__(self, module: nn.Module) -> None:
        self._modules = list(module.modules())
        self._batch_norms = [m for m in self._modules if isinstance(m, _BatchNorm)]
        self._attentions: list[Any] = [m for m in self._modules if hasattr(m, "fused_attn")]

    @property
    def has_batch_norms(self) -> bool:
        """Whether batch statistics can make one sample's result depend on another's."""
        return bool(self._batch_norms)

    @contextmanager
    def __call__(self, norm_stats: str) -> Iterator[None]:
        """Dropout and drop-path off, no buffer changed, and every flag as before once the context ends.

        On a CPU timm's attention runs unfused: the fused kernel's backward pass takes 4 to 6 times its forward pass
        there. At a ViT's usual 197 tokens, both training passes need more memory than that costs.

        Args:
            norm_stats: what BatchNorm normalises with: batch (the batch's own statistics) or running.

        Raises:
            ValueError: norm_stats is neither.
        """
        if norm_stats not in ("batch", "running"):
            raise ValueError(f"attack.norm_stats: {norm_stats!r}: batch or running would be right")
        # Past nn.Module's own way to set an attribute, which takes ten times as long: there are hundreds of layers.
        layers, norms = [vars(m) for m in self._modules], [vars(m) for m in self._batch_norms]
        training = [layer["training"] for layer in layers]
        tracking = [norm["track_running_stats"] for norm in norms]
        fused = [m.fused_attn for m in self._attentions]
        try:
            for layer in layers:
                layer["training"] = False
            if norm_stats == "batch":
                # In training mode without tracking, torch hands no buffer to the kernel and counts no batch.
                for norm in norms:
                    norm["training"], norm["track_running_stats"] = True, False
            for attention in self._attentions if self._is_on_cpu() else ():
                attention.fused_attn = False
            yield
        finally:
            for layer, flag in zip(layers, training, strict=True):
                layer["training"] = flag
            for norm, flag in zip(norms, tracking, strict=True):
                norm["track_running_stats"] = flag
            for attention, flag in zip(self._attentions, fused, strict=True):
                attention.fused_attn = flag

    def _is_on_cpu(self) -> bool:
        return all(p.device.type == "cpu" for m in self._attentions for p in m.parameters())


def _cannot_split(net: nn.Module, kind: str) -> str:
    """The line for a net without the norms that a recipe wants to split: what it has, and what would be right."""
    cfg = getattr(net, "pretrained_cfg", None) or {}
    name = cfg.get("architecture") or type(net).__name__
    present = {type(m).__name__ for m in net.modules() if "Norm" in type(m).__name__ and hasattr(m, "weight")}
    has = f"its norm layers are {', '.join(sorted(present))}" if present else "it has no norm layers"
    right = "layer or none" if any(isinstance(m, LAYER_NORMS) for m in net.modules()) else "none"
    wanted = "BatchNorm" if kind == "batch" else "BatchNorm or LayerNorm"
    return f"objective.split_norm: {kind}: {name} has no {wanted} ({has}); {right} would be right"
