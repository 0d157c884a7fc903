"""The other methods: losses and gradients against their formulas written out, attacks against their authors'."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from toys import Sets, toy_batch, toy_classifier, toy_recipe, toy_setting

from arat_dist.attacks import NFGSM, PGD, random_target, uniform_noise
from arat_dist.config import ARRESTConfig, LBGATConfig, MARTConfig, TRADESConfig
from arat_dist.losses import cross_entropy, targeted_dlr
from arat_dist.models.classifier import Classifier
from arat_dist.objectives import ARREST, AT, LBGAT, MART, METHODS, TRADES, Standard, build_objective
from arat_dist.objectives.base import Objective, to_pixels
from arat_dist.objectives.lbgat import LBGAT as _LBGAT

Tensor = torch.Tensor
EPS, STEP, STEPS, SEED = 0.1, 0.04, 3, 5


def written_out_ce(logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    logs = logits - logits.exp().sum(1, keepdim=True).log()
    shares = targets if targets.ndim == 2 else torch.eye(logits.shape[1], dtype=logits.dtype)[targets]
    shares = (1 - smoothing) * shares + smoothing / logits.shape[1]
    return -(shares * logs).sum(1).mean()


def written_out_kl(p_logits: Tensor, q_logits: Tensor) -> Tensor:
    """KL(p || q) of each sample."""
    p, q = (z.exp() / z.exp().sum(1, keepdim=True) for z in (p_logits, q_logits))
    return (p * (p.log() - q.log())).sum(1)


def eval_mode(net: Classifier) -> Classifier:
    """A copy that normalises with the running statistics."""
    return copy.deepcopy(net).eval()


def batch_mode(net: Classifier) -> Classifier:
    """A copy that normalises with the batch's statistics; what becomes of its running ones is nobody's concern."""
    return copy.deepcopy(net).train()


def written_out_attack(loss: Callable[[Tensor], Tensor], pixels: Tensor, start: Tensor) -> Tensor:
    """Madry's PGD from a start, in a loop of plain sums."""
    x = start
    for _ in range(STEPS):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(x).sum(), x)
        x = x.detach() + STEP * gradient.sign()
        x = torch.min(torch.max(x, pixels - EPS), pixels + EPS).clamp(0, 1)
    return x.detach()


def gaussian_start(pixels: Tensor, keys: Tensor) -> Tensor:
    """0.001 N(0,1) around the picture, out of the same uniform numbers."""
    uniform = uniform_noise(keys, pixels, SEED)
    normal = math.sqrt(2) * torch.erfinv((2 * uniform - 1).clamp(-1 + 2**-24, 1 - 2**-24))
    return (pixels + 0.001 * normal).clamp(0, 1)


def uniform_start(pixels: Tensor, keys: Tensor) -> Tensor:
    return (pixels + EPS * (2 * uniform_noise(keys, pixels, SEED) - 1)).clamp(0, 1)


def build(name: str, smoothing: float = 0.0, **keys: Any) -> Objective:
    """The method on the toy net, in training mode, running statistics unlike any batch's."""
    classifier = toy_classifier(split=False)
    for module in classifier.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.get_buffer("running_mean").uniform_(-0.5, 0.5)
            module.get_buffer("running_var").uniform_(0.5, 2)
    setting = toy_setting(METHODS[name], label_smoothing=smoothing, seed=SEED)
    config: Any = {"name": name, **keys}
    match name:
        case "trades":
            objective = TRADES(classifier, setting, TRADESConfig.model_validate(config))
        case "mart":
            objective = MART(classifier, setting, MARTConfig.model_validate(config))
        case "lbgat":
            teacher = toy_classifier(split=False, seed=7)
            objective = LBGAT(classifier, setting, LBGATConfig.model_validate(config), teacher)
        case "arrest":
            objective = ARREST(classifier, setting, ARRESTConfig.model_validate(config))
            with torch.no_grad():
                for parameter in classifier.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        case "at":
            objective = AT(classifier, setting)
        case _:
            objective = Standard(classifier, setting)
    return objective.train()


def adversarial_pictures(name: str, objective: Objective, pixels: Tensor, targets: Tensor, keys: Tensor) -> Tensor:
    """The attack that each method's authors train with."""
    net = objective.classifier
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    if name in ("trades", "lbgat"):
        net = eval_mode(net)
        clean = net(pixels).detach()
        return written_out_attack(lambda x: written_out_kl(clean, net(x)), pixels, gaussian_start(pixels, keys))
    net = eval_mode(net) if name == "mart" else batch_mode(net)

    def ce(x: Tensor) -> Tensor:
        logs = net(x).log_softmax(1)
        return -(logs * targets).sum(1) if targets.ndim == 2 else -logs[torch.arange(len(labels)), labels]

    start = gaussian_start(pixels, keys) if name == "mart" else uniform_start(pixels, keys)
    return written_out_attack(ce, pixels, start)


def written_out_loss(name: str, objective: Any, pixels: Tensor, x: Tensor, targets: Tensor, smoothing: float) -> Tensor:
    """The formulas; every pass in training mode normalises with its own batch, so the order of passes is free."""
    f = objective.classifier
    labels = targets if targets.ndim == 1 else targets.argmax(1)
    if name == "standard":
        return written_out_ce(f(pixels), targets, smoothing)
    if name == "at":
        return written_out_ce(f(x), targets, smoothing)
    if name == "trades":
        return written_out_ce(f(pixels), targets, smoothing) + 6 * written_out_kl(f(pixels), f(x)).mean()
    if name == "mart":
        p_clean, p_adv = f(pixels).softmax(1), f(x).softmax(1)
        others = torch.stack([torch.cat([p[:y], p[y + 1 :]]).max() for p, y in zip(p_adv, labels, strict=True)])
        own = (p_clean * targets).sum(1) if targets.ndim == 2 else p_clean[torch.arange(len(labels)), labels]
        bce = written_out_ce(f(x), targets, smoothing) - torch.log(1.0001 - others).mean()
        return bce + 5 * ((1 - own) * written_out_kl(f(pixels), f(x))).mean()
    if name == "lbgat":
        loss = ((f(x) - objective.teacher(pixels)) ** 2).mean() + written_out_ce(
            objective.teacher(pixels), targets, smoothing
        )
        beta = objective._beta
        return loss + beta * written_out_kl(f(pixels), f(x)).mean() if beta else loss
    raise AssertionError(name)


def mixed_targets(labels: Tensor) -> Tensor:
    shares = torch.eye(3, dtype=torch.float64)
    return 0.7 * shares[labels] + 0.3 * shares[labels.roll(1)]


@pytest.mark.parametrize("targets", ["hard", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("name", "keys"),
    [("standard", {}), ("at", {}), ("trades", {}), ("mart", {}), ("lbgat", {}), ("lbgat", {"beta": 6})],
    ids=lambda value: str(value) if value else "",
)
def test_loss_and_gradients_equal_the_formula_written_out(name, keys, smoothing, targets):
    objective = build(name, smoothing, **keys)
    images, labels, visits = toy_batch()
    pixels = to_pixels(images, torch.float64)
    wanted = labels if targets == "hard" else mixed_targets(labels)
    x = pixels if name == "standard" else adversarial_pictures(name, objective, pixels, wanted, visits)
    if name != "standard":
        torch.testing.assert_close(objective.perturb(pixels, wanted, visits), x, rtol=0, atol=1e-10)
        assert (x - pixels).abs().max() > 0.05
    out = objective.losses(pixels, wanted, visits)
    expected = written_out_loss(name, objective, pixels, x, wanted, smoothing)
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-10)
    parameters = dict(objective.named_parameters())
    got = torch.autograd.grad(out.loss, [*parameters.values()], allow_unused=True)
    by_formula = torch.autograd.grad(expected, [*parameters.values()], allow_unused=True)
    for parameter, a, b in zip(parameters, got, by_formula, strict=True):
        assert (a is None) == (b is None), parameter
        if a is not None:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=lambda m, p=parameter: f"{p}: {m}")
    if name != "arrest":
        assert all(a is not None for a in got)  # DDP refuses a parameter without a gradient


def test_the_parts_of_a_loss_have_names_and_add_up():
    images, labels, keys = toy_batch()
    parts: dict[str, Any] = {
        "standard": lambda m: m["loss_clean"],
        "at": lambda m: m["loss_adv"],
        "trades": lambda m: m["loss_clean"] + 6 * m["loss_kl"],
        "mart": lambda m: m["loss_adv"] + 5 * m["loss_kl"],
        "lbgat": lambda m: m["loss_guide"] + m["loss_teacher"],
        "arrest": lambda m: m["loss_adv"] + 10 * m["loss_angle"],
    }
    for name, total in parts.items():
        objective = build(name)
        out = objective(images, labels, keys)
        torch.testing.assert_close(out.loss.detach(), total(out.metrics), rtol=0, atol=1e-6)
        assert all(value.ndim == 0 and not value.requires_grad for value in out.metrics.values())
        if out.terms:
            torch.testing.assert_close(sum(out.terms.values()), out.loss)


# ARREST -------------------------------------------------------------------------------------------------------------


def angle(a: Tensor, b: Tensor) -> Tensor:
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return torch.acos(cosine) / math.pi


def test_arrest_stays_near_the_frozen_net_and_replays_what_has_turned():
    images, labels, keys = toy_batch()
    pixels = to_pixels(images, torch.float64)
    objective: Any = build("arrest")
    frozen = objective.teacher
    anchor = frozen.backbone.forward_features((pixels - frozen.mean) / frozen.std).mean((2, 3)).detach()
    net: Any = eval_mode(objective.classifier)
    now = net.backbone.forward_features((pixels - net.mean) / net.std).mean((2, 3)).detach()
    turned = angle(now, anchor)
    # Half of the pictures are replayed, and none stands at the threshold, where rounding would decide.
    middle = len(turned) // 2
    threshold = float(turned.sort().values[middle - 1 : middle + 1].mean())
    objective._config = objective._config.model_copy(update={"replay_angle": threshold, "angle_weight": 2.0})

    attacked = adversarial_pictures("at", objective, pixels, labels, keys)
    noisy = uniform_start(pixels, keys)
    x = torch.where((turned > threshold).view(-1, 1, 1, 1), noisy, attacked)
    f: Any = batch_mode(objective.classifier)
    features = f.backbone.forward_features((x - f.mean) / f.std).mean((2, 3))
    expected = written_out_ce(f.backbone.fc(features), labels, 0) + 2 * angle(features, anchor).mean()
    out = objective(images, labels, keys)
    torch.testing.assert_close(out.loss, expected, rtol=0, atol=1e-10)
    assert float(out.metrics["replayed"]) == pytest.approx(float((turned > threshold).double().mean()))
    for (name, p), q in zip(objective.classifier.named_parameters(), f.parameters(), strict=True):
        a, b = torch.autograd.grad(out.loss, p, retain_graph=True), torch.autograd.grad(expected, q, retain_graph=True)
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_the_frozen_net_is_the_start_and_never_moves():
    objective: Any = build("arrest")
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    before = {k: v.clone() for k, v in objective.teacher.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    images, labels, keys = toy_batch()
    for _ in range(2):
        objective.train()(images, labels, keys).loss.backward()
        optimizer.step()
    assert not objective.teacher.training
    for key, value in objective.teacher.state_dict().items():
        assert torch.equal(value, before[key]), key
    assert not torch.equal(objective.teacher.backbone.conv1.weight, objective.classifier.backbone.conv1.weight)


# Recipes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_recipe_becomes_its_method(sets: Sets, name):
    attack = {"eps": 0.1, "step_size": 0.05, "steps": 4, "start": "uniform", "norm_stats": "running"}
    recipe = toy_recipe(sets, objective={"name": name}, attack=attack, train={"seed": 11, "precision": "bf16"})
    objective = build_objective(recipe)
    assert type(objective) is METHODS[name]
    assert objective.classifier.is_split == (name == "arat")
    assert objective._attack == PGD("linf", 0.1, 0.05, 4, "uniform", 11)
    assert objective._setting.attack is not None
    assert objective._setting.attack.norm_stats == "running"
    assert objective._dtype == torch.bfloat16


def test_lbgats_teacher_may_be_another_net(sets: Sets):
    teacher = {"name": "resnet18", "args": {"channels": [8, 8, 8, 16]}}
    objective: Any = build_objective(toy_recipe(sets, objective={"name": "lbgat", "beta": 6, "teacher": teacher}))
    assert isinstance(objective, _LBGAT)
    assert objective.teacher.backbone.num_features == 16
    assert objective.classifier.backbone.num_features == 8
    assert not any(key.startswith("classifier.teacher") for key in objective.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_mixed_pictures_and_soft_targets_train_every_method(sets: Sets, name):
    recipe = toy_recipe(sets, objective={"name": name}, data={"mixup": 0.8, "cutmix": 1.0})
    objective = build_objective(recipe).train()
    images, labels, keys = toy_batch(8, side=16)
    seen = []
    objective.classifier.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    out = objective(images, labels, keys)
    out.loss.backward()
    assert torch.isfinite(out.loss)
    plain = build_objective(toy_recipe(sets, objective={"name": name})).train()
    assert float(plain(images, labels, keys).loss.detach()) != float(out.loss.detach())


# The attack's course ------------------------------------------------------------------------------------------------


def attack_at(epoch: float, **keys: Any) -> Any:
    setting = toy_setting(AT, **keys)
    assert setting.attack is not None
    return setting.attack.at(epoch)


def test_eps_rises_in_a_line_and_the_step_with_it():
    seen = [attack_at(epoch, eps=0.1, step_size=0.04, eps_warmup_epochs=4) for epoch in (0, 1, 2, 4, 9)]
    assert [attack.eps for attack in seen] == pytest.approx([0, 0.025, 0.05, 0.1, 0.1])
    assert [attack.step_size for attack in seen] == pytest.approx([0, 0.01, 0.02, 0.04, 0.04])
    assert {attack.steps for attack in seen} == {3}


def test_steps_change_at_the_beginning_of_their_epochs():
    seen = [attack_at(epoch, steps=1, steps_from=[[2, 3], [5, 7]]).steps for epoch in (0, 1.99, 2, 4.99, 5, 99)]
    assert seen == [1, 1, 3, 3, 7, 7]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"name": "pgd", "steps": None, "step_size": None}, PGD("linf", 0.1, 0.025, 10, "uniform", 5)),
        ({"name": "fgsm", "steps": None, "step_size": None}, PGD("linf", 0.1, 0.125, 1, "uniform", 5)),
        ({"name": "nfgsm", "steps": None, "step_size": None}, NFGSM(0.1, 0.1, 2.0, 5)),
        ({"norm": "l2", "start": "gaussian"}, PGD("l2", 0.1, 0.04, 3, "gaussian", 5)),
    ],
)
def test_names_and_defaults_of_the_attack(keys, expected):
    assert attack_at(0, **keys) == expected


def test_the_losses_that_a_recipe_can_ask_for_differ_and_targeted_goes_towards_another_class():
    images, labels, keys = toy_batch(64)
    pixels = to_pixels(images, torch.float64)
    found = {}
    for kind, changes in {
        "ce": {},
        "dlr": {"loss": "dlr"},
        "kl": {"loss": "kl", "start": "gaussian"},
        "targeted": {"targeted": True},
    }.items():
        objective = AT(toy_classifier(split=False), toy_setting(AT, steps=10, norm_stats="running", **changes))
        found[kind] = objective.perturb(pixels, labels, keys)
    assert all(not torch.equal(found[a], found[b]) for a in found for b in found if a < b)
    net = toy_classifier(split=False).eval()
    own = [net(found[kind]).softmax(1)[torch.arange(64), labels].mean() for kind in ("ce", "targeted")]
    assert own[0] < own[1] < net(pixels).softmax(1)[torch.arange(64), labels].mean()


def test_a_targeted_attack_climbs_the_loss_that_it_names():
    logits = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels, keys = torch.tensor([0, 1, 2, 3, 4]), torch.arange(5)
    others = random_target(keys, labels, 6, SEED)
    for name, expected in (("ce", -cross_entropy(logits, others)), ("dlr", targeted_dlr(logits, labels, others))):
        setting = toy_setting(AT, targeted=True, loss=name).attack
        assert setting is not None
        climbed = setting.loss(lambda _: logits, torch.zeros(5, 3, 2, 2), labels, keys)
        assert torch.equal(climbed(torch.zeros(5, 3, 2, 2)), expected)


def test_the_training_attack_ignores_label_smoothing():
    images, labels, keys = toy_batch()
    pixels = to_pixels(images, torch.float64)
    plain, smoothed = (AT(toy_classifier(split=False), toy_setting(AT, label_smoothing=s)) for s in (0.0, 0.3))
    assert torch.equal(plain.perturb(pixels, labels, keys), smoothed.perturb(pixels, labels, keys))


def test_pixels_are_bytes_over_255_in_the_memory_format_given():
    images, _, _ = toy_batch()
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    pixels = to_pixels(images, torch.float64)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pixels, torch.tensor(images.numpy() / 255.0))
    assert torch.equal(images, before)
