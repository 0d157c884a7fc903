"""What two ranks agree on between steps: the largest wish, at the same step on both, each wish once."""

import time

import pytest
import torch
from ranks import on_two_ranks

from arat_dist.agreement import Agreement, Wish
from arat_dist.engine import Rank

SAVE_AT = 3
STEPS = 8


def steps_of(rank: Rank, monkeypatch: pytest.MonkeyPatch, *, otherwise_at: int | None = None) -> list[int]:
    """Wishes that were agreed on while a clock stands still but for step `SAVE_AT`; saved where one asks for it."""
    clock = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    agreement, agreed = Agreement(rank, 1.0), []
    for step in range(STEPS):
        # The others' clocks say nothing.
        clock += 61 if step == SAVE_AT or rank.index else 0
        agreed.append(int(wish := agreement.exchange()))
        if wish is Wish.SAVE or step == otherwise_at:
            agreement.saved()
    return agreed


def stops_of(rank: Rank) -> list[int]:
    """The second rank alone is asked to stop, in a step after which a checkpoint is due anyway."""
    asked = iter([False] * SAVE_AT + [True] * STEPS)
    wishes = Rank(rank.index, rank.world_size, rank.device, stop_wanted=lambda: next(asked) and rank.index == 1)
    agreement, agreed = Agreement(wishes, None), []
    for step in range(STEPS):
        agreed.append(int(agreement.exchange()))
        if step == SAVE_AT:
            agreement.saved()
    return agreed


def run_all(rank: Rank) -> dict[str, list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        clock = steps_of(rank, patch)
        meanwhile = steps_of(rank, patch, otherwise_at=SAVE_AT)
    return {"clock": clock, "meanwhile": meanwhile, "stops": stops_of(rank)}


def test_ranks_agree_a_step_later_and_a_wish_is_granted_once(tmp_path):
    later = SAVE_AT + 1
    for part in on_two_ranks(run_all, tmp_path):
        assert part["clock"] == [Wish.SAVE if step == later else Wish.NOTHING for step in range(STEPS)]
        # A checkpoint that was taken for another reason, while the wish travelled, answers it.
        assert part["meanwhile"] == [Wish.NOTHING] * STEPS
        assert part["stops"] == [Wish.NOTHING] * later + [Wish.STOP] * (STEPS - later)


def test_alone_a_wish_is_granted_at_once_and_once(monkeypatch):
    agreed = steps_of(Rank(0, 1, torch.device("cpu")), monkeypatch)
    assert agreed == [Wish.SAVE if step == SAVE_AT else Wish.NOTHING for step in range(STEPS)]
