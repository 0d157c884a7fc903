"""Buffers of a step that wasn't taken, and the count of such steps."""

import torch
from torch import nn

from arat_dist.guard import BufferGuard


class OnDevice(torch.Tensor):
    """A number that the host doesn't look at, as on a GPU."""

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return torch.device("cuda")

    def __bool__(self) -> bool:
        raise AssertionError("the host has waited for the device")


def test_buffers_go_back_exactly_where_the_step_was_not_taken_and_nobody_looks():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2))
    guard = BufferGuard(net)
    for finite in (True, False, True):
        guard.remember()
        before = {name: value.clone() for name, value in net.named_buffers()}
        for i, (name, buffer) in enumerate(net.named_buffers()):
            buffer.add_(i + 1) if buffer.dtype == torch.int64 else buffer.fill_(torch.nan if i == 1 else i + 0.5)
            before[name] = buffer.clone() if finite else before[name]
        guard.restore_unless(torch.tensor(finite).as_subclass(OnDevice))
        for name, buffer in net.named_buffers():
            torch.testing.assert_close(buffer, before[name], rtol=0, atol=0, equal_nan=True, msg=f"{name}, {finite}")
