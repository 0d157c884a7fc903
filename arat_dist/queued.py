"""What was asked of a GPU and isn't done yet."""

from __future__ import annotations

import torch


def queued_event() -> torch.cuda.Event | None:
    """An event behind everything queued on the current stream, where this process uses a GPU."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event()
    event.record()
    return event
