"""Optimizer, parameter groups, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from timm.optim._param_groups import param_groups_weight_decay
from torch import Tensor, nn

from arat_dist.config import OptimConfig


def build_optimizer(module: nn.Module, config: OptimConfig, *, capturable: bool = False) -> torch.optim.Optimizer:
    """SGD or AdamW over the module's trainable parameters; norm layers, biases and what the net names decay-free.

    timm nets name such parameters themselves (positional embeddings, class tokens).

    Args:
        module: on its device.
        config: the recipe's section.
        capturable: the learning rate is a float32 tensor on the module's device, so that a CUDA graph reads it anew in
            every replay.
    """
    exempt = {
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        if callable(names := getattr(part, "no_weight_decay", None))
        for name in names()  # pyright: ignore[reportGeneralTypeIssues]
    }
    groups = param_groups_weight_decay(module, config.weight_decay, no_weight_decay_list=sorted(exempt))
    lr = torch.tensor(config.lr, device=next(module.parameters()).device) if capturable else config.lr
    if config.name == "adamw":
        is_on_gpu = isinstance(lr, Tensor) and lr.is_cuda
        adamw = torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True, capturable=is_on_gpu)
        # Else it warns of each step that runs uncaptured, as those before the capture do.
        adamw._warned_capturable_if_run_uncaptured = True  # noqa: SLF001  # pyright: ignore[reportAttributeAccessIssue]
        return adamw
    sgd = torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)
    begin_momentum(sgd, [p for group in sgd.param_groups for p in group["params"]])
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups; where it is a tensor, in place and without waiting for the device."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def begin_momentum(optimizer: torch.optim.Optimizer, parameters: Iterable[Tensor]) -> None:
    """Give SGD's momentum its zeros, where it has momentum: the first step is then what torch makes of no buffer.

    Its fused kernel would leave memory as it was found in the buffers if that first step isn't taken.
    """
    if optimizer.defaults.get("momentum"):
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in parameters})


def lr_at(step: int, config: OptimConfig, *, num_samples: int, batch_size: int, epochs: int) -> float:
    """Learning rate of a step.

    Args:
        step: 0-based step of the run.
        config: the recipe's section.
        num_samples: samples of an epoch.
        batch_size: the global batch size; epochs need not be whole numbers of batches.
        epochs: length of the run.

    The warm-up rises in a straight line and reaches `lr` at its last step. A milestone takes effect in the first step
    whose batch begins at or after that epoch's end.
    """
    warmup_steps = math.ceil(config.warmup_epochs * num_samples / batch_size)
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "step":
        passed = sum(step * batch_size >= milestone * num_samples for milestone in config.milestones)
        return config.lr * config.decay_factor**passed
    total_steps = -(-epochs * num_samples // batch_size)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
