"""Attacks against their papers' algorithms written out in float64, sample by sample, and their promises."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from toys import ToyNet, toy_batch

from arat_dist.attacks import APGD, NFGSM, PGD, Attack, Norm, input_gradient, random_target, uniform_noise

EPS = 8 / 255
RADII: dict[Norm, float] = {"linf": EPS, "l2": 0.5, "l1": 5.0}
ATTACKS: list[Attack] = [
    *(PGD(norm, eps, eps / 4, 3, seed=1) for norm, eps in RADII.items()),
    *(APGD(norm, eps, 5, seed=1) for norm, eps in RADII.items()),
    PGD("linf", EPS, EPS, 1, "gaussian", seed=1),
    NFGSM(EPS, EPS, seed=1),
]
every_attack = pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: f"{type(a).__name__}-{getattr(a, 'norm', '')}")


def toy_pixels(count: int = 32, dtype: torch.dtype = torch.float64) -> Tensor:
    """All 256 values of a byte, 0 and 1 among them."""
    images, _, _ = toy_batch(count)
    return images.to(dtype) / 255


def toy_loss(net: nn.Module, labels: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: F.cross_entropy(net(x), labels, reduction="none")


def quiet_net() -> nn.Module:
    torch.manual_seed(0)
    return ToyNet("group").double()


def steep_net() -> nn.Module:
    """One whose loss bends within the ball, so that steps overshoot."""
    net = quiet_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(3)
    return net


def norms(delta: Tensor, norm: str) -> Tensor:
    return delta.double().flatten(1).norm(p={"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eps", [4 / 255, 8 / 255, 0.3, 1e-3])
def test_linf_stays_in_the_ball_exactly_and_leaves_the_clean_pictures_alone(eps, dtype):
    pixels = toy_pixels(dtype=dtype)
    before = pixels.clone()
    attack = PGD("linf", eps, eps, 3, seed=3)
    direction = torch.randn(pixels.shape, dtype=dtype)
    adversarial = attack(lambda x: (x * direction).sum((1, 2, 3)), pixels, torch.arange(32))
    assert torch.equal(pixels, before)
    assert not pixels.requires_grad
    assert not adversarial.requires_grad
    # Exactly, not to a place: the difference of two float32 is exact in float64 (that of two float64 isn't).
    slack = 1e-16 if dtype == torch.float64 else 0
    assert (adversarial.double() - pixels.double()).abs().max() <= eps + slack
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    # Not by staying far inside: rounding inwards costs at most one place of the type.
    reach = (adversarial.double() - pixels.double()).abs().amax((1, 2, 3))
    assert reach.max() >= eps - 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_linf_equals_pgd_written_out(start: Literal["uniform", "gaussian", "none"]):
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    attack = PGD("linf", EPS, EPS / 3, 5, start, seed=7)
    adversarial = attack(toy_loss(net, labels), pixels, keys)

    expected = pixels.clone()
    noise = 2 * uniform_noise(keys, pixels, 7) - 1
    if start != "none":
        expected = pixels + (EPS * noise if start == "uniform" else 0.001 * math.sqrt(2) * torch.erfinv(noise))
        expected = torch.minimum(torch.maximum(expected, torch.zeros(())), torch.ones(()))
    for _ in range(5):
        moved = []
        for x, clean, label in zip(expected, pixels, labels, strict=True):
            x = x[None].detach().requires_grad_()
            F.cross_entropy(net(x), label[None]).backward()
            assert x.grad is not None
            step = x.detach() + EPS / 3 * torch.sign(x.grad)
            moved.append(torch.clamp(clean + torch.clamp(step - clean, -EPS, EPS), 0, 1)[0])
        expected = torch.stack(moved)
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-12)
    assert (adversarial - pixels).abs().max() > EPS / 2
    # Even an attack of no steps gives pictures of its own.
    for none in (PGD("linf", EPS, EPS, 0, start), APGD("linf", EPS, 0, start)):
        assert none(toy_loss(net, labels), pixels, keys).data_ptr() != pixels.data_ptr()


def test_l2_equals_pgd_written_out_and_stays_in_the_ball():
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    eps = 0.5
    attack = PGD("l2", eps, 0.2, 6, "none")
    adversarial = attack(toy_loss(net, labels), pixels, keys)
    expected = []
    for clean, label in zip(pixels, labels, strict=True):
        x = clean
        for _ in range(6):
            leaf = x[None].detach().requires_grad_()
            F.cross_entropy(net(leaf), label[None]).backward()
            assert leaf.grad is not None
            gradient = leaf.grad[0]
            x = x + 0.2 * gradient / math.sqrt(float((gradient**2).sum()))
            length = math.sqrt(float(((x - clean) ** 2).sum()))
            x = torch.clamp(clean + (x - clean) * min(1, eps / length), 0, 1)
        expected.append(x)
    torch.testing.assert_close(adversarial, torch.stack(expected), rtol=0, atol=2e-6)
    for dtype in (torch.float32, torch.float64):
        clean = pixels.to(dtype)
        for start in ("uniform", "none"):
            direction = torch.randn(clean.shape, dtype=dtype)
            moved = PGD("l2", eps, 1.0, 2, start)(lambda x, d=direction: (x * d).sum((1, 2, 3)), clean, keys)
            norms = (moved.double() - clean.double()).flatten(1).norm(dim=1)
            assert norms.max() <= eps
            assert norms.max() > 0.8 * eps  # what is missing is clipped at 0 and 1
            assert torch.equal(clean, pixels.to(dtype))


def test_the_noise_is_uniform_and_has_no_pattern():
    count = 1000
    noise = uniform_noise(torch.arange(count), torch.zeros(count, 3, 4, 4, dtype=torch.float64), 5)
    assert noise.min() >= 0
    assert noise.max() < 1
    values = noise.flatten()
    assert abs(values.mean() - 0.5) < 4 * math.sqrt(1 / 12 / len(values))
    assert abs(values.var() - 1 / 12) < 0.002
    bins = torch.histc(values, 50, 0, 1)
    assert ((bins - len(values) / 50) ** 2 / (len(values) / 50)).sum() < 85.4  # 49 degrees, p = 0.001
    rows = noise.flatten(1)
    rows = (rows - rows.mean()) / rows.std()
    # Neighbouring pixels and neighbouring keys know nothing of each other.
    for a, b in ((rows[:, 1:], rows[:, :-1]), (rows[1:], rows[:-1]), (rows[2:], rows[:-2])):
        assert abs((a * b).mean()) < 4 / math.sqrt(a.numel())


def test_noise_is_a_function_of_seed_and_key_alone():
    keys = torch.tensor([0, 5, 2**31, 2**32 + 5, 2**40 + 5, 7 * 1_281_167 + 5])
    like = torch.zeros(6, 3, 5, 4)
    noise = uniform_noise(keys, like, 3)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    assert torch.equal(uniform_noise(keys[order], like, 3), noise[order])
    assert torch.equal(torch.cat([uniform_noise(keys[i : i + 2], like[:2], 3) for i in (0, 2, 4)]), noise)
    last = like.contiguous(memory_format=torch.channels_last)
    strided = uniform_noise(keys, last, 3)
    assert strided.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(strided, noise)
    assert torch.equal(uniform_noise(keys, like.double(), 3), noise.double())
    assert uniform_noise(torch.zeros(1, dtype=torch.int64), like[:1], 0).flatten()[0] > 0  # a counter begins at 0
    # Other keys (above 32 bits too) and other seeds: about no pixel in common.
    flat = noise.flatten(1)
    for i in range(6):
        for j in range(i):
            assert (flat[i] == flat[j]).sum() <= 1
    for seed in (0, 2, 4, 2**31 - 1):
        assert (uniform_noise(keys, like, seed) == noise).sum() <= 2
    torch.manual_seed(0)
    state = torch.get_rng_state()
    uniform_noise(keys, like, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_noise_is_the_counter_written_out_in_whole_numbers():
    def mix(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    keys, seed = [0, 5, 2**31, 2**32 - 1, 2**40 + 5], 2**31 - 1
    noise = uniform_noise(torch.tensor(keys), torch.zeros(5, 3, 5, 4, dtype=torch.float64), seed).flatten(1)
    targets = random_target(torch.tensor(keys), torch.zeros(5, dtype=torch.int64), 1000, seed)
    for row, target, key in zip(noise.tolist(), targets.tolist(), keys, strict=True):
        begin = mix(mix(mix(key >> 32) ^ key % 2**32) ^ seed ^ 0x9E3779B9)
        assert row == [(mix(begin ^ i * 0x9E3779B9 % 2**32) >> 8) / 2**24 for i in range(60)]
        assert target == (1 + (mix(begin ^ 0xFFFFFFFF) * 999 >> 32)) % 1000


# --- APGD


class WrittenOut:
    """The loss of one sample for numpy, with which the papers' algorithms are written down in plain loops."""

    def __init__(self, net: nn.Module, clean: Tensor, label: Tensor):
        self.net, self.clean, self.label = net, clean.flatten().numpy(), label

    def look(self, x: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        leaf = torch.tensor(x).view(1, 3, 8, 8).requires_grad_()
        loss = F.cross_entropy(self.net(leaf), self.label[None])
        (gradient,) = torch.autograd.grad(loss, leaf)
        return float(loss.detach()), gradient.flatten().numpy()

    def project(self, x: NDArray[Any], norm: str, eps: float) -> NDArray[Any]:
        delta = x - self.clean
        if norm != "linf":
            eps *= 1 - 1e-6  # what the balls keep for rounding
        if norm == "linf":
            delta = np.clip(delta, -eps, eps)
        elif norm == "l2":
            delta = delta * min(1, eps / np.sqrt((delta**2).sum()).clip(1e-300))
        else:
            delta = self._nearest_in_l1(delta, eps)
        return np.clip(self.clean + delta, 0, 1)

    def _nearest_in_l1(self, delta: NDArray[Any], eps: float) -> NDArray[Any]:
        def shrunk(t: float) -> NDArray[Any]:
            return np.clip(np.sign(delta) * np.maximum(abs(delta) - t, 0), -self.clean, 1 - self.clean)

        low, high = 0.0, abs(delta).max()
        if abs(shrunk(0)).sum() <= eps:
            return shrunk(0)
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if abs(shrunk(middle)).sum() > eps else (low, middle)
        return shrunk(high)


def apgd_written_out(
    f: WrittenOut, x: NDArray[Any], norm: str, eps: float, steps: int, rho: float
) -> tuple[NDArray[Any], list[str]]:
    """Algorithm 1 and section 3 of arXiv 2003.01690; also what happened at the checkpoints."""
    p = [Fraction(0), Fraction(22, 100)]
    while p[-1] < 1:
        p.append(p[-1] + max(p[-1] - p[-2] - Fraction(3, 100), Fraction(6, 100)))
    checkpoints = [0, *sorted({math.ceil(each * steps) for each in p[1:]})]
    step, x_before, rises, events = 2 * eps, x, [], []
    loss, gradient = f.look(x)
    best = (loss, x, gradient)
    best_before, kept_step = loss, True
    for k in range(1, steps + 1):
        direction = np.sign(gradient) if norm == "linf" else gradient / np.sqrt((gradient**2).sum())
        z = f.project(x + step * direction, norm, eps)
        if k > 1:
            z = f.project(x + 0.75 * (z - x) + 0.25 * (x - x_before), norm, eps)
        x_before, x, loss_before = x, z, loss
        loss, gradient = f.look(x)
        rises.append(loss > loss_before)
        if loss > best[0]:
            best = (loss, x, gradient)
        if k in checkpoints:
            since = checkpoints[checkpoints.index(k) - 1]
            few_rises = sum(rises[since:k]) < rho * (k - since)
            no_news = kept_step and best[0] == best_before
            kept_step, best_before = not (few_rises or no_news), best[0]
            events.append("few rises" if few_rises else "no news" if no_news else "on")
            if not kept_step:
                step, (loss, x, gradient) = step / 2, best
    return best[1], events


@pytest.mark.parametrize("start", ["uniform", "none"])
@pytest.mark.parametrize(
    ("norm", "eps", "steps", "rho"),
    [
        ("linf", EPS, 1, 0.75),
        ("linf", EPS, 2, 0.75),
        ("linf", EPS, 3, 0.75),
        ("linf", 0.1, 40, 0.75),
        ("linf", 0.1, 40, 0.4),
        ("linf", 0.3, 100, 0.3),
        ("l2", 0.5, 2, 0.75),
        ("l2", 1.5, 40, 0.4),
    ],
)
def test_apgd_equals_its_paper_written_out(norm: Norm, eps, steps, rho, start: Literal["uniform", "none"]):
    net, pixels = steep_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    attack = APGD(norm, eps, steps, start, 3, rho)
    adversarial = attack(toy_loss(net, labels), pixels, keys)
    starts = PGD(norm, eps, eps, 0, start, seed=3)(toy_loss(net, labels), pixels, keys)
    happened = set()
    for x, found, first, label in zip(pixels, adversarial, starts, labels, strict=True):
        expected, events = apgd_written_out(WrittenOut(net, x, label), first.flatten().numpy(), norm, eps, steps, rho)
        happened |= set(events)
        np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=0, atol=1e-9)
    if steps == 40:
        assert happened >= {"few rises", "on"} | ({"no news"} if rho == 0.4 else set())


def apgd_l1_written_out(f: WrittenOut, x: NDArray[Any], eps: float, steps: int) -> tuple[NDArray[Any], list[str]]:
    """arXiv 2103.01208, section 3, on top of a step that leaves out what [0,1] blocks."""
    count, events = len(x), []
    step, top, moved = eps, 0.2 * count, count
    loss, gradient = f.look(x)
    best = (loss, x, gradient)
    for k in range(1, steps + 1):
        free = [i for i in range(count) if (x[i] < 1 if gradient[i] > 0 else x[i] > 0)]
        largest = sorted(free, key=lambda i: -abs(gradient[i]))[: max(1, round(top))]
        z = x.copy()
        z[largest] += step / len(largest) * np.sign(gradient[largest])
        x = f.project(z, "l1", eps)
        loss, gradient = f.look(x)
        if loss > best[0]:
            best = (loss, x, gradient)
        if k % max(1, int(0.04 * steps)) == 0:
            moved_before, moved = moved, int((best[1] != f.clean).sum())
            top = moved / 1.5
            if moved < 0.95 * moved_before:
                events.append("sparser")
                step, (loss, x, gradient) = eps, best
            else:
                events.append("shorter")
                step = max(step / 1.5, eps / 10)
    return best[1], events


@pytest.mark.parametrize("steps", [1, 3, 60])
def test_apgd_l1_equals_its_paper_written_out(steps):
    net, pixels = steep_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    adversarial = APGD("l1", 5.0, steps, seed=3)(toy_loss(net, labels), pixels, keys)
    starts = PGD("l1", 5.0, 5.0, 0, seed=3)(toy_loss(net, labels), pixels, keys)
    happened = []
    for x, found, first, label in zip(pixels, adversarial, starts, labels, strict=True):
        f = WrittenOut(net, x, label)
        expected, events = apgd_l1_written_out(f, first.flatten().numpy(), 5.0, steps)
        happened += events
        np.testing.assert_allclose(found.flatten().numpy(), expected, rtol=0, atol=1e-9)
    if steps == 60:
        assert set(happened) == {"sparser", "shorter"}


@pytest.mark.parametrize("norm", RADII)
def test_apgd_returns_the_highest_point_it_saw_and_looks_once_more_than_it_steps(norm: Norm):
    net, pixels = steep_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    seen: list[tuple[Tensor, Tensor]] = []

    def loss(x: Tensor) -> Tensor:
        losses = toy_loss(net, labels)(x)
        seen.append((x.detach(), losses.detach()))
        assert x.requires_grad == losses.requires_grad == (len(seen) < 8)  # the last look needs no gradient
        return losses

    adversarial = APGD(norm, 5 * RADII[norm], 7)(loss, pixels, keys)
    assert len(seen) == 8
    highest = torch.stack([losses for _, losses in seen]).argmax(0)
    assert 0 < highest.min() < 7
    for i, step in enumerate(highest.tolist()):
        assert torch.equal(adversarial[i], seen[step][0][i])


@pytest.mark.parametrize("norm", RADII)
def test_apgd_with_more_steps_is_stronger_and_with_100_stronger_than_pgd_20(norm: Norm):
    net, pixels = steep_net(), toy_pixels(32)
    _, labels, keys = toy_batch(32)
    eps = RADII[norm]

    def height(attack: Attack) -> float:
        return float(toy_loss(net, labels)(attack(toy_loss(net, labels), pixels, keys)).mean().detach())

    few, more, many = (height(APGD(norm, eps, steps)) for steps in (2, 20, 100))
    assert few < more < many
    assert many > height(PGD(norm, eps, eps / 4, 20))
    assert more > height(PGD(norm, eps, eps / 4, 20)) - 0.02 * many


# --- N-FGSM


def test_nfgsm_equals_its_formula_and_leaves_the_ball_as_far_as_it_says():
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)
    for noise in (2.0, 0.5):
        adversarial = NFGSM(EPS, 1.25 * EPS, noise, seed=4)(toy_loss(net, labels), pixels, keys)
        noisy = (pixels + noise * EPS * (2 * uniform_noise(keys, pixels, 4) - 1)).clamp(0, 1).requires_grad_()
        toy_loss(net, labels)(noisy).sum().backward()
        assert noisy.grad is not None
        expected = (noisy.detach() + 1.25 * EPS * noisy.grad.sign()).clamp(0, 1)
        torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-12)
        reach = (adversarial - pixels).abs().max()
        assert EPS < (noise + 1.2) * EPS < reach <= (noise + 1.25) * EPS + 1e-15


# --- promises of every attack


@pytest.mark.parametrize("norm", RADII)
def test_the_gaussian_start_is_near_and_in_the_ball(norm: Norm):
    pixels = toy_pixels(32)
    keys = torch.arange(32)

    def start(eps: float) -> Tensor:
        return PGD(norm, eps, eps, 0, "gaussian")(lambda x: x.sum((1, 2, 3)), pixels, keys) - pixels

    inner = (pixels > 0.01) & (pixels < 0.99)
    assert float(start(RADII[norm])[inner].std()) == pytest.approx(0.001, rel=0.05)
    small = {"linf": 5e-4, "l2": 5e-3, "l1": 0.05}[norm]
    assert 0.99 * small < norms(start(small), norm).max() <= small + 1e-16


@every_attack
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_attack_stays_where_it_may_and_leaves_the_clean_pictures_alone(attack: Any, dtype):
    net, pixels = quiet_net().to(dtype), toy_pixels(8, dtype).contiguous(memory_format=torch.channels_last)
    _, labels, keys = toy_batch(8)
    before = pixels.clone()
    with torch.no_grad():
        adversarial = attack(toy_loss(net, labels), pixels.requires_grad_(), keys)
        assert not torch.is_grad_enabled()
    pixels = pixels.detach()
    assert torch.equal(pixels, before)
    assert not adversarial.requires_grad
    assert adversarial.dtype == dtype
    assert adversarial.is_contiguous(memory_format=torch.channels_last)
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    reach = norms(adversarial.double() - pixels.double(), getattr(attack, "norm", "linf"))
    assert reach.min() > attack.eps / 2
    if not isinstance(attack, NFGSM):
        assert reach.max() <= attack.eps + (1e-16 if dtype == torch.float64 else 0)
    assert all(p.grad is None for p in net.parameters())


@every_attack
def test_no_attack_waits_for_the_device(attack):
    """Tensors without numbers: whatever would have to be read on the host, or decide a shape, raises."""
    with FakeTensorMode():
        net, pixels = ToyNet("group"), torch.rand(4, 3, 8, 8)
        adversarial = attack(toy_loss(net, torch.arange(4) % 3), pixels, torch.arange(4))
        assert adversarial.shape == pixels.shape
        with pytest.raises(DataDependentOutputException):
            adversarial.sum().item()


@every_attack
def test_weights_get_their_gradient_after_an_attack_in_the_same_autocast_region(attack):
    """Autocast keeps its bf16 copies of the weights: ones made without a graph would cut the training pass off."""
    net, pixels = quiet_net().float(), toy_pixels(8, torch.float32)
    _, labels, keys = toy_batch(8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adversarial = attack(toy_loss(net, labels), pixels, keys)
        F.cross_entropy(net(adversarial), labels).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


@every_attack
def test_an_attack_is_the_same_in_any_split_of_the_batch_and_differs_between_epochs(attack):
    net, pixels = quiet_net(), toy_pixels(8)
    _, labels, keys = toy_batch(8)

    def run(part: slice, shift: int = 0) -> Tensor:
        return attack(toy_loss(net, labels[part]), pixels[part], keys[part] + shift)

    whole = run(slice(None))
    torch.testing.assert_close(torch.cat([run(slice(0, 3)), run(slice(3, 8))]), whole, rtol=0, atol=1e-12)
    num_samples = 50_000
    assert norms(run(slice(None), num_samples) - whole, "linf").min() > 1e-6


def test_random_targets_are_uniform_over_the_other_classes():
    count, num_classes = 20_000, 7
    keys, labels = torch.arange(count), torch.arange(count) // 11 % num_classes
    targets = random_target(keys, labels, num_classes, 3)
    assert targets.dtype == torch.int64
    assert (targets != labels).all()
    assert targets.min() == 0
    assert targets.max() == num_classes - 1
    for label in range(num_classes):
        bins = targets[labels == label].bincount(minlength=num_classes).double()
        expected = bins.sum() / (num_classes - 1)
        bins[label] = expected
        assert ((bins - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees, p = 0.001
    # Of seed and key alone, and nothing to do with the noise of the same key.
    order = torch.randperm(count)
    assert torch.equal(random_target(keys[order], labels[order], num_classes, 3), targets[order])
    assert (random_target(keys, labels, num_classes, 4) != targets).double().mean() > 0.8
    offsets = ((targets - labels) % num_classes).double()
    noise = uniform_noise(keys, torch.zeros(count, 3, 2, 2, dtype=torch.float64), 3).flatten(1)
    both = torch.corrcoef(torch.cat([offsets[:, None], noise], 1).T)[0, 1:]
    assert both.abs().max() < 4 / math.sqrt(count)


def test_random_targets_at_the_edges():
    keys, labels = torch.tensor([0, 2**40, 5]), torch.tensor([0, 1, 1])
    assert torch.equal(random_target(keys, labels, 2, 0), 1 - labels)
    with pytest.raises(ValueError, match=r"^num_classes: 1: "):
        random_target(keys, torch.zeros(3, dtype=torch.int64), 1, 0)


def test_a_targeted_attack_reaches_its_class():
    net, pixels = quiet_net(), toy_pixels(16)
    _, labels, keys = toy_batch(16)
    targets = random_target(keys, labels, 3, 0)
    adversarial = APGD("linf", 0.3, 30)(lambda x: -toy_loss(net, targets)(x), pixels, keys)
    before, after = ((net(x).argmax(1) == targets).double().mean() for x in (pixels, adversarial))
    assert after > before + 0.4


def test_input_gradient_leaves_weights_and_callers_gradient_mode_alone():
    net, pixels = quiet_net(), toy_pixels(4)
    labels = torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        gradient = input_gradient(toy_loss(net, labels), pixels)
        assert not torch.is_grad_enabled()
    assert all(p.grad is None for p in net.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert pixels.grad is None
    assert not pixels.requires_grad
    # Central differences along a random direction.
    direction = torch.randn_like(pixels)
    loss = toy_loss(net, labels)
    slope = (loss(pixels + 1e-5 * direction) - loss(pixels - 1e-5 * direction)).sum() / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("norm", RADII)
def test_the_attack_climbs_the_loss_and_more_steps_climb_further(norm: Norm):
    net, eps = quiet_net(), RADII[norm]
    images, labels, keys = toy_batch(32)
    pixels = images.double() / 255

    def loss_after(steps: int) -> float:
        adversarial = PGD(norm, eps, eps / 3, steps)(toy_loss(net, labels), pixels, keys) if steps else pixels
        return float(toy_loss(net, labels)(adversarial).sum().detach())

    clean, one, many = (loss_after(steps) for steps in (0, 1, 8))
    start = PGD(norm, eps, eps, 0)(toy_loss(net, labels), pixels, keys)
    noise_only = float(toy_loss(net, labels)(start).sum().detach())
    assert many > one > clean
    assert many - clean > 3 * abs(noise_only - clean)
