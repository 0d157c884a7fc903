"""DeepSpeed ZeRO 0, 1, 2 and 3 behind the Engine protocol: the only file that knows of DeepSpeed.

DeepSpeed shards and joins; the rest is the same as under DDP: the optimizer is torch's fused one, precision is the
objective's own autocast region, so gradients are joined in float32, and the state that is saved names parameters. Its
checkpoints are not used: the universal one fails with SGD's momentum, and its loaders unpickle.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from arat_dist.config import OptimConfig
from arat_dist.engine import Held, Rank, like_parameter
from arat_dist.objectives.base import Objective, Output
from arat_dist.optim import begin_momentum, build_optimizer, set_lr

_BUCKET = 2**24
"""Most numbers that are joined at once: 64 MiB; DeepSpeed's own default sets 2 GB aside in every step."""
_HELD = -1
"""Stands for a layer at work, so that ZeRO-3 leaves the weights whole."""


class DeepSpeedEngine:
    """DeepSpeed ZeRO; `Engine` says what its methods do.

    Stages 2 and 3 join the gradients of every micro-batch, 0 and 1 once a step. With stage 3 attacks and passes use the
    sharded weights where they are: see `WeightsInPlace` for what that costs.

    Args:
        objective: the module; moved to the rank's device.
        stage: 0 to 3.
        optim: the recipe's section.
        rank: this process; alone, it makes a process group of its own.
    """

    def __init__(self, objective: Objective, stage: int, optim: OptimConfig, rank: Rank):
        deepspeed = _import_deepspeed(rank)
        # As DeepSpeed flattens and broadcasts them.
        self.objective = objective.to(rank.device).to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        self._stage, self._rank, self._clip_norm = stage, rank, optim.clip_grad_norm
        self._base = build_optimizer(objective, optim)
        self._base.state.clear()
        if stage == 3:
            objective.keep_weights_in_place()
        self._wrapped = _ReturnsLoss(objective)
        self._engine, *_ = deepspeed.initialize(
            model=self._wrapped,
            optimizer=self._base,
            config=_config(stage, num_weights=sum(p.numel() for p in objective.parameters())),
            dist_init_required=False,
        )
        self._optimizer: Any = self._engine.optimizer
        """DeepSpeed's, around torch's; torch's itself with stage 0."""
        if stage == 0:
            objective.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue] - after the broadcast
        if stage == 3:
            # `step` has the norm already; DeepSpeed's own costs a collective a group, and a wait of the host.
            self._optimizer._get_norm_groups = lambda: [torch.zeros(())]  # noqa: SLF001
        begin_momentum(self._base, self._shards)

    def __call__(self, images: Tensor, labels: Tensor, keys: Tensor) -> Output:
        """See `Engine`."""
        loss = self._engine(images, labels, keys)
        assert self._wrapped.output is not None
        out, self._wrapped.output = replace(self._wrapped.output, loss=loss), None
        return out

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """See `Engine`."""
        self._engine.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            self._engine.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor) -> None:
        """See `Engine`."""
        self._engine.backward(loss)

    @property
    def scales_loss(self) -> bool:
        """See `Engine`; fp16 is refused."""
        return False

    @property
    def loss_scale(self) -> float | None:
        """See `Engine`; fp16 is refused."""
        return None

    def is_finite(self) -> bool:
        """See `Engine`."""
        return True

    def step(self) -> Tensor:
        """See `Engine`."""
        gradients = self._gradients()
        norm = nn.utils.get_total_norm(gradients)
        if self._stage:
            # Each rank has its part of the whole; squares of float32 would overflow.
            norm = self._rank.all_reduce(norm.double().square()).sqrt().to(norm.dtype)
        if self._clip_norm is not None:
            # Never by NaN: ZeRO-3 keeps these tensors, and writes nothing to the padding at their end ever after.
            factor = (self._clip_norm / (norm + 1e-6)).clamp(max=1.0).nan_to_num(0.0)
            torch._foreach_mul_(gradients, factor)  # pyright: ignore[reportPrivateImportUsage] - as torch clips
        # The fused kernels look at it and leave everything as it is; the weights are then gathered as they were.
        self._base.found_inf = norm.isfinite().logical_not().float()  # pyright: ignore[reportAttributeAccessIssue]
        self._engine.step()
        return norm

    def set_lr(self, lr: float) -> None:
        """See `Engine`."""
        set_lr(self._base, lr)

    def gathered(self) -> AbstractContextManager[None]:
        """See `Engine`."""
        return self._whole_weights() if self._stage == 3 else nullcontext()

    def model_state(self) -> dict[str, Tensor]:
        """See `Engine`."""
        state = self.objective.state_dict(keep_vars=True)
        for key, tensor in state.items():
            if hasattr(tensor, "ds_id"):
                with _gathered([tensor]):  # one at a time: nowhere is there room for all
                    state[key] = tensor.detach().cpu().clone() if self._rank.is_first else tensor.detach()
            else:
                state[key] = tensor.detach()
        return state if self._rank.is_first else {}

    @torch.no_grad()
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """See `Engine`."""
        if self._stage == 3:
            self._engine.empty_partition_cache()
            for key, tensor in self.objective.state_dict(keep_vars=True).items():
                own: Any = tensor
                if hasattr(tensor, "ds_id"):
                    own.ds_tensor.copy_(self._own_part(own, state[key]))
                else:
                    own.copy_(state[key])
        else:
            self.objective.load_state_dict(state)
        if self._stage:
            self._optimizer.refresh_fp32_params()

    def state_dict(self) -> dict[str, Any]:
        """See `Engine`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_state()
        result: dict[str, dict[str, Tensor]] = {}
        for name, parameter, shard in self._trainable():
            entry = {}
            for key, value in self._base.state[shard].items():
                if self._stage and value.shape == shard.shape:
                    whole = safe_get_full_optimizer_state(parameter, key)
                    assert whole is not None
                    if self._rank.is_first:
                        entry[key] = whole.cpu()
                else:
                    entry[key] = value
            result[name] = entry
        return {"state": result if self._rank.is_first else {}, "loss_scale": None}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Engine`."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        entries = [(p, shard, state["state"].get(name, {})) for name, p, shard in self._trainable()]
        for parameter, shard, entry in entries:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for key, value in entry.items():
                if self._stage == 0 or value.shape != shape:
                    self._base.state[shard][key] = like_parameter(value, shard)
                elif key not in self._base.state[shard]:
                    self._base.state[shard][key] = torch.zeros_like(shard)
        self._link_state()
        for parameter, _, entry in entries if self._stage else ():
            for key, value in entry.items():
                if self._stage == 3 and value.shape == parameter.ds_shape:
                    safe_set_local_optimizer_state(parameter, self._own_part(parameter, value), key)
                elif self._stage < 3 and value.shape == parameter.shape:
                    safe_set_full_optimizer_state(parameter, value, key)

    def held(self) -> Held:
        """See `Engine`."""
        parameters: list[Any] = list(self.objective.parameters())
        weights = [p.data for p in parameters] + [p.ds_tensor.data for p in parameters if hasattr(p, "ds_tensor")]
        return Held(
            weights=[*weights, *(shard.data for shard in self._shards)],
            gradients=self._gradients(),
            optimizer_state=[value for entry in self._base.state.values() for value in entry.values()],
        )

    @property
    def _shards(self) -> list[Tensor]:
        """What torch's optimizer updates: with stage 0 the parameters, else this rank's flat part of each group."""
        if self._stage == 0:
            return [p for group in self._base.param_groups for p in group["params"]]
        name = "fp32_partitioned_groups_flat" if self._stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self._optimizer, name))

    def _trainable(self) -> Iterator[tuple[str, Any, Tensor]]:
        """Name and parameter, and the shard that some of it is in, on this rank or another."""
        if self._stage == 0:
            yield from ((name, p, p) for name, p in self.objective.named_parameters() if p.requires_grad)
            return
        groups = self._optimizer.fp16_groups if self._stage == 3 else self._optimizer.bit16_groups
        shard_of = {p: shard for group, shard in zip(groups, self._shards, strict=True) for p in group}
        yield from ((name, p, shard_of[p]) for name, p in self.objective.named_parameters() if p in shard_of)

    def _gradients(self) -> list[Tensor]:
        """With stage 0 all, joined; else this rank's part of them."""
        if self._stage == 0:
            return [p.grad for p in self.objective.parameters() if p.grad is not None]
        parts: Mapping[int, list[Tensor] | None] = self._optimizer.averaged_gradients
        return [gradient for part in parts.values() for gradient in part or ()]

    def _own_part(self, parameter: Any, value: Tensor) -> Tensor:
        """This rank's part of a whole tensor under ZeRO-3; zeros after the end."""
        size = parameter.ds_tensor.numel()
        part = value.flatten()[size * self._rank.index : size * (self._rank.index + 1)]
        return nn.functional.pad(part, (0, size - len(part)))

    def _link_state(self) -> None:
        """Tell ZeRO-1 and 2 of the optimizer's state, as they do themselves after their first step."""
        if self._stage in (1, 2) and self._base.state:
            self._optimizer._lazy_init_hp_params_optimizer_state()  # noqa: SLF001

    @contextmanager
    def _whole_weights(self) -> Iterator[None]:
        from deepspeed.runtime.zero.partitioned_param_coordinator import ZeRoTraceMode

        parameters: list[Any] = list(self.objective.parameters())
        # Passes inside are no part of the step whose course ZeRO-3 learns; ranks may make different numbers of them.
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        mode = "_PartitionedParameterCoordinator__trace_mode"
        before = getattr(coordinator, mode)
        with _gathered(parameters):
            setattr(coordinator, mode, ZeRoTraceMode.INVALID)
            for parameter in parameters:
                parameter.ds_active_sub_modules.add(_HELD)
            try:
                yield
            finally:
                setattr(coordinator, mode, before)
                for parameter in parameters:
                    parameter.ds_active_sub_modules.discard(_HELD)


class _ReturnsLoss(nn.Module):
    """The objective as DeepSpeed takes it: its hooks look for tensors in what a module returns."""

    def __init__(self, objective: Objective):
        super().__init__()
        self.objective = objective
        self.output: Output | None = None

    def forward(self, images: Tensor, labels: Tensor, keys: Tensor) -> Tensor:
        """Not through the objective's own call: there would be an `Output` between two hooks."""
        self.output = self.objective.forward(images, labels, keys)
        return self.output.loss


def _gathered(parameters: Iterable[Tensor]) -> AbstractContextManager[None]:
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters

    return GatheredParameters(list(parameters))


def _import_deepspeed(rank: Rank) -> Any:
    """DeepSpeed, told which device to use and to whom to talk, with a process group to work in."""
    # Read on import; without it DeepSpeed looks for accelerators and builds for the one that it finds.
    os.environ["DS_ACCELERATOR"] = rank.device.type
    # What it selects a device by: not the rank's place on its machine where each rank sees one GPU alone.
    os.environ["LOCAL_RANK"] = str(rank.device.index or 0 if rank.device.type == "cuda" else rank.local_index)
    if not dist.is_initialized():
        assert rank.world_size == 1, "the launcher makes the process group of several ranks"
        backend = "nccl" if rank.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    import deepspeed
    import deepspeed.ops

    # Would be compiled, for a minute, at the first start on a CPU; it serves inference alone.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logger = logging.getLogger("DeepSpeed")
    logger.handlers.clear()  # writes to stdout
    logger.propagate = True
    logger.setLevel(logging.WARNING)
    logger.addFilter(_is_news)
    # What it calls:
    warnings.filterwarnings("ignore", r".*torch\.distributed\.\w+` is deprecated", FutureWarning)
    return deepspeed


def _is_news(record: logging.LogRecord) -> bool:
    """DeepSpeed warns of every optimizer that it doesn't list, SGD among them."""
    return "untested optimizer" not in record.getMessage()


def _config(stage: int, num_weights: int) -> dict[str, Any]:
    bucket = min(_BUCKET, 2 * -(-num_weights // 2))
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket,
        "allgather_bucket_size": bucket,
        # Would put another F.linear in torch's place, for the whole process.
        "memory_efficient_linear": False,
    }
    if stage in (1, 2):
        zero["compute_grad_norm"] = False  # `step` has it
    return {
        # Sizes mean nothing here: losses come weighed.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": zero,
        "gradient_clipping": 0.0,  # `step` clips
        "zero_allow_untested_optimizer": True,
        "timers": {"throughput": {"enabled": False}},  # would wait for the device in every step
    }
