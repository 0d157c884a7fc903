"""ARAT against METHOD's formula written out in float64: own forward of the net, own batch statistics, own cosine."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from toys import toy_batch, toy_classifier, toy_setting

from arat_dist.attacks import PGD
from arat_dist.config import ARATConfig
from arat_dist.models.taps import Recorder
from arat_dist.objectives import ARAT
from arat_dist.objectives.base import to_pixels

Tensor = torch.Tensor
ATTACK = PGD("linf", 0.1, 0.04, 3, seed=5)
SUM: Callable[[Tensor], Tensor] = lambda x: x  # noqa: E731 - one rank's all-reduce


def build(*, norm_stats: Any = "batch", precision: str = "fp32", norm: Any = "batch", **keys: Any) -> ARAT:
    config = ARATConfig.model_validate({"name": "arat", "gamma": 3, "balance": "fixed", "adv_weight": 0.25, **keys})
    classifier = toy_classifier(split=config.split_norm != "none", norm=norm)
    setting = toy_setting(ARAT, norm_stats=norm_stats, precision=precision, label_smoothing=config.label_smoothing)
    arat = ARAT(classifier, setting, config).double().train()
    with torch.no_grad():
        for parameter in arat.predictors.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return arat


def normed(x: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    """BatchNorm with the batch's own statistics, in plain sums."""
    dims = [0, 2, 3][: x.ndim - 1]
    mean = x.mean(dims, keepdim=True)
    var = ((x - mean) ** 2).mean(dims, keepdim=True)
    shape = [1, -1, 1, 1][: x.ndim]
    scale, shift = weights[f"{name}.weight"].view(shape), weights[f"{name}.bias"].view(shape)
    return (x - mean) / torch.sqrt(var + 1e-5) * scale + shift


def written_out_net(arat: ARAT, pixels: Tensor, branch: str) -> tuple[Tensor, list[Tensor]]:
    """Logits and pooled features of the toy net's branch, from its weights alone."""
    w = dict(arat.classifier.backbone.named_parameters())
    norms = [f"norm{i}.{branch}" if arat.classifier.is_split else f"norm{i}" for i in (1, 2)]
    x = (pixels - arat.classifier.mean) / arat.classifier.std
    first = normed(F.conv2d(x, w["conv1.weight"], padding=1), w, norms[0]).clamp(min=0)
    second = normed(F.conv2d(first, w["conv2.weight"], w["conv2.bias"], stride=2), w, norms[1]).clamp(min=0)
    features = [map_.sum((2, 3)) / (map_.shape[2] * map_.shape[3]) for map_ in (first, second)]
    return features[1] @ w["fc.weight"].T + w["fc.bias"], features


def written_out_ce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    picked = torch.stack([row[label] for row, label in zip(logs, labels, strict=True)])
    return -((1 - smoothing) * picked + smoothing * logs.mean(1)).mean()


def written_out_loss(arat: ARAT, pixels: Tensor, adversarial: Tensor, labels: Tensor) -> Tensor:
    """w_adv CE(f_adv(x'),y) + w_cln CE(f_cln(x),y) + gamma/|L| sum_l Dist(h_l(z'_l), sg z_l), every switch included."""
    config = arat.config
    adv_logits, adv = written_out_net(arat, adversarial, "adv")
    clean_logits, clean = written_out_net(arat, pixels, "clean")

    def predict(level: int, z: Tensor) -> Tensor:
        if not config.predictor:
            return z
        w = dict(arat.predictors[level].named_parameters())
        hidden = normed(z @ w["0.weight"].T, w, "1").clamp(min=0)
        return hidden @ w["3.weight"].T + w["3.bias"]

    def distance(level: int, follower: Tensor, leader: Tensor) -> Tensor:
        follower = predict(level, follower)
        leader = leader.detach() if config.stop_gradient else leader
        if config.distance == "mse":
            return ((follower - leader) ** 2).mean()
        lengths = (follower**2).sum(1).sqrt() * (leader**2).sum(1).sqrt()
        return (1 - (follower * leader).sum(1) / lengths).mean()

    total = sum(distance(i, adv[i], clean[i]) for i in range(2)) / 2
    if config.symmetric:
        total = total / 2 + sum(distance(i, clean[i], adv[i]) for i in range(2)) / 4
    weight, smoothing = config.adv_weight, config.label_smoothing
    ce_adv, ce_clean = (written_out_ce(z, labels, smoothing) for z in (adv_logits, clean_logits))
    return weight * ce_adv + (1 - weight) * ce_clean + config.gamma * total


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"stop_gradient": False},
        {"symmetric": True},
        {"symmetric": True, "stop_gradient": False},
        {"predictor": False},
        {"predictor": False, "symmetric": True},
        {"distance": "mse"},
        {"split_norm": "none"},
        {"gamma": 0},
        {"adv_weight": 1.0},
        {"label_smoothing": 0.1},
        {"split_norm": "none", "predictor": False, "stop_gradient": False, "distance": "mse"},
    ],
    ids=str,
)
def test_loss_and_gradients_equal_the_formula_written_out(switches):
    arat = build(**switches)
    images, labels, keys = toy_batch()
    pixels = to_pixels(images, torch.float64)
    adversarial = arat.perturb(pixels, labels, keys)
    loss = arat(images, labels, keys).loss
    expected = written_out_loss(arat, pixels, adversarial, labels)
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
    names, parameters = zip(*arat.named_parameters(), strict=True)
    got = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, a, b in zip(names, got, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


def test_the_predictor_is_the_papers_bottleneck_one_a_tap():
    arat = build()
    shapes = [{name: tuple(p.shape) for name, p in h.named_parameters()} for h in arat.predictors]
    bottleneck = {"0.weight": (2, 8), "1.weight": (2,), "1.bias": (2,), "3.weight": (8, 2), "3.bias": (8,)}
    assert shapes == [bottleneck] * 2
    assert len(build(predictor=False).predictors) == 0


def test_the_switches_are_no_synonyms():
    images, labels, keys = toy_batch()
    cases: list[dict[str, Any]] = [{}, {"symmetric": True}, {"predictor": False}, {"distance": "mse"}, {"gamma": 0}]
    losses = [float(build(**switches)(images, labels, keys).loss.detach()) for switches in cases]
    assert len({round(loss, 6) for loss in losses}) == len(losses)


def gradients_of_invariance(**switches: Any) -> dict[str, Tensor | None]:
    arat = build(**switches)
    images, labels, keys = toy_batch()
    out = {}
    pixels = to_pixels(images, torch.float64)
    adversarial = arat.perturb(pixels, labels, keys)
    with arat.classifier.branch("adv"):
        _, adv = arat.classifier.forward_with_taps(adversarial)
    with arat.classifier.branch("clean"):
        _, clean = arat.classifier.forward_with_taps(pixels)
    invariance = arat.invariance(adv, clean)
    grads = torch.autograd.grad(invariance, list(arat.parameters()), allow_unused=True)
    for (name, _), grad in zip(arat.named_parameters(), grads, strict=True):
        out[name] = grad
    return out


def test_stop_gradient_keeps_the_invariance_loss_off_the_clean_branch():
    def moved(grads: dict[str, Tensor | None], part: str) -> set[bool]:
        return {grad is not None and bool(grad.abs().sum() > 0) for name, grad in grads.items() if part in name}

    stopped = gradients_of_invariance()
    assert moved(stopped, ".clean.") == {False}
    assert moved(stopped, "norm1.adv.weight") == moved(stopped, "predictors.0.3") == {True}
    assert moved(gradients_of_invariance(stop_gradient=False), "norm1.clean.weight") == {True}
    assert moved(gradients_of_invariance(symmetric=True), "norm1.clean.weight") == {True}
    assert moved(gradients_of_invariance(symmetric=True, predictor=False), "norm1.clean.weight") == {True}


def test_symmetric_with_stop_gradient_leaks_no_gradient_through_its_targets():
    """Without a predictor both directions are equal, so the symmetric loss is half of each side's own gradient."""
    one_sided = gradients_of_invariance(predictor=False)
    both = gradients_of_invariance(predictor=False, symmetric=True)
    for name in (n for n in both if ".adv." in n):
        whole, half = one_sided[name], both[name]
        assert whole is not None
        assert half is not None
        torch.testing.assert_close(half, whole / 2, rtol=0, atol=1e-12)


def test_the_clean_branchs_features_are_those_of_the_clean_pictures():
    arat = build()
    images, labels, keys = toy_batch()
    seen: list[list[Tensor]] = []
    original = arat.invariance
    arat.invariance = lambda adv, clean: (seen.extend([adv, clean]), original(adv, clean))[1]  # pyright: ignore
    before = images.clone()
    arat(images, labels, keys)
    assert torch.equal(images, before)
    _, expected = written_out_net(arat, to_pixels(images, torch.float64), "clean")
    for feature, wanted in zip(seen[1], expected, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_stats", ["batch", "running"])
def test_the_attack_changes_no_buffer_no_flag_and_no_gradient_and_climbs_the_adv_branch(norm_stats):
    arat = build(norm_stats=norm_stats)
    images, labels, keys = toy_batch()
    arat(images, labels, keys)  # running statistics away from 0 and 1
    before = {name: buffer.clone() for name, buffer in arat.named_buffers()}
    flags = [module.training for module in arat.modules()]
    pixels = to_pixels(images, torch.float64)
    kept = pixels.clone()
    adversarial = arat.perturb(pixels, labels, keys)
    assert all(torch.equal(before[name], buffer) for name, buffer in arat.named_buffers())
    assert [module.training for module in arat.modules()] == flags
    assert all(p.grad is None for p in arat.parameters())
    assert torch.equal(pixels, kept)

    def loss(x: Tensor, branch: Any) -> Tensor:
        with torch.no_grad(), arat._attack_mode(norm_stats), arat.classifier.branch(branch):
            return F.cross_entropy(arat.classifier(x), labels)

    start = PGD("linf", 0.1, 0.04, 0, seed=5)(lambda x: x.sum((1, 2, 3)), pixels, keys)
    assert loss(adversarial, "adv") > loss(start, "adv") + 0.05
    # The gradient is the adv branch's: the same attack on the clean branch is another.
    with arat._attack_mode(norm_stats), arat.classifier.branch("clean"):
        other = ATTACK(lambda x: F.cross_entropy(arat.classifier(x), labels, reduction="none"), pixels, keys)
    assert loss(adversarial, "adv") > loss(other, "adv")


def test_norm_stats_is_what_the_attack_normalises_with():
    """With running statistics a sample's attack knows nothing of its batch; with the batch's it does."""
    images, labels, keys = toy_batch()
    for norm_stats, alone_alike in (("running", True), ("batch", False)):
        arat = build(norm_stats=norm_stats)
        pixels = to_pixels(images, torch.float64)
        whole = arat.perturb(pixels, labels, keys)
        half = arat.perturb(pixels[:6], labels[:6], keys[:6])
        assert torch.allclose(whole[:6], half, rtol=0, atol=1e-12) == alone_alike


def test_a_step_updates_each_branch_once_with_its_own_pictures():
    arat = build()
    images, labels, keys = toy_batch()
    adversarial = arat.perturb(to_pixels(images, torch.float64), labels, keys)
    arat(images, labels, keys)
    for branch, pixels in (("adv", adversarial), ("clean", to_pixels(images, torch.float64))):
        norm = arat.classifier.backbone.get_submodule(f"norm1.{branch}")
        weight = dict(arat.classifier.backbone.named_parameters())["conv1.weight"]
        maps = F.conv2d((pixels - arat.classifier.mean) / arat.classifier.std, weight, padding=1)
        mean = maps.mean((0, 2, 3)).detach()
        torch.testing.assert_close(norm.running_mean, 0.1 * mean, rtol=0, atol=1e-12)
        assert norm.num_batches_tracked == 1


def test_balance_is_the_running_accuracy_of_the_epochs_own_clean_passes():
    arat = build(balance="auto", adv_weight=0.25)
    optimizer = torch.optim.SGD(arat.parameters(), lr=0.05)
    for epoch, sizes in enumerate(([12, 7, 2], [5, 9])):
        num_right = num_seen = 0
        weight_before = float(arat.adv_weight)
        for i, size in enumerate(sizes):
            images, labels, keys = toy_batch(size, seed=10 * epoch + i + 2)
            clean_logits, _ = written_out_net(arat, to_pixels(images, torch.float64), "clean")
            num_right += sum(int(row.argmax() == label) for row, label in zip(clean_logits, labels, strict=True))
            num_seen += size
            out = arat(images, labels, keys)
            assert float(arat.adv_weight) == float(out.metrics["adv_weight"]) == weight_before
            out.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i == 0:  # a checkpoint amid the epoch, twice
                arat.sync(SUM)
                arat.sync(SUM)
        if epoch == 0:
            assert weight_before == 0.25
        arat.end_epoch(SUM)
        assert 0 < num_right < num_seen
        assert float(arat.adv_weight) == pytest.approx(num_right / num_seen, abs=1e-7)
        assert not arat.counts.any()
        assert not arat.local_counts.any()


def test_balance_counts_all_ranks_and_fixed_stays():
    images, labels, keys = toy_batch()
    arat = build(balance="auto")
    arat(images, labels, keys)
    own = arat.local_counts.clone()
    arat.end_epoch(lambda counts: counts + torch.tensor([1, 30]))
    assert float(arat.adv_weight) == pytest.approx((int(own[0]) + 1) / (12 + 30))
    fixed = build(balance="fixed", adv_weight=0.3)
    fixed(images, labels, keys)
    fixed.end_epoch(SUM)
    assert float(fixed.adv_weight) == pytest.approx(0.3)


def test_an_epoch_in_which_nothing_was_counted_leaves_the_balance():
    """All of its steps were skipped: 0 of 0 is no accuracy."""
    arat = build(balance="auto")
    before = float(arat.adv_weight)
    arat.end_epoch(SUM)
    assert float(arat.adv_weight) == before


def test_the_attacks_start_is_the_same_however_the_batch_is_dealt():
    arat = build(norm_stats="running")
    images, labels, keys = toy_batch()
    pixels = to_pixels(images, torch.float64)
    whole = arat.perturb(pixels, labels, keys)
    parts = [arat.perturb(pixels[p], labels[p], keys[p]) for p in (slice(0, 4), slice(4, 10), slice(10, 12))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-12)
    assert not torch.allclose(arat.perturb(pixels, labels, keys + 12), whole, atol=1e-3)


def test_bf16_is_close_to_fp32_and_every_weight_gets_its_gradient():
    images, labels, keys = toy_batch(64)
    outs, grads = [], []
    for precision in ("fp32", "bf16"):
        arat = build(precision=precision).float()
        # One step small enough that the sign of a tiny gradient matters little.
        arat._attack = PGD("linf", 0.01, 0.01, 1, start="none")
        out = arat(images, labels, keys)
        assert out.loss.dtype == torch.float32
        out.loss.backward()
        outs.append(out)
        grads.append({name: p.grad for name, p in arat.named_parameters()})
        assert all(p.dtype == torch.float32 for p in arat.parameters())
    torch.testing.assert_close(outs[1].loss, outs[0].loss, rtol=0.02, atol=0.02)
    assert outs[1].loss != outs[0].loss
    for name, gradient in grads[0].items():
        assert gradient is not None, name
        assert grads[1][name] is not None, name
        # Biases in front of a BatchNorm have no gradient but rounding.
        if gradient.norm() > 1e-3:
            assert F.cosine_similarity(gradient.flatten(), grads[1][name].flatten(), dim=0) > 0.95, name


def test_metrics_are_the_parts_of_the_loss():
    arat = build()
    images, labels, keys = toy_batch()
    out = arat(images, labels, keys)
    loss, metrics = out.loss, out.metrics
    parts = (metrics[f"loss_{part}"] for part in ("adv", "clean", "invariance"))
    torch.testing.assert_close(loss, sum(w * p for w, p in zip((0.25, 0.75, 3), parts, strict=True)), rtol=0, atol=1e-7)
    assert all(m.ndim == 0 and not m.requires_grad for m in metrics.values())
    logits, _ = written_out_net(arat, to_pixels(images, torch.float64), "clean")
    assert float(metrics["clean_accuracy"]) == pytest.approx(float((logits.argmax(1) == labels).double().mean()))


def test_without_taps_and_gamma_there_is_no_invariance_term():
    arat = build(gamma=0, taps=[], predictor=False)
    arat.classifier.recorder = Recorder(arat.classifier.backbone, ())
    images, labels, keys = toy_batch()
    out = arat(images, labels, keys)
    assert float(out.metrics["loss_invariance"]) == 0
    expected = 0.25 * out.metrics["loss_adv"] + 0.75 * out.metrics["loss_clean"]
    torch.testing.assert_close(out.loss.detach(), expected)
