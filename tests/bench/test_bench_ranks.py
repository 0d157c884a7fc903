"""The benches of several processes: their figures belong together, and they leave nothing."""

import os
from multiprocessing import active_children
from typing import Any

import pytest
from toys import is_installed

from arat_dist.bench.engine import bench_engine
from arat_dist.bench.ranks import RankGroup
from arat_dist.bench.scale import bench_scale
from arat_dist.bench.step import step_recipe
from arat_dist.config import Recipe
from arat_dist.engine import Rank


@pytest.fixture
def others() -> set[Any]:
    """Processes that other tests keep for all of a session."""
    return set(active_children())


def recipe() -> Recipe:
    return step_recipe(
        "resnet10t",
        image_size=32,
        num_classes=3,
        batch_size=8,
        attack_steps=1,
        precision="fp32",
        overrides=[("model.args", {"channels": [16, 16, 32, 32], "stem_width": 16, "zero_init_last": False})],
    )


@pytest.mark.skipif(not is_installed("deepspeed"), reason="DeepSpeed is not installed")
def test_every_engine_is_measured(others):
    result = bench_engine(recipe(), workers=2, device="cpu", repeats=1, on_progress=lambda _: None)
    engines = {engine["engine"]: engine for engine in result["engines"]}
    assert list(engines) == ["ddp", "zero0", "zero1", "zero2", "zero3"]
    whole = engines["ddp"]["optimizer_state_mb"][0]
    assert whole == pytest.approx(engines["ddp"]["weights_mb"][0])  # a momentum for each weight
    for name, engine in engines.items():
        share = 1.0 if name in ("ddp", "zero0") else 0.5
        assert engine["optimizer_state_mb"] == pytest.approx([share * whole] * 2, rel=0.02), name
        assert engine["step_ms"] > 0
    assert set(active_children()) <= others


def test_two_workers_against_two_threads(others):
    result = bench_scale(recipe(), workers=2, device="cpu", steps=1, repeats=3, on_progress=lambda _: None)
    assert set(result["images_per_second"]) == {"2x1", "1x2"}
    assert len(result["ratios"]) == 3
    assert result["ratio"] == sorted(result["ratios"])[1] > 0
    assert set(active_children()) <= others


class Failing:
    def __init__(self, rank: Rank):
        self._rank = rank

    def __call__(self, how: str) -> int:
        if how == "dead":
            os._exit(3)
        if how == "wrong":
            raise LookupError("no such thing")
        return self._rank.index


@pytest.mark.parametrize(("how", "why"), [("wrong", "LookupError: no such thing"), ("dead", "a process .* died")])
def test_a_rank_that_fails_is_told(others, how, why):
    with RankGroup(1, 1, "cpu", Failing) as group:
        assert group("well") == [0]
        with pytest.raises(RuntimeError, match=why):
            group(how)
    assert set(active_children()) <= others
