"""The command for machines with a GPU, on the CPU: its files, its processes, and that its checks find what is wrong.

`benchmarks/gpu.py --device cpu --small` itself is run by .ci/run.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tape import TapeRecorder
from toys import is_installed

from arat_dist.balls import LinfBall
from arat_dist.cuda_graph import GraphedStep
from arat_dist.data.beton_table import read_contents
from arat_dist.data.fallback import FallbackLoader
from arat_dist.data.manifest import check_beton, check_figures
from arat_dist.objectives.arat import ARAT
from arat_dist.step import TrainStep
from benchmarks.gpu_parts import beton_file, smoke, steps
from benchmarks.gpu_parts.beton_file import Stored, write_beton
from benchmarks.gpu_parts.journal import RESTART, Journal, Skipped, WrongError, read_lines
from benchmarks.gpu_parts.settings import Settings
from benchmarks.gpu_parts.step import CountFlops
from benchmarks.gpu_parts.supervise import PartResult, run_part
from benchmarks.gpu_parts.table import table

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
needs_ffcv = pytest.mark.skipif(not is_installed("ffcv"), reason="needs FFCV")


# Files ---------------------------------------------------------------------------------------------------------------


def noise(count: int, side: int = 32) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8))


def raw(picture: np.ndarray, label: int) -> Stored:
    return Stored(picture.tobytes(), picture.shape[0], picture.shape[1], False, label)


def test_a_beton_has_its_pictures_and_a_manifest_that_holds(tmp_path):
    pictures, path = noise(7), tmp_path / "seven.beton"
    write_beton(path, [raw(picture, i % 3) for i, picture in enumerate(pictures)], ("ant", "bee", "cow"), "noise")
    check_figures(path, check_beton(path, hash=True))
    with FallbackLoader(path, batch_size=7, image_size=32) as loader:
        (batch,) = loader.iterate([np.arange(7)])
    assert batch.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert np.array_equal(batch.images.permute(0, 2, 3, 1).numpy(), np.stack(pictures))


def test_no_picture_crosses_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(beton_file, "_PAGE_BYTES", page := 10_000)
    write_beton(tmp_path / "pages.beton", [raw(picture, 0) for picture in noise(10)], ("ant",), "noise")
    start, stop = read_contents(tmp_path / "pages.beton").table[:, :2].T
    assert ((start // page) == ((stop - 1) // page)).all()
    assert np.unique(start // page).size == 4  # three pictures of 3,072 bytes a page


@needs_ffcv
@pytest.mark.parametrize("side", [32, 160])
def test_ffcv_reads_it_as_its_own(tmp_path, side):
    """The bytes of a file that FFCV wrote, raw at 32 pixels and JPEG at 160, written anew: the same pixels."""
    from toys import BlotchSource

    from arat_dist.data.beton import BetonLoader
    from arat_dist.data.beton_writer import write_beton as write_with_ffcv
    from arat_dist.data.ffcv_import import Reader

    class Source(BlotchSource):
        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            picture, label = super().__getitem__(index)
            return np.ascontiguousarray(picture.repeat(side // 16, 0).repeat(side // 16, 1)), label

    theirs, ours = tmp_path / "theirs.beton", tmp_path / "ours.beton"
    manifest = write_with_ffcv(Source(9, 0), theirs)
    data, (rows, labels) = theirs.read_bytes(), read_contents(theirs)
    stored = [
        Stored(data[start:stop], height, width, bool(is_jpeg), int(label))
        for (start, stop, height, width, is_jpeg), label in zip(rows.tolist(), labels, strict=True)
    ]
    again = write_beton(ours, stored, manifest.class_names, "theirs")
    assert again.raw_share == manifest.raw_share == float(side == 32)

    readers = Reader(str(theirs)), Reader(str(ours))
    assert readers[0].field_names == readers[1].field_names
    assert [type(handler) for handler in readers[0].handlers.values()] == [
        type(handler) for handler in readers[1].handlers.values()
    ]
    batches = []
    for path in (theirs, ours):
        with BetonLoader(path, batch_size=9, image_size=side) as loader:
            (batch,) = ([t.clone() for t in batch] for batch in loader.iterate([np.arange(9)]))
        batches.append(batch)
    assert all(torch.equal(one, other) for one, other in zip(*batches, strict=True))


# Cases and processes -------------------------------------------------------------------------------------------------


def fails(error: Exception) -> Callable[[], dict[str, Any]]:
    def work() -> dict[str, Any]:
        raise error

    return work


def test_a_case_that_fails_is_written_at_once_and_the_next_goes_on(tmp_path):
    path = tmp_path / "part.jsonl"
    journal = Journal(path, 60)
    journal.run("breaks", fails(ValueError("first line\nsecond line")))
    assert [line["status"] for line in read_lines(path)] == ["begin", "failed"]
    journal.run("is wrong", fails(WrongError("too large", error=0.5)))
    journal.run("makes no sense", fails(Skipped("not here")))
    journal.run("is right", lambda: {"value": 1})
    lines = [line for line in read_lines(path) if line["status"] != "begin"]
    for line in lines:
        del line["seconds"]
    assert lines == [
        {"case": "breaks", "status": "failed", "message": "ValueError: first line"},
        {"case": "is wrong", "status": "failed", "message": "too large", "error": 0.5},
        {"case": "makes no sense", "status": "skipped", "message": "not here"},
        {"case": "is right", "status": "ok", "value": 1},
    ]
    assert Journal(path, 60).run("is right", fails(AssertionError("done already")))["value"] == 1
    assert Journal(path, 0).run("too late", fails(AssertionError("no time")))["status"] == "no time"


SCRIPT = f"""
import os, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from benchmarks.gpu_parts.journal import Journal

def broken():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

journal = Journal(Path(sys.argv[1]), float(sys.argv[2]), is_usable=lambda: False)
"""
EVENTFUL = """
journal.run("first", dict)
journal.run("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV))
journal.run("leaves the device broken", broken)
journal.run("hangs", lambda: time.sleep(600), limit_s=0.3)
journal.run("last", dict)
"""
ENDLESS = """
journal.run("first", dict)
journal.run("is cut", lambda: time.sleep(600), limit_s=600)
"""


def run_script(tmp_path: Path, cases: str, seconds: float) -> PartResult:
    journal, log = tmp_path / "part.jsonl", tmp_path / "gpu.log"

    def command(left: float) -> list[str]:
        return [sys.executable, "-c", SCRIPT + cases, str(journal), str(left)]

    return run_part("part", command, journal, log, seconds)


def test_a_crash_a_broken_device_and_a_hang_stop_nothing_else(tmp_path):
    result = run_script(tmp_path, EVENTFUL, 120)
    assert {case["case"]: case["status"] for case in result.cases} == {
        "first": "ok",
        "crashes": "failed",
        "leaves the device broken": "failed",
        "hangs": "timed out",
        "last": "ok",
    }
    assert "SIGSEGV" in result.cases[1]["message"]
    assert "illegal memory access" in result.cases[2]["message"]
    assert result.status == "failed"
    assert RESTART not in (0, 1)


def test_a_part_is_cut_at_its_limit_and_keeps_what_it_has(tmp_path):
    result = run_script(tmp_path, ENDLESS, 6)
    assert [case["case"] for case in result.of_status("ok")] == ["first"]
    message = "cut off: the part's time was over"
    assert result.of_status("timed out") == [{"case": "is cut", "status": "timed out", "message": message}]
    assert result.status == "timed out"
    assert 6 <= result.seconds < 60


def test_a_part_that_gets_to_nothing_is_timed_out(tmp_path):
    sleep = [sys.executable, "-c", "import time; time.sleep(600)"]
    result = run_part("part", lambda _: sleep, tmp_path / "part.jsonl", tmp_path / "gpu.log", 0.1)
    assert result.status == "timed out"


def test_a_part_that_cannot_start_is_said(tmp_path):
    result = run_part(
        "part", lambda _: [sys.executable, "-c", "1/0"], tmp_path / "part.jsonl", tmp_path / "gpu.log", 60
    )
    assert result.status == "failed"
    assert "exit status 1" in result.cases[0]["message"]
    assert "ZeroDivisionError" in (tmp_path / "gpu.log").read_text()


# The command ---------------------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *arguments]
    return subprocess.run(line, capture_output=True, text=True, env=env, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    done = command("--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("--device cuda: no GPU can be used: ")


def test_a_part_gives_a_table_and_files_and_its_failures_the_exit_status(tmp_path):
    """Of part feed, the quickest: right as it is; wrong where there is no time for it."""
    done = command("--device", "cpu", "--small", "--part", "feed", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "feed: OK" in done.stdout
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["card"] == "cpu"
    assert result["torch"] == torch.__version__
    assert result["parts"]["feed"]["status"] == "ok"
    assert all(case["status"] == "ok" for case in result["parts"]["feed"]["cases"])
    rates = [line["images_per_second"] for line in read_lines(tmp_path / "feed.jsonl") if "images_per_second" in line]
    assert len(rates) >= 2
    assert min(rates) > 0
    done = command("--device", "cpu", "--small", "--part", "feed", "--out", str(tmp_path), "--minutes", "0.05")
    assert done.returncode == 1
    assert "feed: TIMED OUT" in done.stdout


def test_the_table_says_what_failed_and_what_time_was_too_short_for():
    cases = [
        {"case": "a", "status": "ok", "seconds": 1.0, "loss_error": 1e-3},
        {"case": "b", "status": "failed", "seconds": 1.0, "message": "loss error 0.5 (0.01 allowed)"},
        {"case": "c", "status": "no time", "seconds": 0.0},
    ]
    text = table({"card": "H100", "driver": None}, [PartResult("smoke", "failed", 3.0, 60.0, cases)])
    assert "card H100" in text
    assert "driver" not in text
    assert "smoke: FAILED  3 of 60 s  1 right, 1 wrong, 1 not reached" in text
    assert "FAILED b: loss error 0.5 (0.01 allowed)" in text
    assert "no time for: c" in text


# The checks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path) -> Settings:
    return Settings(CPU, small=True, archive=None, out=tmp_path, scratch=tmp_path)


@pytest.fixture
def taped(monkeypatch) -> list[TapeRecorder]:
    """Steps replayed as a CUDA graph would replay them, on the CPU."""
    recorders: list[TapeRecorder] = []

    def build_step(engine: Any, recipe: Any, _: Any) -> Any:
        if not recipe.train.cuda_graph:
            return TrainStep(engine)
        recorders.append(TapeRecorder())
        return GraphedStep(TrainStep(engine, on_device=True), recorders[-1])

    monkeypatch.setattr(steps, "build_step", build_step)
    return recorders


@pytest.mark.parametrize(("method", "graphed"), [("arat", True), ("trades", True), ("standard", False)])
def test_right_steps_pass(small, taped, method, graphed):
    recipe = steps.with_mode(smoke.smoke_recipe(method, "fp32", small), compiled=False, graphed=graphed)
    values = smoke.compare_with_host(recipe, CPU)
    assert values["gradient_error"] < 0.01
    if graphed:
        assert taped[0].num_replays == 2
    else:
        assert "attack_gain" not in values


ASCEND = LinfBall.ascend


def wrong(small: Settings, *, graphed: bool = False) -> str:
    recipe = steps.with_mode(smoke.smoke_recipe("arat", "fp32", small), compiled=False, graphed=graphed)
    with pytest.raises(WrongError) as caught:
        smoke.compare_with_host(recipe, CPU)
    return str(caught.value)


def test_an_attack_that_leaves_the_ball_is_found(small, monkeypatch):
    monkeypatch.setattr(LinfBall, "ascend", lambda *args: ASCEND(*args) + 1e-7)
    assert wrong(small).startswith("|x' - x| is 0.03137")


def test_an_attack_that_changes_the_clean_pictures_is_found(small, monkeypatch):
    perturb = ARAT.perturb_net

    def spoiled(self: ARAT, classifier: Any, pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        adversarial = perturb(self, classifier, pixels, *rest)
        pixels.mul_(1.0001)
        return adversarial

    monkeypatch.setattr(ARAT, "perturb_net", spoiled)
    assert wrong(small) == "the attack changed the clean pictures"


def test_an_attack_that_climbs_nothing_is_found(small, monkeypatch):
    """Its pictures are where it started: in the ball, and of no use."""

    def rests(self: LinfBall, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        return ASCEND(self, x, *rest) if x.dtype == torch.float64 else x.clone()

    monkeypatch.setattr(LinfBall, "ascend", rests)
    assert wrong(small).startswith("the attack gains ")


def test_a_term_of_another_weight_is_found(small, monkeypatch):
    build = steps.build_objective

    def heavier(recipe: Any) -> Any:
        objective: Any = build(recipe)
        if recipe.train.seed == 0:  # the device's; the host's recipe is made with another here
            objective.config = objective.config.model_copy(update={"gamma": 1.2 * objective.config.gamma})
        return objective

    monkeypatch.setattr(steps, "build_objective", heavier)
    on_host = steps.on_host

    def unspoiled(recipe: Any, state: Any) -> Any:
        return on_host(recipe.model_copy(update={"train": recipe.train.model_copy(update={"seed": 1})}), state)

    monkeypatch.setattr(steps, "on_host", unspoiled)
    monkeypatch.setattr(smoke, "on_host", unspoiled)
    assert "loss error" in wrong(small)


def test_a_graph_that_keeps_its_learning_rate_is_found(small, taped, monkeypatch):
    monkeypatch.setattr("arat_dist.engine.set_lr", lambda *_: None)
    assert "gradient error 1 " in wrong(small, graphed=True)


def test_a_step_that_is_not_captured_is_found(small, taped, monkeypatch):
    def record(self: TapeRecorder, work: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(TapeRecorder, "record", record)
    assert "could not be captured" in wrong(small, graphed=True)


def test_operations_of_a_step_are_counted():
    """Also where a gradient of the input alone is asked for, as attacks do."""
    conv = torch.nn.Conv2d(3, 8, 3, padding=1, bias=False)
    pixels = torch.rand(2, 3, 16, 16).requires_grad_()
    with CountFlops() as counter:
        torch.autograd.grad(conv(pixels).sum(), pixels)
    forward = 2 * 2 * 8 * 16 * 16 * 3 * 9
    assert counter.total == 2 * forward
