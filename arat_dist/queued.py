"""What was asked of a GPU and isn't done yet."""

from __future__ import annotations

import torch


def queued_event() -> torch.cuda.Event | None:
    """An event behind everything queued on the current stream, where this process uses a GPU."""
    if not torch.cuda.is_initialized():
        return None
    event = torch.cuda.Event(blocking=True)  # who waits for it sleeps: a spinning thread takes a loader's core
    event.record()
    return event
