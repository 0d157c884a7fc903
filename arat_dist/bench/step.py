"""`arat bench step`: the fused step against the least that the method costs, and against the step of research code.

The least, the floor, is (2K + 6) F for PGD with K steps: K forward passes and K backward passes to the input, each
worth a forward pass F; two training forwards, and two full backwards worth two each. F is one forward pass of the plain
backbone, without gradients, in training mode, its weights cast beforehand, eager or compiled, whichever is faster.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from arat_dist.bench.reference import ReferenceStep
from arat_dist.config import Recipe
from arat_dist.cuda_graph import NUM_WARMUPS, build_step, is_captured
from arat_dist.data.loader import Batch
from arat_dist.devices import device_name
from arat_dist.engine import Engine, Rank, build_engine
from arat_dist.errors import UserError
from arat_dist.models.backbone import create_backbone
from arat_dist.models.precision import COMPUTE_DTYPES, is_cast
from arat_dist.models.split_norm import BATCH_NORMS
from arat_dist.numerics import training_numerics
from arat_dist.objectives import build_objective
from arat_dist.objectives.arat import ARAT
from arat_dist.objectives.base import to_pixels
from arat_dist.recipe import parse_recipe

OnProgress = Callable[[str], None]


def step_recipe(
    model: str,
    *,
    image_size: int,
    num_classes: int,
    batch_size: int,
    attack_steps: int,
    precision: str,
    overrides: Sequence[tuple[str, Any]] = (),
) -> Recipe:
    """ARAT on a backbone as `arat bench step` runs it: linf 4/255, the batch's statistics in the attack, SGD.

    Norms are split as the net has them; residual blocks don't begin at zero, or taps would have no direction.

    Args:
        model: a timm architecture.
        image_size: side of the pictures, in pixels.
        num_classes: number of classes.
        batch_size: pictures of a step.
        attack_steps: steps of PGD.
        precision: of the step.
        overrides: keys of the recipe, as `load_recipe` takes them; those of `FREE_KEYS`.

    Raises:
        UserError: no such recipe, or one that the reference step doesn't follow.
    """
    for key, _ in overrides:
        if not key.startswith(FREE_KEYS):
            raise UserError(f"--{key}: is not for the bench, whose plain step knows {', '.join(FREE_KEYS)}")
    args = {"zero_init_last": False} if timm.models.is_model_in_modules(model, ["resnet"]) else {}
    tree: dict[str, dict[str, Any]] = {
        "data": {"train": "none", "val": "none", "num_classes": num_classes, "image_size": image_size},
        "model": {"name": model, "args": args},
        "objective": {"name": "arat"},
        "attack": {"eps": "4/255", "steps": attack_steps, "norm_stats": "batch"},
        "train": {"epochs": 1, "global_batch_size": batch_size, "precision": precision},
    }
    recipe = parse_recipe(tree, overrides)
    if not any(key == "objective.split_norm" for key, _ in overrides):
        net = create_backbone(recipe.model, num_classes=num_classes, image_size=image_size)
        has_batch_norms = any(isinstance(module, BATCH_NORMS) for module in net.modules())
        recipe = parse_recipe(tree, [("objective.split_norm", "batch" if has_batch_norms else "layer")])
    return recipe


def bench_step(recipe: Recipe, device: torch.device, *, repeats: int, on_progress: OnProgress) -> dict[str, Any]:
    """Time the step, the floor and both references, in turn, `repeats` times; medians in milliseconds.

    Args:
        recipe: see `step_recipe`; `train.compile` compiles the step.
        device: where it runs.
        repeats: rounds after the warm-up.
        on_progress: told what comes next.

    Returns:
        The JSON object of `arat bench step`.
    """
    with training_numerics(recipe.train):
        return _bench_step(recipe, device, repeats, on_progress)


def _bench_step(recipe: Recipe, device: torch.device, repeats: int, on_progress: OnProgress) -> dict[str, Any]:
    fused, batch = FusedStep(recipe, device), synthetic_batch(recipe, device)
    references = {name: reference(fused.objective, recipe, dtype) for name, dtype in REFERENCES.items()}
    forwards = plain_forwards(recipe, device)
    attacks = {"eager": lambda: fused.attack(batch, compiled=False)}
    if recipe.train.compile:
        attacks["compiled"] = lambda: fused.attack(batch, compiled=True)
    work: dict[str, Callable[[], object]] = {
        **{f"forward_{name}": run for name, run in forwards.items()},
        "step": lambda: fused(batch),
        **{f"attack_{name}": run for name, run in attacks.items()},
        **{f"reference_{name}": lambda step=step: step(*batch) for name, step in references.items()},
    }
    for name, run in work.items():
        on_progress(f"warming up: {name.replace('_', ' ')}")
        for _ in range(2 + NUM_WARMUPS * recipe.train.cuda_graph):  # the last of them is captured, or replayed
            run()
    seconds: dict[str, list[float]] = {name: [] for name in work}
    breakdowns: list[dict[str, float]] = []
    for i in range(repeats):
        on_progress(f"round {i + 1} of {repeats}")
        for name, run in work.items():
            # A forward pass is short: several make its median as steady as the step's.
            for _ in range(3 if name.startswith("forward") else 1):
                seconds[name].append(timed(run, device))
        breakdowns.append(fused.breakdown(batch))
    median = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    forward = min(median[f"forward_{name}"] for name in forwards)
    steps = recipe.attack.steps or 0
    floor = (2 * steps + 6) * forward
    on_progress("memory")
    return {
        "model": recipe.model.name,
        "image_size": recipe.data.image_size,
        "batch_size": recipe.train.global_batch_size,
        "attack_steps": steps,
        "precision": recipe.train.precision,
        "compile": recipe.train.compile,
        "cuda_graph": recipe.train.cuda_graph,
        "tf32": recipe.train.tf32,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "repeats": repeats,
        "forward_ms": forward,
        **{f"forward_{name}_ms": median[f"forward_{name}"] for name in forwards},
        "floor_ms": floor,
        "step_ms": median["step"],
        "floor_ratio": median["step"] / floor,
        **{f"attack_pass_{name}_ms": median[f"attack_{name}"] / steps for name in attacks},
        **{f"reference_{name}_ms": median[f"reference_{name}"] for name in references},
        **{f"speedup_{name}": median[f"reference_{name}"] / median["step"] for name in references},
        "peak_memory_mb": in_subprocess(_peak_of_step, recipe, device),
        "reference_peak_memory_mb": in_subprocess(_peak_of_reference, recipe, device),
        "breakdown_ms": {
            part: 1000 * statistics.median(breakdown[part] for breakdown in breakdowns) for part in breakdowns[0]
        },
    }


FREE_KEYS = (
    "model.",
    "objective.gamma",
    "objective.taps",
    "objective.split_norm",
    "attack.eps",
    "train.compile",
    "train.cuda_graph",
    "train.tf32",
)
"""Keys, or their beginnings, that may be set: the step of plain code follows them, or has no need to."""
REFERENCES = {"fp32": None, "bf16": torch.bfloat16}
"""What the reference step's autocast computes in."""


class FusedStep:
    """The step that the trainer takes, on one batch again and again."""

    def __init__(self, recipe: Recipe, device: torch.device):
        torch.manual_seed(0)
        objective = build_objective(recipe)
        assert isinstance(objective, ARAT)
        self.objective, self._device = objective, device
        rank = Rank(0, 1, device)
        self.engine: Engine = build_engine(
            objective,
            recipe.engine,
            recipe.optim,
            rank,
            scales_loss=recipe.train.precision == "fp16",
            capturable=is_captured(recipe, rank),
        )
        self._take_step = build_step(self.engine, recipe, rank)
        objective.train()
        if recipe.train.compile:
            objective.compile_backbones({recipe.train.global_batch_size})

    def __call__(self, batch: Batch) -> None:
        """One step."""
        self._take_step([batch], 1 / len(batch[1]), lambda: None)

    def attack(self, batch: Batch, *, compiled: bool) -> Tensor:
        """The attack alone: adversarial pictures [B,3,H,W]."""
        images, labels, keys = batch
        with self.objective.passes(len(images) if compiled else 0, self._device):
            return self.objective.perturb(to_pixels(images, self.objective.classifier.dtype), labels, keys)

    def breakdown(self, batch: Batch) -> dict[str, float]:
        """Seconds of the parts of one step; the device is waited for at their borders, so they add up to a bit more."""
        objective, engine = self.objective, self.engine
        seconds: dict[str, float] = {}
        perturb, clock = objective.perturb, Clock(self._device)

        def timed_attack(pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
            begin = clock()
            adversarial = perturb(pixels, targets, keys)
            seconds["attack"] = clock() - begin
            return adversarial

        objective.perturb = timed_attack
        try:
            begin = clock()
            out = engine(*batch)
            seconds["training_forward"] = clock() - begin - seconds["attack"]
        finally:
            del objective.perturb
        seconds["backward"] = timed(lambda: engine.backward(out.loss), self._device)
        engine.is_finite()
        seconds["optimizer"] = timed(engine.step, self._device)
        seconds["rest"] = clock() - begin - sum(seconds.values())
        return seconds


def reference(arat: ARAT, recipe: Recipe, dtype: torch.dtype | None) -> ReferenceStep:
    """The reference step with the recipe's settings, on copies of the layers."""
    attack = recipe.attack
    assert attack.steps is not None
    step_size = attack.step_size or attack.eps / 4
    return ReferenceStep(arat, recipe.optim, eps=attack.eps, step_size=step_size, steps=attack.steps, dtype=dtype)


def plain_forwards(recipe: Recipe, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    """One forward pass F of the plain backbone, eager and compiled, on pictures that are normalised and cast."""
    net = create_backbone(recipe.model, num_classes=recipe.data.num_classes, image_size=recipe.data.image_size)
    net = net.to(device).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    dtype = COMPUTE_DTYPES[recipe.train.precision]
    size = (recipe.train.global_batch_size, 3, recipe.data.image_size, recipe.data.image_size)
    pixels = torch.rand(size, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    if dtype is not None:
        for module in filter(is_cast, net.modules()):
            module.to(dtype)
    compiled = torch.compile(net.forward, dynamic=False)

    def run(forward: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            return forward(pixels)

    return {"eager": lambda: run(net), "compiled": lambda: run(compiled)}


def synthetic_batch(recipe: Recipe, device: torch.device, seed: int = 0) -> Batch:
    """Random pictures uint8 [B,3,H,W], channels-last as the loader's, their labels and keys int64 [B]."""
    count, side = recipe.train.global_batch_size, recipe.data.image_size
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, recipe.data.num_classes, (count,), generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    return Batch(images.to(device), labels.to(device), torch.arange(count, device=device))


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds that a call takes until the device is done."""
    clock = Clock(device)
    begin = clock()
    run()
    return clock() - begin


class Clock:
    """Seconds now, once the device has done what it was given."""

    def __init__(self, device: torch.device):
        self._is_cuda = device.type == "cuda"

    def __call__(self) -> float:
        """Wait for the device, and read the clock."""
        if self._is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def in_subprocess(work: Callable[..., float], *args: Any) -> float:
    """What `work` returns in a new process, whose memory is its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def _peak_of_step(recipe: Recipe, device: torch.device) -> float:
    """Peak of the whole fused step, in MiB above what lies in memory between steps."""
    fused, batch = FusedStep(recipe, device), synthetic_batch(recipe, device)
    return _peak_memory_mb(lambda: fused(batch), device)


def _peak_of_reference(recipe: Recipe, device: torch.device) -> float:
    """Peak of the bf16 reference's training part: two forwards, a backward, an update, no attack."""
    plain, batch = FusedStep(recipe, device), synthetic_batch(recipe, device)
    step = reference(plain.objective, recipe, torch.bfloat16)
    del plain
    images, labels, _ = batch

    def train() -> None:
        # Clean and attacked pictures are alive while it trains, in plain code as in ours.
        pixels, adversarial = step.pixels(images), step.pixels(images)
        step.update(step.losses(adversarial, pixels, labels))

    return _peak_memory_mb(train, device)


def _peak_memory_mb(run: Callable[[], None], device: torch.device) -> float:
    """Largest sum of tensors alive during a call, those from before not counted; by torch's profiler on a CPU."""
    run()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    now = peak = 0
    for _, num_bytes in changes:
        now += num_bytes
        peak = max(peak, now)
    return peak / 2**20
