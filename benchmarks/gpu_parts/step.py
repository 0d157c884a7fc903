"""Part step: how long a training step takes, beside the least that it costs and the step of plain code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from arat_dist.bench.step import plain_forwards, reference, step_recipe, synthetic_batch
from arat_dist.config import Recipe
from arat_dist.numerics import training_numerics

from .journal import Journal, Skipped, WrongError
from .settings import Settings
from .steps import DeviceStep, mode_name, synchronized, timed_in_turn, with_mode

EAGER, COMPILED, GRAPHED, BOTH = (False, False), (True, False), (False, True), (True, True)
REFERENCES = {"bf16": torch.bfloat16, "tf32": None, "fp32": None}
"""What the plain step computes in, and its autocast."""
_COMPILE_S, _LIMIT_S = 170.0, 60.0


@dataclass(frozen=True, eq=False)
class Model:
    """A net and the step that is taken with it."""

    name: str
    image_size: int
    batch_size: int
    attack_steps: int
    num_classes: int = 1000
    args: dict[str, Any] | None = None
    taps: tuple[str, ...] = ()
    """Names of the taps, as a recipe has them; none: automatic ones."""


_TAPS = ("layer4.0.bn1", "layer4.0.bn2", "layer4.1.bn1", "layer4.1.bn2")
# The recipe's taps: part train finds the compiled graphs in torch's cache.
CIFAR = Model("cifar_resnet18", 32, 128, 10, 10, taps=_TAPS)
RESNET = Model("resnet50", 224, 128, 3)
VIT = Model("vit_small_patch16_224", 224, 128, 2)
CONVNEXT = Model("convnext_tiny", 224, 128, 2)
SMALL = {
    CIFAR: Model("cifar_resnet18", 16, 8, 2, 10, {"channels": [8, 8, 8, 8]}, _TAPS),
    RESNET: Model("test_resnet", 32, 8, 2, 10),
    VIT: Model("test_vit", 32, 8, 1, 10, {"patch_size": 8, "depth": 2}),
    CONVNEXT: Model("test_convnext", 32, 8, 1, 10),
}
"""What stands for each where everything is shrunk."""


def run(settings: Settings, journal: Journal) -> None:
    """All measurements: first those of every model that need no compiler, which takes a minute a model."""
    bench = Bench(settings, journal)
    models = [SMALL[model] if settings.small else model for model in SMALL]
    bench.matmul()
    for model in models:
        bench.forward(model, "eager")
        bench.flops(model)
        for mode in (EAGER, GRAPHED):
            bench.step(model, mode)
        bench.references(model)
    for model in models:
        bench.forward(model, "compiled")
        for mode in (BOTH, COMPILED):
            bench.step(model, mode)


@dataclass
class Live:
    """What is kept of the model that is measured now."""

    model: Model
    forwards: dict[str, Callable[[], object]] = field(default_factory=dict)
    fastest: tuple[float, str, Callable[[], object]] | None = None
    """Milliseconds, mode and call of the fastest step so far."""


class Bench:
    """Takes the measurements; each is a case of the journal.

    Args:
        settings: of the part.
        journal: what runs the cases.
    """

    def __init__(self, settings: Settings, journal: Journal):
        self._settings, self._journal = settings, journal
        self._device, self._seconds = settings.device, 0.1 if settings.small else 2.0
        self._live: Live | None = None

    def matmul(self) -> None:
        """The card's rate of matrix products, which the others are a share of."""
        self._journal.run("matmul", self._matmul)

    def forward(self, model: Model, name: str) -> None:
        """One forward pass of the plain net, "eager" or "compiled"."""
        if name == "eager" or self._compiles(model):
            case = f"{model.name} forward {name}"
            self._journal.run(case, _in_memory(partial(self._forward, model, name)), limit_s=_COMPILE_S)

    def flops(self, model: Model) -> None:
        """Floating-point operations of one step's convolutions and matrix products, counted once."""
        self._journal.run(f"{model.name} flops", _in_memory(partial(self._flops, model)))

    def step(self, model: Model, mode: tuple[bool, bool]) -> None:
        """One kind of step, and then its kernels."""
        compiled, graphed = mode
        if compiled and not self._compiles(model):
            return
        name = f"{model.name} {mode_name(compiled=compiled, graphed=graphed)}"
        limit = _COMPILE_S if compiled else _LIMIT_S
        kept: list[Callable[[], object]] = []
        line = self._journal.run(name, _in_memory(partial(self._step, model, mode, kept)), limit_s=limit)
        if line["status"] == "ok" and kept and self._device.type == "cuda":
            self._journal.run(f"{name} kernels", partial(self._kernels, kept[0], line["step_ms"]))

    def references(self, model: Model) -> None:
        """The plain step in every precision, in turn with the fastest of ours."""
        for name in REFERENCES:
            if not (name == "tf32" and self._device.type == "cpu"):
                case = f"{model.name} plain code {name}"
                self._journal.run(case, _in_memory(partial(self._reference, model, name)), limit_s=_LIMIT_S)

    def _compiles(self, model: Model) -> bool:
        """Compiling takes a CPU long: where all is shrunk, one model alone."""
        return not self._settings.small or model is SMALL[VIT]

    def _matmul(self) -> dict[str, Any]:
        side = 256 if self._settings.small else 8192
        a, b = (torch.rand(side, side, device=self._device).to(torch.bfloat16) for _ in range(2))
        for _ in range(5):
            torch.mm(a, b)
        milliseconds = timed_in_turn({"matmul": lambda: torch.mm(a, b)}, self._device, seconds=self._seconds)["matmul"]
        return {"side": side, "tflops": 2 * side**3 / milliseconds / 1e9}

    def _forward(self, model: Model, name: str) -> dict[str, Any]:
        live, recipe = self._of(model), self._recipe(model)
        with training_numerics(recipe.train):
            run = plain_forwards(recipe, self._device)[name]
            for _ in range(3):
                run()
            live.forwards[name] = _inside(recipe, run)
            milliseconds = timed_in_turn({name: run}, self._device, seconds=self._seconds)[name]
        return {"model": model.name, "forward_ms": milliseconds}

    def _forwards_before(self, model: Model) -> list[float]:
        """Forward passes of a model as they were measured before, in milliseconds."""
        lines = [self._journal.line(f"{model.name} forward {name}") for name in ("eager", "compiled")]
        return [line["forward_ms"] for line in lines if "forward_ms" in line]

    def _step(self, model: Model, mode: tuple[bool, bool], kept: list[Callable[[], object]]) -> dict[str, Any]:
        compiled, graphed = mode
        if graphed and self._device.type == "cpu":
            raise Skipped("not on a CPU")
        live, flops = self._of(model), self._journal.line(f"{model.name} flops").get("flops")
        recipe = with_mode(self._recipe(model), compiled=compiled, graphed=graphed)
        before = self._begin_memory()
        with training_numerics(recipe.train):
            step, batch = DeviceStep(recipe, self._device), synthetic_batch(recipe, self._device)
            step.warm_up(batch)
            if not bool(step(batch).finite):
                raise WrongError("the gradient is no number")
            own = _inside(recipe, lambda: step(batch))
        memory = self._memory(before)
        times = timed_in_turn({"step": own, **live.forwards}, self._device, seconds=self._seconds, least=5)
        milliseconds = times.pop("step")
        if live.fastest is None or milliseconds < live.fastest[0]:
            live.fastest = milliseconds, mode_name(compiled=compiled, graphed=graphed), own
        kept.append(own)
        forward = min([*times.values(), *self._forwards_before(model)], default=None)
        tflops = flops and flops / milliseconds / 1e9
        rate = self._journal.line("matmul").get("tflops")
        return {
            **asdict(model),
            "mode": mode_name(compiled=compiled, graphed=graphed),
            "precision": recipe.train.precision,
            "step_ms": milliseconds,
            "images_per_second": 1000 * model.batch_size / milliseconds,
            "forward_ms": forward,
            "floor_ratio": forward and milliseconds / ((2 * model.attack_steps + 6) * forward),
            "tflops": tflops,
            "matrix_share": tflops / rate if tflops and rate else None,
            **memory,
        }

    def _kernels(self, step: Callable[[], object], step_ms: float) -> dict[str, Any]:
        """Kernels and launches of one step, and the share of its time that kernels run."""
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        synchronized(self._device)
        with torch.profiler.profile(activities=activities) as profile:
            step()
            synchronized(self._device)
        events: Any = profile.events()
        on_gpu = [event for event in events if event.device_type.name == "CUDA" and not event.is_user_annotation]
        kernels = [event for event in on_gpu if not event.name.startswith(("Memcpy", "Memset"))]
        launches = [event for event in events if event.name.startswith(("cudaLaunch", "cudaGraphLaunch", "cuLaunch"))]
        busy_ms = sum(event.time_range.elapsed_us() for event in on_gpu) / 1000
        return {"kernels": len(kernels), "launches": len(launches), "busy": busy_ms / step_ms}

    def _reference(self, model: Model, name: str) -> dict[str, Any]:
        live, recipe = self._of(model), self._recipe(model)
        tf32 = recipe.model_copy(update={"train": recipe.train.model_copy(update={"tf32": name == "tf32"})})
        batch = synthetic_batch(recipe, self._device)
        fused = DeviceStep(recipe, self._device)
        plain = reference(fused.objective, recipe, REFERENCES[name])  # pyright: ignore[reportArgumentType]
        own = _inside(recipe, lambda: fused(batch))
        fastest = live.fastest or (0.0, "eager", own)
        work = {"plain": _inside(tf32, lambda: plain(*batch)), "own": fastest[2]}
        for call in (*work.values(), *work.values()):
            call()
        times = timed_in_turn(work, self._device, seconds=self._seconds, least=3)
        return {
            "model": model.name,
            "plain_ms": times["plain"],
            "own_mode": fastest[1],
            "own_ms": times["own"],
            "speedup": times["plain"] / times["own"],
        }

    def _flops(self, model: Model) -> dict[str, Any]:
        recipe = self._recipe(model)
        step, batch = DeviceStep(recipe, self._device), synthetic_batch(recipe, self._device)
        with CountFlops() as counter:
            step(batch)
        return {"model": model.name, "flops": counter.total}

    def _of(self, model: Model) -> Live:
        """What is kept of the model; what was kept of another one is let go."""
        if self._live is None or self._live.model is not model:
            self._live = Live(model)
            # torch compiles a function's code a limited number of times, and models of one class share it.
            torch.compiler.reset()
        return self._live

    def _recipe(self, model: Model) -> Recipe:
        keys = {"model.args": model.args, "objective.taps": model.taps}
        return step_recipe(
            model.name,
            image_size=model.image_size,
            num_classes=model.num_classes,
            batch_size=model.batch_size,
            attack_steps=model.attack_steps,
            precision="bf16",
            overrides=[(key, value) for key, value in keys.items() if value],
        )

    def _begin_memory(self) -> int:
        if self._device.type == "cpu":
            return 0
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def _memory(self, before: int) -> dict[str, float]:
        """MiB that building and taking the step needed at most, capture included."""
        if self._device.type == "cpu":
            return {}
        return {"peak_mb": (torch.cuda.max_memory_allocated() - before) / 2**20}


class CountFlops(TorchDispatchMode):
    """Adds up what torch knows of convolutions', matrix products' and attention's floating-point operations.

    torch's own `FlopCounterMode` can't: its tracker of modules takes no `autograd.grad` of a leaf, as attacks ask for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):  # noqa: SLF001 - the registry's key
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _inside(recipe: Recipe, run: Callable[[], object]) -> Callable[[], object]:
    """A call under the recipe's numerics, of which a compiled net would be compiled anew if they changed."""

    def call() -> object:
        with training_numerics(recipe.train):
            return run()

    return call


def _in_memory(work: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """The same work; a card that is too small for it is no failure."""

    def call() -> dict[str, Any]:
        try:
            return work()
        except torch.cuda.OutOfMemoryError as error:
            raise Skipped("the card's memory is too small for it") from error

    return call
