"""Losses against their formulas written out, sample by sample in float64, gradients included."""

import math

import pytest
import torch
from torch import Tensor

from arat_dist.losses import cross_entropy, dlr, kl, targeted_dlr

LABELS = torch.tensor([0, 4, 2, 1, 3, 3, 0])
TARGETS = torch.tensor([1, 0, 4, 2, 0, 2, 3])


def some_logits(seed: int = 0, count: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(count, 5, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_()


def soft_targets() -> Tensor:
    """Two classes mixed and the mass smoothed: the largest share is the label's."""
    hard, other = torch.eye(5, dtype=torch.float64)[LABELS], torch.eye(5, dtype=torch.float64)[TARGETS]
    return 0.9 * (0.7 * hard + 0.3 * other) + 0.1 / 5


def softmax_written_out(row: Tensor) -> list[float]:
    exps = [math.exp(z) for z in row.tolist()]
    return [e / sum(exps) for e in exps]


def gradient(losses: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of sum(weights * losses) with weights that differ, so that a mean or a mix-up of samples shows."""
    weights = torch.arange(1.0, len(losses) + 1, dtype=losses.dtype)
    return torch.autograd.grad((weights * losses).sum(), inputs)


def slopes(loss, logits: Tensor) -> Tensor:
    """The same by central differences."""
    weights = torch.arange(1.0, len(logits) + 1, dtype=logits.dtype)
    result = torch.zeros_like(logits)
    for i in range(logits.numel()):
        step = torch.zeros(logits.numel(), dtype=logits.dtype).index_fill_(0, torch.tensor(i), 1e-6).view_as(logits)
        higher, lower = loss(logits.detach() + step), loss(logits.detach() - step)
        result.view(-1)[i] = (weights * (higher - lower)).sum().detach() / 2e-6
    return result


@pytest.mark.parametrize("soft", [False, True])
def test_cross_entropy_with_labels_and_with_soft_targets(soft):
    logits = some_logits()
    shares = soft_targets() if soft else torch.eye(5, dtype=torch.float64)[LABELS]
    losses = cross_entropy(logits, soft_targets() if soft else LABELS)
    probabilities = [softmax_written_out(row) for row in logits]
    expected = [
        -sum(t * math.log(p) for t, p in zip(ts, ps, strict=True))
        for ts, ps in zip(shares.tolist(), probabilities, strict=True)
    ]
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64))
    weights = torch.arange(1.0, 8, dtype=torch.float64)[:, None]
    expected_gradient = weights * (torch.tensor(probabilities, dtype=torch.float64) - shares)
    torch.testing.assert_close(gradient(losses, logits)[0], expected_gradient)


def test_soft_targets_may_be_of_another_type_than_the_logits():
    logits = some_logits()
    losses = cross_entropy(logits, soft_targets().float())
    torch.testing.assert_close(losses, cross_entropy(logits, soft_targets()), rtol=1e-6, atol=1e-6)


def test_kl_and_its_gradients_in_both_arguments():
    logits, reference = some_logits(1), some_logits(2)
    losses = kl(logits, reference)
    p, q = ([softmax_written_out(row) for row in z] for z in (logits, reference))
    expected = [sum(b * math.log(b / a) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64))
    assert (losses > 0.1).all()
    weights = torch.arange(1.0, 8, dtype=torch.float64)[:, None]
    p, q = (torch.tensor(rows, dtype=torch.float64) for rows in (p, q))
    by_logits, by_reference = gradient(losses, logits, reference)
    torch.testing.assert_close(by_logits, weights * (p - q))
    torch.testing.assert_close(by_reference, weights * q * ((q / p).log() - losses.detach()[:, None]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_of_far_and_of_equal_logits(dtype):
    far = torch.tensor([[1e4, 0.0, -1e4], [0.0, 0.0, 500.0]], dtype=dtype, requires_grad=True)
    other = torch.tensor([[0.0, 1e4, 0.0], [300.0, 0.0, 0.0]], dtype=dtype, requires_grad=True)
    losses = kl(far, other)
    torch.testing.assert_close(losses.detach(), torch.tensor([1e4, 800 - 300.0], dtype=dtype))
    assert all(part.isfinite().all() for part in gradient(losses, far, other))
    equal = kl(far, far.detach())
    assert (equal == 0).all()
    torch.testing.assert_close(gradient(equal, far)[0], torch.zeros_like(far))
    # The softmax knows no shift.
    assert kl(far, far.detach() + 4).abs().max() == 0


def dlr_written_out(row: Tensor, label: int) -> float:
    logits, ranked = row.tolist(), sorted(row.tolist(), reverse=True)
    other = max(z for k, z in enumerate(logits) if k != label)
    return -(logits[label] - other) / (ranked[0] - ranked[2])


def test_dlr():
    logits = some_logits(3, 60)
    labels = torch.arange(60) % 5
    losses = dlr(logits, labels)
    expected = [dlr_written_out(row, int(label)) for row, label in zip(logits, labels, strict=True)]
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(
        gradient(losses, logits)[0], slopes(lambda z: dlr(z, labels), logits), rtol=1e-5, atol=1e-5
    )
    right = logits.argmax(1) == labels
    assert right.any()
    assert ((losses <= 0) == right).all()
    assert losses[right].min() >= -1
    torch.testing.assert_close(dlr(7 * logits + 3, labels), losses)
    # Two classes in front alike: the value is 0, whichever of them argmax and topk name first.
    assert float(dlr(torch.tensor([[2.0, 2.0, 1.0]]), torch.tensor([1]))) == 0
    assert torch.isfinite(dlr(torch.ones(1, 3), torch.tensor([1]))).all()


def test_targeted_dlr():
    logits = some_logits(4)
    losses = targeted_dlr(logits, LABELS, TARGETS)
    expected = []
    for row, label, target in zip(logits.tolist(), LABELS.tolist(), TARGETS.tolist(), strict=True):
        first, _, third, fourth, _ = sorted(row, reverse=True)
        expected.append(-(row[label] - row[target]) / (first - (third + fourth) / 2))
    torch.testing.assert_close(losses.detach(), torch.tensor(expected, dtype=torch.float64))
    by_differences = slopes(lambda z: targeted_dlr(z, LABELS, TARGETS), logits)
    torch.testing.assert_close(gradient(losses, logits)[0], by_differences, rtol=1e-5, atol=1e-5)


def test_the_ratios_take_the_largest_class_of_soft_targets():
    logits = some_logits(5)
    assert torch.equal(dlr(logits, soft_targets()), dlr(logits, LABELS))
    assert torch.equal(targeted_dlr(logits, soft_targets(), TARGETS), targeted_dlr(logits, LABELS, TARGETS))


def test_the_ratios_say_how_many_classes_they_need():
    with pytest.raises(ValueError, match=r"^dlr: 2 classes: at least 3 would be right"):
        dlr(torch.zeros(1, 2), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^targeted_dlr: 3 classes: at least 4 would be right"):
        targeted_dlr(torch.zeros(1, 3), torch.tensor([0]), torch.tensor([1]))


@pytest.mark.parametrize(
    ("half", "dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_half_precision_is_lifted_before_anything_is_computed(half, dtype):
    logits, reference = some_logits(6, dtype=half), some_logits(7, dtype=half)
    for loss in (
        lambda z, r: cross_entropy(z, LABELS),
        lambda z, r: cross_entropy(z, soft_targets()),
        kl,
        lambda z, r: dlr(z, LABELS),
        lambda z, r: targeted_dlr(z, LABELS, TARGETS),
    ):
        losses = loss(logits, reference)
        assert losses.dtype == dtype
        assert losses.shape == (7,)
        exact = loss(logits.double(), reference.double())
        torch.testing.assert_close(losses.double(), exact, rtol=1e-5, atol=1e-5)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(loss(logits, reference), losses)
