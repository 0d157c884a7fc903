"""What watches over the fake GPU sees what it is there for, and nothing else: else the other tests here say nothing."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fake_gpu import GPU
from torch import Tensor
from watch import Findings, Watch

Work = Callable[[Tensor], Any]

WAITS: dict[str, Work] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 0).all()),
    "int": lambda x: int(x.argmax()),
    "equal": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "mask": lambda x: x[x > 0],
    "mask of rows": lambda x: x[x[:, 0] > 0, 1:],
    "write by a mask": lambda x: x.index_put_((x > 0,), x.new_zeros(())),
    "index of the host": lambda x: x[torch.tensor([0, 1])],
    "cpu": lambda x: x.cpu(),
    "queued into plain memory": lambda x: torch.empty(3, 4).copy_(x, non_blocking=True),
    "from the host": lambda x: x.copy_(torch.ones(3, 4)),
    "to": lambda x: torch.ones(3, 4).to(GPU),
    "numbers": lambda x: torch.tensor([1.0, 2.0], device=GPU),
    "new numbers": lambda x: x.new_tensor([1.0, 2.0]),
    "write a number into one place": lambda x: x.__setitem__((0, 0), 3.0),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "synchronize an event": lambda x: torch.cuda.Event().synchronize(),
    "in a backward pass": lambda x: ItemInBackward.apply(x.clone().requires_grad_()).sum().backward(),
}
"""What makes the host wait once for the GPU, from x [3,4] on it."""

MIXES: dict[str, Work] = {
    "add": lambda x: x + torch.ones(4),
    "cat": lambda x: torch.cat([x, torch.ones(3, 4)]),
    "stack of numbers": lambda x: torch.stack([x.sum(), torch.tensor(1.0)]),
    "where": lambda x: torch.where(x > 0, x, torch.ones(3, 4)),
    "linear": lambda x: F.linear(x, torch.ones(2, 4)),
    "matmul": lambda x: x @ torch.ones(4, 2),
    "foreach": lambda x: torch.ops.aten._foreach_add_.List([x, x], [torch.ones(3, 4), x]),
    "index of the GPU into the host": lambda x: torch.ones(3, 4)[x.argmax(1)],
    "values by an index": lambda x: x.index_put_((x.argmax(0),), torch.ones(4, 4)),
}
"""What a GPU refuses."""

FINE: dict[str, Work] = {
    "numbers of Python": lambda x: x.mul_(2).add_(0.5).clamp(0, 1)[0, 0].fill_(3.0),
    "a number of the host": lambda x: x * torch.tensor(2.0),
    "write a number into a row": lambda x: x.__setitem__(0, 3.0),
    "write a number by a mask": lambda x: x.__setitem__(x > 0, 3.0),
    "queued to the GPU": lambda x: torch.ones(3, 4).to(GPU, non_blocking=True),
    "queued into pinned memory": lambda x: torch.empty_like(x, device="cpu", pin_memory=True).copy_(
        x, non_blocking=True
    ),
    "queued into new memory": lambda x: x.to("cpu", non_blocking=True),
    "index of the GPU": lambda x: x[x.argmax(1)],
    "work of the host": lambda x: torch.arange(5)[torch.arange(5) > 2].sum().item(),
    "a pass": lambda x: F.cross_entropy(F.linear(x, x), x.argmax(1)),
}
"""What goes on without a wait."""


class ItemInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return gradient * gradient.sum().item()


def seen(kind: str, name: str) -> Findings:
    with Watch():
        x = torch.ones(3, 4).to(GPU)
    with Watch() as watch:
        globals()[kind][name](x)
    return watch.found


@pytest.mark.parametrize("name", WAITS)
def test_a_wait_is_seen(on_fake_gpu, name):
    assert len(on_fake_gpu(seen, "WAITS", name).waits) == 1


@pytest.mark.parametrize("name", MIXES)
def test_mixed_devices_are_seen(on_fake_gpu, name):
    with pytest.raises(RuntimeError, match="device"):
        on_fake_gpu(seen, "MIXES", name)


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine_is_let_through(on_fake_gpu, name):
    assert not on_fake_gpu(seen, "FINE", name).waits


def count() -> Findings:
    with Watch():
        x = torch.ones(3, 4).to(GPU)
    with Watch() as watch:
        y = x.t()[1:].unsqueeze(0).expand(2, 3, 3).mul(2)
        torch.empty_like(y).add_(y.detach()[0, 0])
    return watch.found


def test_kernels_are_counted_and_views_are_not(on_fake_gpu):
    assert on_fake_gpu(count).kernels == {"mul": 1, "add_": 1}


def answers() -> dict[str, Any]:
    """What the host is told."""
    with Watch():
        x = torch.zeros(3, 4).to(GPU)
        return {
            "numbers": [
                x.sum().item(),
                int(x.argmax()),
                (x > 0).all().item(),
                (x > 0).any().item(),
                (x[0, 0] < 0).item(),
            ],
            "host": (x + 1).cpu(),
            "list": x[0].tolist(),
            "sent": x.tolist(),
            "changed": x.add_(1).tolist(),
            "elements": [*x[x > 0].shape, *x.masked_select(x > 0).shape, *x.nonzero().shape],
        }


def test_the_host_is_told_what_lets_it_go_on(on_fake_gpu):
    said = on_fake_gpu(answers)
    assert said["numbers"] == [1.0, 1, True, False, False]
    assert type(said["host"]) is torch.Tensor
    assert said["list"] == [1.0] * 4
    assert said["sent"] == [[0.0] * 4] * 3
    assert said["changed"] == [[1.0] * 4] * 3
    assert said["elements"] == [12, 12, 12, 2]
