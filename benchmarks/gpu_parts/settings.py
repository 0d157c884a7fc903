"""What a part is told: where it runs, on what, and how large."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

ROOT = Path(__file__).resolve().parents[2]
"""Of the repository."""


@dataclass(frozen=True)
class Settings:
    """Of one part.

    Attributes:
        device: a GPU or the CPU.
        small: everything shrunk, to be done by a CPU in a minute.
        archive: cifar10.tar.xz; None for the digits.
        out: folder of all parts' lines.
        scratch: folder for what isn't kept.
    """

    device: torch.device
    small: bool
    archive: Path | None
    out: Path
    scratch: Path

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """From the arguments of the command."""
        return cls(torch.device(args.device), args.small, args.data, args.out, args.scratch)
