"""Operations that torch, or the graphs that torch.compile makes, do slowly on a CPU, written as what it does fast.

`with CpuOps(): net(x)` inside a compiled function takes these in the place of torch's own:

- BatchNorm: the compiler's version reads a channels-last batch one channel after another, and its backward pass takes
  three to eight times as long as the kernel of uncompiled code. Here sums are taken in two stages, over blocks of rows
  that stay in the first-level cache; the ReLU and the residual sum behind it join its loops.
- a convolution of patches (stride as long as the kernel): oneDNN's gradient with respect to the pixels takes five times
  its forward pass. Here it is one product.
- attention: the backward pass of torch's fused kernel takes four to six times its forward pass. Here it is five
  products, with the probabilities computed anew, so that they aren't kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_BLOCK = 8192
"""Numbers of a block of rows, about: 32 KiB in float32."""
_MOST_PROBABILITIES = 2**26
"""Above this number of them, attention stays with torch, which never holds them all."""


def on_cpu(net: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A net, to be compiled for a CPU, with this module's versions."""

    def run(x: Tensor) -> Tensor:
        with CpuOps():
            return net(x)

    return run


def is_traced_rightly() -> bool:
    """Whether torch.compile gets these operations' gradients right: 2.14 does, by 2.11 that of BatchNorm is wrong."""
    major, minor = torch.__version__.split(".")[:2]
    return (int(major), int(minor)) >= (2, 14)


class CpuOps(TorchFunctionMode):
    """Inside it, calls of torch that this module does better on a CPU are this module's."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass a call on, to this module where it has a version."""
        return _VERSIONS.get(func, func)(*args, **(kwargs or {}))


def batch_norm(
    input: Tensor,  # noqa: A002 (torch's name)
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """`torch.nn.functional.batch_norm`; this version for a channels-last batch [B,C,H,W] with its own statistics."""
    is_affine = weight is not None and bias is not None
    has_rows = input.ndim == 4 and input.numel() > input.shape[1]
    if not (training and is_affine and has_rows and input.is_contiguous(memory_format=torch.channels_last)):
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    y, mean, var = _Normalise.apply(input, weight, bias, eps)  # pyright: ignore[reportGeneralTypeIssues]
    if running_mean is not None and running_var is not None:
        num_values = input.numel() // input.shape[1]
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(var.to(running_var.dtype) * (num_values / (num_values - 1)), momentum)
    return y


class _Normalise(torch.autograd.Function):
    """x -> (x - mean) * scale + bias with scale = weight / std, and mean [C] and biased variance [C].

    With g the gradient of the result, x_hat = (x - mean) / std and E the mean over the batch and its pixels:

        dx = scale * (g - E[g] - x_hat * E[g * x_hat])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        values = _rows(x)
        # One pass over the values; measured from one of them, the difference of squares below keeps its digits.
        origin = values[0]
        offset = _sum(values - origin) / len(values)
        var = (_sum((values - origin).square()) / len(values) - offset.square()).clamp_min(0)
        mean, inverse_std = origin + offset, (var + eps).rsqrt()
        scale = weight * inverse_std
        # Stacked, factors are computed once a channel; the compiler would compute them anew for every value.
        factors = torch.stack([scale, bias - mean * scale])[:, :, None, None]
        ctx.save_for_backward(x, weight, mean, inverse_std)
        ctx.mark_non_differentiable(mean, var)
        return (_wide(x) * factors[0] + factors[1]).to(x.dtype), mean, var

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad, *_ = grads
        x, weight, mean, inverse_std = ctx.saved_tensors
        slopes = _rows(grad)
        sum_g = _sum(slopes)
        sum_gx = _sum(slopes * (_rows(x) - mean)) * inverse_std
        scale = weight * inverse_std
        along = -scale * inverse_std * sum_gx / len(slopes)
        factors = torch.stack([scale, along, -scale * sum_g / len(slopes) - along * mean])[:, :, None, None]
        dx = _wide(grad) * factors[0] + _wide(x) * factors[1] + factors[2]
        return dx.to(x.dtype), sum_gx, sum_g, None


def conv2d(
    input: Tensor,  # noqa: A002 (torch's name)
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """`torch.nn.functional.conv2d`; this version for patches that neither overlap nor leave pixels out."""
    if input.ndim != 4:
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    height, width = weight.shape[2:]
    is_cut = _pair(stride) == (height, width) and _pair(padding) == (0, 0) and _pair(dilation) == (1, 1) and groups == 1
    rows, columns = input.shape[2] // height, input.shape[3] // width
    if not is_cut or height * width == 1 or input.shape[2:] != (rows * height, columns * width):
        return F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    patches = input.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # [B,C,rows,h,columns,w]
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3)  # [B,rows,columns,h*w*C]
    return F.linear(patches, weight.permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **others: Any,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention`; this version without mask and dropout, 4 dimensions."""
    is_plain = attn_mask is None and dropout_p == 0 and not is_causal and not any(others.values())
    num_probabilities = query.numel() // query.shape[-1] * key.shape[-2]
    fits = query.ndim == 4 and query.shape[:2] == key.shape[:2] and key.shape == value.shape
    fits = fits and query.shape[-1] == key.shape[-1]
    if not (is_plain and fits and num_probabilities <= _MOST_PROBABILITIES):
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **others)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _Attention.apply(query, key, value)  # pyright: ignore[reportReturnType]


class _Attention(torch.autograd.Function):
    """softmax(q k^T / sqrt(d)) v for q, k, v of [B,heads,N,d]; keeps these three, as torch does, no probabilities."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value)
        return F.scaled_dot_product_attention(query, key, value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        query, key, value = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        # Two products in one: the first alone needs no gradient, and a compiled graph would keep its result from the
        # forward pass, one number a pair of tokens.
        scores, slopes = torch.stack([query, grad]) @ torch.stack([key, value]).mT
        # Of the rounded scores, so that a row sums to one.
        probabilities, slopes = (_wide(scores) * scale).softmax(-1), _wide(slopes)
        inner = (probabilities * slopes).sum(-1, keepdim=True)
        slopes = (probabilities * (slopes - inner) * scale).to(query.dtype)
        return slopes @ key, slopes.mT @ query, probabilities.to(query.dtype).mT @ grad


_VERSIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    F.batch_norm: batch_norm,
    F.conv2d: conv2d,
    F.scaled_dot_product_attention: scaled_dot_product_attention,
}


def _rows(x: Tensor) -> Tensor:
    """[B,C,H,W], channels-last -> [B*H*W,C], at least float32."""
    return _wide(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]))


def _wide(x: Tensor) -> Tensor:
    """At least float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _sum(rows: Tensor) -> Tensor:
    """[M,C] -> [C], in two stages."""
    num_rows, channels = rows.shape
    return rows.view(-1, _block_rows(num_rows, channels), channels).sum(1).sum(0)


@torch.compiler.assume_constant_result
def _block_rows(num_rows: int, channels: int) -> int:
    """The divisor of the number of rows that makes blocks of about the right size."""
    wish = math.log(_BLOCK / channels)
    low = [rows for rows in range(1, math.isqrt(num_rows) + 1) if num_rows % rows == 0]
    return min(low + [num_rows // rows for rows in low], key=lambda rows: abs(math.log(rows) - wish))


def _pair(setting: Any) -> tuple[int, int]:
    """A setting of a convolution, one number or two, as two (-1 where it is a word)."""
    if isinstance(setting, str):
        return (-1, -1)
    return (setting, setting) if isinstance(setting, int) else tuple(setting)
