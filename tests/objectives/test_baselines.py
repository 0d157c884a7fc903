"""AT and plain training: cross-entropy written out, on attacked and on clean pictures."""

import pytest
import torch
from toys import Sets, toy_batch, toy_classifier, toy_recipe

from arat_dist.attacks import PGD
from arat_dist.objectives import AT, Standard, build_objective
from arat_dist.objectives.base import to_pixels

ATTACK = PGD("linf", 0.1, 0.04, 3, seed=5)


def written_out_ce(logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    targets = torch.full_like(logs, smoothing / logs.shape[1])
    targets[torch.arange(len(labels)), labels] += 1 - smoothing
    return -(targets * logs).sum(1).mean()


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["at", "standard"])
def test_loss_and_gradients_equal_cross_entropy(name, smoothing):
    classifier = toy_classifier(split=False)
    if name == "at":
        objective = AT(classifier, ATTACK, label_smoothing=smoothing)
    else:
        objective = Standard(classifier, label_smoothing=smoothing)
    images, labels, keys = toy_batch()
    pixels = to_pixels(images, torch.float64)
    if name == "at":
        pixels = objective.perturb(pixels, labels, keys)
        assert (pixels - to_pixels(images, torch.float64)).abs().max() > 0.05
    loss, metrics = objective(images, labels, keys)
    logits = classifier(pixels)
    expected = written_out_ce(logits, labels, smoothing)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    parameters = list(objective.parameters())
    for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    part, kind = ("loss_adv", "robust_accuracy") if name == "at" else ("loss_clean", "clean_accuracy")
    assert set(metrics) == {part, kind}
    assert float(metrics[part]) == pytest.approx(float(loss.detach()))
    assert float(metrics[kind]) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_the_training_attack_ignores_label_smoothing():
    images, labels, keys = toy_batch()
    pixels = to_pixels(images, torch.float64)
    plain, smoothed = (AT(toy_classifier(split=False), ATTACK, label_smoothing=s) for s in (0.0, 0.3))
    assert torch.equal(plain.perturb(pixels, labels, keys), smoothed.perturb(pixels, labels, keys))


def test_pixels_are_bytes_over_255_in_the_memory_format_given():
    images, _, _ = toy_batch()
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    pixels = to_pixels(images, torch.float64)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, torch.tensor(images.numpy() / 255.0))
    assert torch.equal(images, before)


@pytest.mark.parametrize(
    ("name", "split", "has_attack"), [("arat", True, True), ("at", False, True), ("standard", False, False)]
)
def test_a_recipe_becomes_its_method(sets: Sets, name, split, has_attack):
    attack = {"eps": 0.1, "step_size": 0.05, "steps": 4, "random_start": False, "norm_stats": "running"}
    recipe = toy_recipe(sets, objective={"name": name}, attack=attack, train={"seed": 11, "precision": "bf16"})
    objective = build_objective(recipe)
    assert type(objective).__name__.lower() == name
    assert objective.classifier.is_split == split
    assert objective.attack == (PGD("linf", 0.1, 0.05, 4, False, 11) if has_attack else None)
    assert objective._dtype == torch.bfloat16
    if has_attack:
        assert objective._norm_stats == "running"
