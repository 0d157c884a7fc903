"""Data parallelism behind one small protocol, and DDP behind it; `zero` has DeepSpeed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from arat_dist.config import EngineConfig, OptimConfig, Recipe
from arat_dist.errors import UserError
from arat_dist.objectives.base import Objective, Output
from arat_dist.optim import build_optimizer, set_lr

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


@dataclass(frozen=True)
class Held:
    """The tensors that an engine holds on this rank, by what they are for; several may share memory."""

    weights: Sequence[Tensor]
    gradients: Sequence[Tensor]
    optimizer_state: Sequence[Tensor]


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
    def scales_loss(self) -> bool:
        """Whether losses are multiplied so that gradients fit into fp16."""
        ...

    @property
    def loss_scale(self) -> float | None:
        """What losses are multiplied by; None where they aren't. The host waits for the device."""
        ...

    def is_finite(self) -> bool:
        """Whether `step` may come; else the gradients didn't fit into fp16 and are forgotten: try half the loss scale.

        Where no loss scale helps it comes too, to be skipped. Always true, without a look, in other precisions.
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

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, the objective's weights are whole on every rank, for passes and for reading, not for writing.

        Every rank enters and leaves it; passes inside are each rank's own. Free of charge but under ZeRO-3, where it
        costs an all-gather of all weights and, inside, memory for them on every rank.
        """
        ...

    def model_state(self) -> dict[str, Tensor]:
        """The objective's whole state dict, of tensors that training goes on to change; every rank calls it.

        Under DeepSpeed the first rank has it and the others nothing; under ZeRO-3 weights come to its main memory.
        """
        ...

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `model_state` gave, under any engine and world size; every rank calls it, with all of it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizer, of tensors that training goes on to change; every rank calls it.

        Under DeepSpeed the first rank has it and the others nothing.

        Returns:
            "state", by the parameter's name what the optimizer keeps of it, each tensor whole (momentum_buffer; or
            exp_avg, exp_avg_sq and step), and "loss_scale", the scaler's, None or empty in other precisions than fp16.
        """
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave, under any engine and world size; every rank calls it, with all of it."""
        ...

    def held(self) -> Held:
        """What this rank holds; gradients between a backward pass and the step."""
        ...


class DDPEngine:
    """DistributedDataParallel; on one rank the bare module, without a process group.

    Args:
        objective: the module; moved to the rank's device.
        optim: the recipe's section.
        rank: this process.
        scales_loss: multiply losses, as fp16 needs.
        capturable: a CUDA graph will hold the steps; see `build_optimizer`.
    """

    def __init__(
        self,
        objective: Objective,
        optim: OptimConfig,
        rank: Rank,
        *,
        scales_loss: bool = False,
        capturable: bool = False,
    ):
        # Channels last, as the pictures come: the faster format for convolutions on CPUs and on tensor cores.
        self.objective = objective.to(rank.device).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self._optimizer = build_optimizer(self.objective, optim, capturable=capturable)
        self._clip_norm = optim.clip_grad_norm
        self._scaler = torch.amp.GradScaler(rank.device.type, enabled=scales_loss)
        self._scale_before_tries: float | None = None
        self._wrapped: nn.Module = self.objective
        if rank.world_size > 1:
            self._wrapped = _distributed(self.objective)

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
    def scales_loss(self) -> bool:
        """See `Engine`."""
        return self._scaler.is_enabled()

    @property
    def loss_scale(self) -> float | None:
        """See `Engine`."""
        return self._scaler.get_scale() if self._scaler.is_enabled() else None

    def is_finite(self) -> bool:
        """See `Engine`."""
        if not self.scales_loss:
            return True
        # Equal on all ranks: DDP has joined the gradients.
        self._scaler.unscale_(self._optimizer)
        if self._gradient_norm().isfinite().item():
            self._scale_before_tries = None
            return True
        scale = self._scaler.get_scale()
        self._scale_before_tries = self._scale_before_tries or scale
        if scale <= _LEAST_LOSS_SCALE:
            return True
        # Told the new scale: the scaler looks for infinities alone, not for a norm that overflows.
        self._scaler.update(scale * self._scaler.get_backoff_factor())
        self._optimizer.zero_grad(set_to_none=True)
        return False

    def step(self) -> Tensor:
        """See `Engine`."""
        norm = self._gradient_norm()
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self.objective.parameters(), self._clip_norm, norm)
        # The fused kernels look at it and leave everything as it is; the scaler would at infinities alone.
        self._optimizer.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
        self._optimizer.step()
        if self._scaler.is_enabled():
            # A step that is no number at any scale says nothing of scales.
            self._scaler.update(self._scale_before_tries)
            self._scale_before_tries = None
        self._optimizer.zero_grad(set_to_none=True)
        return norm

    def set_lr(self, lr: float) -> None:
        """See `Engine`."""
        set_lr(self._optimizer, lr)

    def gathered(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return nullcontext()

    def model_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        return self.objective.state_dict()

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        self.objective.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        named = self.objective.named_parameters()
        state = {name: dict(self._optimizer.state[p]) for name, p in named if p in self._optimizer.state}
        return {"state": state, "loss_scale": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        for name, parameter in self.objective.named_parameters():
            if entry := state["state"].get(name):
                self._optimizer.state[parameter] = {key: like_parameter(entry[key], parameter) for key in entry}
        if state["loss_scale"]:
            self._scaler.load_state_dict(state["loss_scale"])

    def held(self) -> Held:
        """See `Engine`."""
        parameters = list(self.objective.parameters())
        return Held(
            weights=[p.data for p in parameters],
            gradients=[p.grad for p in parameters if p.grad is not None],
            optimizer_state=[value for entry in self._optimizer.state.values() for value in entry.values()],
        )

    def _gradient_norm(self) -> Tensor:
        """2-norm of the whole gradient, 0-d."""
        return nn.utils.get_total_norm([p.grad for p in self.objective.parameters() if p.grad is not None])


def _distributed(objective: Objective) -> DistributedDataParallel:
    """DDP that starts all ranks from the first one's parameters and buffers, and leaves buffers alone afterwards.

    Running statistics are per rank unless norms are synchronised; `averaged_statistics` joins them.
    """
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters:  # from torch 2.14 on
        return DistributedDataParallel(objective, forward_sync_buffers=False, gradient_as_bucket_view=True)
    for buffer in objective.buffers():
        dist.broadcast(buffer, 0)
    return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)


def like_parameter(value: Tensor, parameter: Tensor) -> Tensor:
    """A copy of what an optimizer keeps of a parameter, on its device: fused kernels want its memory format too."""
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)


def check_engine(recipe: Recipe) -> None:
    """Refuse what the recipe's engine can't do (UserError)."""
    train, stage = recipe.train, recipe.engine.zero_stage
    if recipe.engine.kind == "ddp":
        return
    if train.precision == "fp16":
        raise UserError("train.precision: fp16: goes with engine.kind ddp; bf16 or fp32 would be right")
    for key, value in (
        ("train.compile", train.compile),
        ("train.grad_checkpointing", train.grad_checkpointing),
        ("track.diagnostics_every", recipe.track.diagnostics_every is not None),
    ):
        if stage == 3 and value:
            raise UserError(f"engine.zero_stage: 3: goes without {key}; 2 would be right")


def build_engine(
    objective: Objective,
    config: EngineConfig,
    optim: OptimConfig,
    rank: Rank,
    *,
    scales_loss: bool = False,
    capturable: bool = False,
) -> Engine:
    """The engine that the recipe names; see `DDPEngine` and `DeepSpeedEngine`."""
    if config.kind == "ddp":
        return DDPEngine(objective, optim, rank, scales_loss=scales_loss, capturable=capturable)
    from arat_dist.zero import DeepSpeedEngine  # DeepSpeed takes seconds

    assert not scales_loss, "check_engine refuses fp16"
    assert not capturable, "the recipe's checks refuse a CUDA graph"
    return DeepSpeedEngine(objective, config.zero_stage, optim, rank)


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
    """The running statistics of all norm layers in one row, a copy; empty, on the module's device, without any."""
    statistics = [statistic.flatten() for statistic in _running_statistics(module)]
    return torch.cat(statistics) if statistics else next(module.parameters()).new_empty(0)


def set_statistics(module: nn.Module, row: Tensor) -> None:
    """Put back what `statistics_of` gave."""
    statistics = list(_running_statistics(module))
    for statistic, part in zip(statistics, row.split([s.numel() for s in statistics]), strict=True):
        statistic.copy_(part.view_as(statistic))


def _running_statistics(module: nn.Module) -> Iterator[Tensor]:
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2] in ("running_mean", "running_var"):
            yield buffer
