"""The numbers that a step computes with: weights cast once, weights without gradients, gradients that fit into fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

COMPUTE_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What attack and training passes compute in; master weights are fp32. None: as they are."""

_Place = tuple[dict[str, Any], str]
"""Where a layer holds a parameter: its own table, and the name."""
_HEADROOM = 256.0
"""Largest number in the gradient that an attack sends into an fp16 net, whose numbers end at 65,504."""


_STANDARDISED = (StdConv2d, StdConv2dSame, ScaledStdConv2d, ScaledStdConv2dSame)


def is_cast(module: nn.Module) -> bool:
    """Whether autocast would cast a layer's weights anew in every pass: a convolution or a linear layer.

    Not those that compute on their weights first, in full precision.
    """
    return isinstance(module, _ConvNd | nn.Linear) and not isinstance(module, _STANDARDISED)


class StepWeights:
    """The weights of a module tree as one step uses them.

    Args:
        module: any tree; layers must not be added or removed later.
        dtype: what convolutions and linear layers compute in, None to leave them.
        together: cast all weights, and all their gradients, in one operation: a launch or two in place of hundreds. DDP
            would then get all gradients at the very end of the backward pass and have nothing to overlap with.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype | None, *, together: bool = False):
        self._dtype, self._together = dtype, together
        self._all, self._cast = list[_Place](), list[_Place]()
        for part in module.modules():
            held = part._parameters  # noqa: SLF001 - where torch.func.functional_call puts its tensors too
            places = [(held, name) for name, parameter in held.items() if parameter is not None]
            self._all += places
            if dtype is not None and is_cast(part):
                self._cast += places

    @contextmanager
    def cast(self) -> Iterator[None]:
        """One cast for all passes inside; gradients reach the master weights, each as soon as it is known."""
        weights = list(dict.fromkeys(held[name] for held, name in self._cast))
        if self._together and self._dtype is not None:
            copies = dict(zip(weights, _CastTogether.apply(self._dtype, *weights), strict=True))  # pyright: ignore[reportArgumentType]
        else:
            copies = {weight: _cast(weight, self._dtype) for weight in weights}
        with _replaced(self._cast, [copies[held[name]] for held, name in self._cast]):
            yield

    @contextmanager
    def detached(self) -> Iterator[None]:
        """No weight asks for a gradient inside: neither autograd nor a compiled graph computes one."""
        with _replaced(self._all, [held[name].detach() for held, name in self._all]):
            yield


class WeightsInPlace:
    """`StepWeights` of an engine that moves weights about while layers run, so that no other tensor can stand for them.

    Every pass casts its weights anew, and an attack's graph keeps what the weights' gradients would need.
    """

    cast = detached = staticmethod(nullcontext)


class _CastTogether(torch.autograd.Function):
    """`_cast` of many weights by torch's multi-tensor copy."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        copies = [torch.empty_like(weight, dtype=dtype, memory_format=_layout(weight)) for weight in weights]
        torch._foreach_copy_(copies, weights)  # pyright: ignore[reportPrivateImportUsage]
        # Else autograd would compute the gradients of frozen weights.
        ctx.mark_non_differentiable(*(c for c, w in zip(copies, weights, strict=True) if not w.requires_grad))
        return tuple(copies)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        wide = [None if g is None else torch.empty_like(g, dtype=d) for g, d in zip(grads, ctx.dtypes, strict=True)]
        pairs = [(target, source) for target, source in zip(wide, grads, strict=True) if target is not None]
        if pairs:
            torch._foreach_copy_([t for t, _ in pairs], [s for _, s in pairs])  # pyright: ignore[reportPrivateImportUsage, reportArgumentType]
        return None, *wide


def _cast(weight: Tensor, dtype: torch.dtype | None) -> Tensor:
    return weight.to(dtype, memory_format=_layout(weight))


def _layout(weight: Tensor) -> torch.memory_format:
    """Channels last where that means something: engines that flatten weights keep them in plain order."""
    return torch.channels_last if weight.ndim == 4 else torch.preserve_format


@contextmanager
def _replaced(places: Sequence[_Place], tensors: Sequence[Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters, for as many passes as come."""
    before = [held[name] for held, name in places]
    _put(places, tensors)
    try:
        yield
    finally:
        _put(places, before)


def _put(places: Sequence[_Place], tensors: Sequence[Tensor]) -> None:
    for (held, name), tensor in zip(places, tensors, strict=True):
        held[name] = tensor


def amplified(net: Callable[[Tensor], Tensor], *, per_sample: bool) -> Callable[[Tensor], Tensor]:
    """A net in fp16 whose gradient, with respect to the pixels, isn't lost on its way from the logits.

    Behind the logits the gradient is multiplied by a power of two that lifts its largest number to 256, and divided by
    it again, in float32, at the pixels. Numbers that overflow nonetheless stay finite, and those that are none become
    0: an attack stands still there. The factors are found on the device, anew in every backward pass.

    Args:
        net: from pixels [B,3,H,W] to logits [B,C].
        per_sample: a factor for each sample, which is right where no sample's logits depend on another's pixels; else
            one for the batch, in which a sample much surer of itself than the others may still lose its gradient.
    """

    def run(pixels: Tensor) -> Tensor:
        factor = torch.ones(len(pixels) if per_sample else 1, 1, device=pixels.device)
        logits = net(_Divide.apply(pixels, factor))  # pyright: ignore[reportArgumentType]
        return _Multiply.apply(logits.float(), factor)  # pyright: ignore[reportReturnType]

    return run


class _Multiply(torch.autograd.Function):
    """Identity; backward picks the factors, [B,1] or [1,1], and multiplies by them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return logits.view_as(logits)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        largest = grads[0].abs().amax(1, keepdim=True)
        if len(ctx.factor) == 1:
            largest = largest.amax(0, keepdim=True)
        ctx.factor.copy_(torch.exp2(torch.log2(_HEADROOM / largest.clamp_min(1e-30)).floor()))
        return grads[0] * ctx.factor, None


class _Divide(torch.autograd.Function):
    """Identity; backward divides by the factors that `_Multiply` picked."""

    @staticmethod
    def forward(ctx: Any, pixels: Tensor, factor: Tensor) -> Tensor:
        ctx.factor = factor
        return pixels.view_as(pixels)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (grads[0] / ctx.factor.view(-1, 1, 1, 1)).nan_to_num_(0.0), None
