"""Batch normalisation over the samples of all ranks: training then doesn't depend on how a batch is dealt to them.

torch's SyncBatchNorm refuses CPU tensors, and its converter drops the activation of timm's BatchNormAct2d. Here a layer
stays the object that it is, with its parameters, buffers, activation and place in the net; only its class becomes one
of the subclasses below, as torch itself turns a lazy layer into a plain one. So state-dict keys, isinstance, deepcopy
and lists of modules made before (`AttackMode`) all stay right.

Tested with gloo on CPUs; nothing in it is gloo's own, but nccl is untested.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from arat_dist.errors import UserError


class Statistics(NamedTuple):
    """Of one batch over all ranks: mean [C], biased variance [C], number of values of each channel [1]."""

    mean: Tensor
    var: Tensor
    num_values: Tensor


class _AcrossRanks(_BatchNorm):
    """Batch statistics over all ranks in training mode; with one rank, or in evaluation mode, exactly the plain layer.

    Every rank must run the same layers in training mode, forward and backward, in the same order.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (torch's name)
        """Normalise [B,C,...]; ranks may hold different numbers of samples."""
        if not (self.training and num_ranks() > 1):
            return super().forward(input)
        self._check_input_dim(input)
        statistics = global_statistics(input)
        if self.track_running_stats:
            self._track(statistics)
        return self._finish(_Normalise.apply(input, self.weight, self.bias, statistics, self.eps))

    def _track(self, statistics: Statistics) -> None:
        """Move the running statistics as torch does, towards the unbiased variance."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        mean, var, num_values = statistics
        self.running_mean.lerp_(mean, momentum)
        self.running_var.lerp_(var * (num_values / (num_values - 1)), momentum)

    def _finish(self, x: Tensor) -> Tensor:
        """What the layer does after normalising."""
        return x


class SyncedBatchNorm1d(_AcrossRanks, nn.BatchNorm1d):
    """BatchNorm1d over all ranks."""


class SyncedBatchNorm2d(_AcrossRanks, nn.BatchNorm2d):
    """BatchNorm2d over all ranks."""


class SyncedBatchNorm3d(_AcrossRanks, nn.BatchNorm3d):
    """BatchNorm3d over all ranks."""


class SyncedBatchNormAct2d(_AcrossRanks, BatchNormAct2d):  # pyright: ignore[reportIncompatibleMethodOverride]
    """timm's BatchNormAct2d over all ranks."""

    act: nn.Module
    drop: nn.Module

    def _finish(self, x: Tensor) -> Tensor:
        return self.act(self.drop(x))


SYNCED: dict[type[nn.Module], type[_AcrossRanks]] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
    BatchNormAct2d: SyncedBatchNormAct2d,
}
"""The class that each kind of BatchNorm becomes."""


def synchronise_norms(module: nn.Module) -> None:
    """Let every BatchNorm of a module tree, those in split norms included, take its batch statistics over all ranks.

    In place; done before or after norms are split, and before any rank runs a pass.

    Raises:
        UserError: a kind of BatchNorm that has no such version.
    """
    for path, norm in module.named_modules():
        if not isinstance(norm, _BatchNorm) or isinstance(norm, _AcrossRanks):
            continue
        if type(norm) not in SYNCED:
            raise UserError(
                f"train.sync_norms: true: {path or 'the net'} is a {type(norm).__name__}, whose statistics can't span "
                "workers; false would be right"
            )
        norm.__class__ = SYNCED[type(norm)]


@torch.no_grad()
def global_statistics(x: Tensor) -> Statistics:
    """Statistics of x [B,C,...] over all ranks, in at least float32; carries no gradient.

    Each rank's own mean and variance are joined (Chan et al. 1979): the difference E[x^2] - E[x]^2 would leave few
    right digits where the mean is large. Every rank gets the same bits.
    """
    # BatchNorm's own kernel: torch.var_mean takes 4 to 40 times as long on a CPU. The buffer, which momentum 0 leaves
    # alone, has it answer in float32 for bf16.
    unused = x.new_zeros(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    mean, var = torch.batch_norm_update_stats(x, unused, unused, 0.0)
    own = torch.cat([mean, var, mean.new_full((1,), x.numel() / len(mean))])
    gathered = [torch.empty_like(own) for _ in range(num_ranks())]
    dist.all_gather(gathered, own)
    means, variances, counts = torch.stack(gathered).split([len(mean), len(mean), 1], dim=1)  # [R,C], [R,C], [R,1]
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    var = (shares * (variances + (means - mean).square())).sum(0)
    return Statistics(mean, var, counts.sum(0))


class _Normalise(torch.autograd.Function):
    """y = weight * x_hat + bias with x_hat = (x - mean) / std, where mean and std depend on every rank's x.

    The gradient of the sum of all ranks' losses, g being that of y:

        dx = weight / std * (g - E[g] - x_hat * E[g * x_hat])        E over all ranks' values

    Weight and bias get this rank's own sums, as any layer's do: DDP joins them.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, statistics: Statistics, eps: float
    ) -> Tensor:
        mean, var, num_values = statistics
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), num_values)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, weight, mean, inverse_std, num_values = ctx.saved_tensors
        # The fused kernel for the two sums over this rank's values, of g * x_hat and of g; neither depends on a weight.
        _, sum_gx, sum_g = torch.ops.aten.native_batch_norm_backward(
            grad, x, inverse_std, None, None, mean, inverse_std, True, ctx.eps, [False, True, True]
        )
        sums = torch.stack([sum_g, sum_gx])
        dist.all_reduce(sums)
        mean_g, mean_gx = sums / num_values
        scale = inverse_std if weight is None else inverse_std * weight
        slope = -scale * inverse_std * mean_gx
        dx = _affine(x, mean, slope).add_(_affine(grad, mean_g, scale))
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        return dx, sum_gx if needs_weight else None, sum_g if needs_bias else None, None, None


def _affine(x: Tensor, centre: Tensor, scale: Tensor) -> Tensor:
    """(x - centre) * scale with [C] each, by the one kernel that takes bf16 values with float32 factors uncopied."""
    # Not by torch.nn.functional, which refuses an eps of 0 before torch 2.14.
    return torch.batch_norm(x, scale, None, centre, torch.ones_like(centre), False, 0.0, 0.0, False)


def num_ranks() -> int:
    """Ranks that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
