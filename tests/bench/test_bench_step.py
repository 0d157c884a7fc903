"""The fused step against the step of research code: the same numbers, eager or compiled; and the bench of both."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from toys import WeightCasts

from arat_dist.attacks import uniform_noise
from arat_dist.bench.reference import ReferenceStep
from arat_dist.bench.step import FusedStep, bench_step, plain_forwards, reference, step_recipe, synthetic_batch
from arat_dist.config import ARATConfig, Recipe
from arat_dist.data.loader import Batch
from arat_dist.errors import UserError
from arat_dist.models import cpu_ops
from arat_dist.models.backbone import create_backbone
from arat_dist.models.precision import COMPUTE_DTYPES
from arat_dist.step import compute_gradients

CPU = torch.device("cpu")
SIZE, NUM_CLASSES = 16, 5


def recipe(*overrides: tuple[str, Any], precision: str = "fp32", steps: int = 2, batch_size: int = 6) -> Recipe:
    return step_recipe(
        "cifar_resnet18",
        image_size=SIZE,
        num_classes=NUM_CLASSES,
        batch_size=batch_size,
        attack_steps=steps,
        precision=precision,
        overrides=[("model.args", {"channels": [8, 8, 8, 8]}), ("objective.gamma", 3), *overrides],
    )


def same_start(settings: Recipe) -> Any:
    """The fused attack's random start, as a distance from the pixels."""
    return lambda pixels, keys: (2 * uniform_noise(keys, pixels, settings.train.seed) - 1) * settings.attack.eps


def plain_step(fused: FusedStep, settings: Recipe, dtype: torch.dtype | None = None) -> ReferenceStep:
    attack = settings.attack
    return ReferenceStep(
        fused.objective,
        settings.optim,
        eps=attack.eps,
        step_size=attack.eps / 4,
        steps=attack.steps or 0,
        dtype=dtype,
        start=same_start(settings),
    )


def gradients(fused: FusedStep, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one step, before the update."""
    result = compute_gradients(fused.engine, [batch], 1 / len(batch.labels), lambda: None)
    found = {name: p.grad for name, p in fused.objective.named_parameters() if p.grad is not None}
    return result.metrics[0][0]["loss"], found


def plain_gradients(plain: ReferenceStep, loss: Tensor) -> dict[str, Tensor]:
    plain.optimizer.zero_grad()
    loss.backward()
    parts = {"classifier": plain.net, "predictors": plain.predictors}
    named = {f"{key}.{name}": p for key, part in parts.items() for name, p in part.named_parameters()}
    return {name: p.grad for name, p in named.items() if p.grad is not None}


def to_float64(step: FusedStep) -> None:
    """The optimizer's state too, which an engine takes up in the precision of the weights."""
    step.objective.double()
    step.engine.load_state_dict(step.engine.state_dict())


def test_in_float64_twenty_steps_give_the_reference_steps_weights():
    settings = recipe()
    fused = FusedStep(settings, CPU)
    to_float64(fused)
    plain = plain_step(fused, settings)
    start = {name: p.detach().clone() for name, p in fused.objective.named_parameters()}
    for seed in range(20):
        batch = synthetic_batch(settings, CPU, seed)
        fused(batch)
        plain(*batch)
    expected = {f"classifier.{name}": p for name, p in plain.net.named_parameters()}
    expected |= {f"predictors.{name}": p for name, p in plain.predictors.named_parameters()}
    for name, weight in fused.objective.named_parameters():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-9, msg=name)
        assert not torch.equal(weight, start[name]), name


def one_step(precision: str, reference_precision: str) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """Gradients of the fused step and of the reference's on the same adversarial pictures; how far losses differ."""
    settings = recipe(precision=precision, batch_size=16)
    fused, batch = FusedStep(settings, CPU), synthetic_batch(settings, CPU)
    plain = plain_step(fused, settings, COMPUTE_DTYPES[reference_precision])
    pixels = plain.pixels(batch.images)
    adversarial = (pixels + same_start(settings)(pixels, batch.keys)).clamp(0, 1)
    fused.objective.perturb = lambda *_, **__: adversarial
    loss, found = gradients(fused, batch)
    expected_loss = plain.losses(adversarial, pixels, batch.labels)
    # Scaled, as fp16 needs it; a power of two changes nothing else.
    expected = {name: g / 2**16 for name, g in plain_gradients(plain, expected_loss * 2**16).items()}
    return found, expected, abs(float(loss / expected_loss.detach()) - 1)


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """2-norm of the difference of two whole gradients, relative to the second's."""
    assert a.keys() == b.keys()
    squares = torch.stack([torch.stack([(a[k] - b[k]).square().sum(), b[k].square().sum()]) for k in b]).sum(0)
    return float((squares[0] / squares[1]).sqrt())


def test_one_step_in_fp32_agrees_with_the_reference():
    found, expected, loss_error = one_step("fp32", "fp32")
    assert loss_error < 1e-5
    assert distance(found, expected) < 1e-5


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_one_step_in_half_precision_is_as_near_to_fp32_as_the_references(precision):
    """Half precision moves this gradient by 10 to 40 %, whoever computes it: by at most twice the plain way."""
    found, exact, loss_error = one_step(precision, "fp32")
    _, plain, _ = one_step(precision, precision)
    assert loss_error < 2e-3
    assert 1e-3 < distance(found, exact) < 2 * distance(plain, exact)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_attack_reaches_the_loss_of_the_references(precision):
    """On average over 100 batches, within 1 %; and it is an attack."""
    settings = recipe(precision=precision, steps=3, batch_size=8)
    fused = FusedStep(settings, CPU)
    plain = plain_step(fused, settings)
    losses = {"clean": 0.0, "fused": 0.0, "plain": 0.0}
    for seed in range(100):
        batch = synthetic_batch(settings, CPU, seed)
        pixels = plain.pixels(batch.images)
        pictures = {
            "clean": pixels,
            "fused": fused.attack(batch, compiled=False),
            "plain": plain.attack(pixels, batch.labels, batch.keys),
        }
        with torch.no_grad():
            for name, x in pictures.items():
                losses[name] += float(nn.functional.cross_entropy(plain.net(x), batch.labels))
    assert losses["fused"] == pytest.approx(losses["plain"], rel=0.01)
    assert losses["plain"] > 1.05 * losses["clean"]


def boxed(graph: torch.fx.GraphModule) -> Callable[[list[Any]], Any]:
    """A graph as AOTAutograd likes to call it: with a list that it may empty."""

    def call(args: list[Any]) -> Any:
        return graph(*args)

    call._boxed_call = True  # type: ignore[attr-defined]
    return call


@pytest.fixture
def graphs(monkeypatch):
    """Compiles as torch.compile does but for the machine code, and keeps the backward graphs."""
    backward: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _inputs: object) -> Any:
        backward.append(graph)
        return boxed(graph)

    backend = aot_autograd(fw_compiler=lambda graph, _: boxed(graph), bw_compiler=keep)
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kwargs: compile_(f, backend=backend, **kwargs))
    torch._dynamo.reset()
    counters.clear()
    yield backward
    torch._dynamo.reset()


def weight_gradients(graph: torch.fx.GraphModule) -> int:
    """Convolutions whose weight's gradient a backward graph computes."""
    target = torch.ops.aten.convolution_backward.default
    return sum(node.args[-1][1] for node in graph.graph.nodes if node.target is target)


def test_a_compiled_step_equals_the_eager_one(graphs):
    """Attack, adv branch and clean branch are graphs of their own, and only the training ones see weights."""
    settings = recipe(("train.compile", True))
    eager, compiled = FusedStep(recipe(), CPU), FusedStep(settings, CPU)
    compiled.objective.load_state_dict(eager.objective.state_dict())
    for step in (eager, compiled):
        to_float64(step)
    for seed in range(3):
        batch = synthetic_batch(settings, CPU, seed)
        (loss, found), (expected_loss, expected) = gradients(compiled, batch), gradients(eager, batch)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-9, msg=name)
        for step in (eager, compiled):
            step.engine.step()
    assert [weight_gradients(graph) > 0 for graph in graphs] == [False, True, True]


def test_nothing_is_compiled_anew_when_schedules_move_or_a_batch_is_smaller(graphs):
    settings = recipe(("train.compile", True), precision="bf16")
    course = {"eps_warmup_epochs": 0.5, "steps_from": ((0.6, 3),)}
    settings = settings.model_copy(update={"attack": settings.attack.model_copy(update=course)})
    fused = FusedStep(settings, CPU)
    fused(synthetic_batch(settings, CPU))
    num_graphs = counters["stats"]["unique_graphs"]
    assert num_graphs == 3
    for epoch in (0.1, 0.3, 0.5, 0.7, 0.9):
        fused.objective.begin_step(epoch)
        fused(synthetic_batch(settings, CPU, seed=1))
    images, labels, keys = synthetic_batch(settings, CPU)
    fused(Batch(images[:4], labels[:4], keys[:4]))
    fused(synthetic_batch(settings, CPU))
    assert counters["stats"]["unique_graphs"] == num_graphs
    assert not counters["graph_break"]


def test_the_bench_measures_what_it_says():
    settings = recipe(("train.compile", False), precision="bf16", batch_size=4)
    rounds: list[str] = []
    result = bench_step(settings, CPU, repeats=2, on_progress=rounds.append)
    assert json.loads(json.dumps(result)) == result
    assert result["floor_ms"] == pytest.approx((2 * 2 + 6) * result["forward_ms"])
    assert result["forward_ms"] == min(result["forward_eager_ms"], result["forward_compiled_ms"])
    assert result["floor_ratio"] == pytest.approx(result["step_ms"] / result["floor_ms"])
    assert result["speedup_fp32"] == pytest.approx(result["reference_fp32_ms"] / result["step_ms"])
    assert result["speedup_bf16"] == pytest.approx(result["reference_bf16_ms"] / result["step_ms"])
    assert set(result["breakdown_ms"]) == {"attack", "training_forward", "backward", "optimizer", "rest"}
    assert rounds[-3:] == ["round 1 of 2", "round 2 of 2", "memory"]
    # A training pass of 4 pictures keeps two maps of 8x16x16 for each of 17 norms in two branches, in bf16 or fp32.
    least = 2 * 17 * 4 * 8 * 16 * 16 * 2 / 2**20 / 4
    assert least < result["peak_memory_mb"] < 50
    assert least < result["reference_peak_memory_mb"] < 50


def test_the_floor_is_measured_with_weights_that_are_cast_already():
    settings = recipe(precision="bf16")
    forward = plain_forwards(settings, CPU)["eager"]
    with WeightCasts() as casts:
        logits = forward()
    assert logits.dtype is torch.bfloat16
    net = create_backbone(settings.model, num_classes=NUM_CLASSES, image_size=SIZE)
    assert not {tuple(p.shape) for p in net.parameters()} & set(casts.shapes)


@pytest.mark.parametrize("key", ["train.grad_checkpointing", "attack.norm", "objective.symmetric", "attack.steps_from"])
def test_what_the_reference_does_not_follow_is_refused(key):
    with pytest.raises(UserError, match=rf"^--{key}: is not for the bench"):
        recipe((key, "x"))


@pytest.mark.parametrize(
    ("model", "overrides", "split"),
    [
        ("resnet18", [], "batch"),
        ("vit_tiny_patch16_224", [("model.args", "{patch_size: 8}")], "layer"),
        ("resnet18", [("objective.split_norm", "none")], "none"),
    ],
)
def test_norms_are_split_as_the_net_has_them(model, overrides, split):
    settings = step_recipe(
        model, image_size=32, num_classes=3, batch_size=4, attack_steps=1, precision="bf16", overrides=overrides
    )
    assert isinstance(settings.objective, ARATConfig)
    assert settings.objective.split_norm == split


def test_the_references_settings_are_the_recipes():
    settings = recipe(("attack.eps", "8/255"), steps=4)
    plain = reference(FusedStep(settings, CPU).objective, settings, None)
    pixels = torch.rand(4, 3, SIZE, SIZE)
    moved = plain.attack(pixels, torch.zeros(4, dtype=torch.long), torch.arange(4)) - pixels
    assert float(moved.abs().max()) == pytest.approx(8 / 255, rel=1e-4)
    assert math.isclose(plain.optimizer.param_groups[0]["lr"], settings.optim.lr)


def test_nets_compiled_for_a_cpu_take_its_versions(monkeypatch):
    """In the attack and in both branches; and an uncompiled step takes torch's."""
    seen = []
    ours = cpu_ops.batch_norm

    def noted(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return ours(*args, **kwargs)

    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    monkeypatch.setitem(cpu_ops._VERSIONS, torch.nn.functional.batch_norm, noted)
    for compiles in (False, True):
        step = FusedStep(recipe(("train.compile", compiles)), CPU)
        step(synthetic_batch(recipe(), CPU))
        assert bool(seen) == (compiles and cpu_ops.is_traced_rightly())
