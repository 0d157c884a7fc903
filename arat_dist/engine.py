"""Data parallelism behind one small protocol: the only file that knows of DDP (and of DeepSpeed, once it is here)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arat_dist.config import EngineConfig, OptimConfig
from arat_dist.errors import UserError
from arat_dist.objectives.base import Objective, Output
from arat_dist.optim import build_optimizer

_LEAST_LOSS_SCALE = 2.0**-10


@dataclass(frozen=True)
class Rank:
    """This process among those that train together.

    Attributes:
        index: 0-based rank.
        world_size: number of ranks.
        device: where this rank computes.
        node: 0-based index of its machine.
        local_index: 0-based index among the ranks of its machine.
        stop_wanted: whether this machine, or who started the run, asks for its end; cheap, asked at every step.
    """

    index: int
    world_size: int
    device: torch.device
    node: int = 0
    local_index: int = 0
    stop_wanted: Callable[[], bool] = lambda: False

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks for all: writes files, reports."""
        return self.index == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """What all ranks have, [world_size, ...], on every rank; small tensors of one shape."""
        rows = tensor.new_zeros(self.world_size, *tensor.shape)
        rows[self.index] = tensor
        return self.all_reduce(rows)


class Engine(Protocol):
    """One objective in training, whatever keeps its copies equal."""

    objective: Objective
    """The bare module: what the attack, the evaluation and the checkpoint see."""

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """The one wrapped forward of a step."""
        ...

    def no_sync(self) -> AbstractContextManager[None]:
        """Around a forward and backward pass whose gradients are only added up, to be joined by a later one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add gradients, averaged over the ranks."""
        ...

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by so that gradients fit into fp16; None in other precisions."""
        ...

    def is_finite(self) -> bool:
        """Whether the gradients fit into fp16; if not they are forgotten, for another try at half the loss scale.

        Always true, without a look, in other precisions.

        Raises:
            FloatingPointError: no loss scale helps.
        """
        ...

    def step(self) -> Tensor:
        """Update the weights and forget the gradients; without a look at the numbers from the host.

        Returns:
            2-norm of the whole gradient before clipping, 0-d, on the device, the same on every rank. Where it isn't
            finite nothing was updated, neither weights nor optimizer state.
        """
        ...

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Optimizer state, the same on every rank."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave."""
        ...


class DDPEngine:
    """DistributedDataParallel; on one rank the bare module, without a process group.

    Args:
        objective: the module; moved to the rank's device.
        optim: the recipe's section.
        rank: this process.
        scales_loss: multiply losses, as fp16 needs.
    """

    def __init__(self, objective: Objective, optim: OptimConfig, rank: Rank, *, scales_loss: bool = False):
        # Channels last, as the pictures come: the faster format for convolutions on CPUs and on tensor cores.
        self.objective = objective.to(rank.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._optimizer = build_optimizer(self.objective, optim)
        self._clip_norm = optim.clip_grad_norm
        self._scaler = torch.amp.GradScaler(rank.device.type, enabled=scales_loss)
        self._wrapped: nn.Module = self.objective
        if rank.world_size > 1:
            # Running statistics are per rank unless norms are synchronised; `average_statistics` joins them where used.
            self._wrapped = DistributedDataParallel(
                self.objective, forward_sync_buffers=False, gradient_as_bucket_view=True
            )

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """See `Engine`."""
        return self._wrapped(images, labels, keys)

    def no_sync(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self._wrapped.no_sync() if isinstance(self._wrapped, DistributedDataParallel) else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._scaler.scale(loss).backward()

    @property
    def loss_scale(self) -> float | None:
        """See `Engine`."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def is_finite(self) -> bool:
        """See `Engine`."""
        if (scale := self.loss_scale) is None:
            return True
        # Equal on all ranks: DDP has joined the gradients.
        self._scaler.unscale_(self._optimizer)
        if self._gradient_norm().isfinite().item():
            return True
        # Told the new scale: the scaler looks for infinities alone, not for a norm that overflows.
        self._scaler.update(scale * self._scaler.get_backoff_factor())
        self._optimizer.zero_grad(set_to_none=True)
        if scale < _LEAST_LOSS_SCALE:
            raise FloatingPointError("the gradient is no number at any loss scale; a lower optim.lr would be a start")
        return False

    def step(self) -> Tensor:
        """See `Engine`."""
        norm = self._gradient_norm()
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.objective.parameters(), self._clip_norm, norm)
        if self._scaler.is_enabled():
            self._scaler.step(self._optimizer)
            self._scaler.update()
        else:
            # What a scaler would set: the fused kernels look at it and leave everything as it is.
            self._optimizer.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def set_lr(self, lr: float) -> None:
        """See `Engine`."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        return self._optimizer.state_dict() | {"loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        self._optimizer.load_state_dict(state)
        if state.get("loss_scale"):  # empty in other precisions
            self._scaler.load_state_dict(state["loss_scale"])

    def _gradient_norm(self) -> Tensor:
        """2-norm of the whole gradient, 0-d."""
        return nn.utils.get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None])


def check_engine(config: EngineConfig) -> None:
    """Refuse what can't run yet (UserError)."""
    if config.kind != "ddp":
        raise UserError(f"engine.kind: {config.kind}: DeepSpeed can't train yet; ddp would be right")


def build_engine(
    objective: Objective, config: EngineConfig, optim: OptimConfig, rank: Rank, *, scales_loss: bool = False
) -> Engine:
    """The engine that the recipe names; see `DDPEngine`."""
    check_engine(config)
    return DDPEngine(objective, optim, rank, scales_loss=scales_loss)


@contextmanager
def averaged_statistics(module: nn.Module, rank: Rank) -> Iterator[None]:
    """Inside, the running statistics of every norm layer are their mean over the ranks; afterwards each rank's own.

    Every rank calls it: one all-reduce.
    """
    own = statistics_of(module)
    if rank.world_size > 1 and own.numel():
        set_statistics(module, rank.all_reduce(own.clone()) / rank.world_size)
    try:
        yield
    finally:
        if rank.world_size > 1 and own.numel():
            set_statistics(module, own)


def statistics_of(module: nn.Module) -> Tensor:
    """The running statistics of all norm layers in one row, a copy; empty where there are none."""
    statistics = [statistic.flatten() for statistic in _running_statistics(module)]
    return torch.cat(statistics) if statistics else torch.empty(0)


def set_statistics(module: nn.Module, row: Tensor) -> None:
    """Put back what `statistics_of` gave."""
    statistics = list(_running_statistics(module))
    for statistic, part in zip(statistics, row.split([s.numel() for s in statistics]), strict=True):
        statistic.copy_(part.view_as(statistic))


def _running_statistics(module: nn.Module) -> Iterator[Tensor]:
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            yield buffer
