"""Split norms and the attack mode on small nets, against plain torch in float64."""

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers.norm import LayerNorm2d
from timm.layers.norm_act import BatchNormAct2d, SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from arat_dist.errors import UserError
from arat_dist.models.split_norm import AttackMode, Branch, SplitNorm, Switch, fold_branch, split_norms


def small_net() -> Any:
    """BatchNormAct2d, an in-place ReLU, dropout, BatchNorm1d; every norm away from its initial state."""
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        BatchNormAct2d(6, act_layer=nn.ReLU),
        nn.Conv2d(6, 5, 3),
        nn.BatchNorm2d(5),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
    ).double()
    with torch.no_grad():
        for name, value in [*net.named_parameters(), *net.named_buffers()]:
            if value.is_floating_point():
                value.add_(torch.rand_like(value) if "var" in name else 0.3 * torch.randn_like(value))
    return net


def pictures(n: int = 6, size: int = 10) -> torch.Tensor:
    return torch.rand(n, 3, size, size, dtype=torch.float64)


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def flags(module: nn.Module) -> list[tuple]:
    return [(m.training, getattr(m, "track_running_stats", None)) for m in module.modules()]


@pytest.mark.parametrize("training", [False, True])
def test_both_branches_start_as_the_plain_net(training):
    plain = small_net().train(training)
    plain[5].p = 0.0
    net = copy.deepcopy(plain)
    switch = split_norms(net, "batch")
    x = pictures()
    expected = plain(x)
    for branch in ("adv", "clean"):
        with switch.use(branch):
            assert torch.equal(net(x), expected)
    # BatchNormAct2d is still one, in both branches: its ReLU shows.
    assert isinstance(net[1], SplitNorm)
    assert isinstance(net[1].adv, BatchNormAct2d)
    assert isinstance(net[1].clean.act, nn.ReLU)
    assert (net[1](net[0](x)) >= 0).all()


def test_training_one_branch_leaves_the_other_alone():
    net = small_net()
    switch = split_norms(net, "batch")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    branches: list[tuple[Branch, Branch]] = [("clean", "adv"), ("adv", "clean")]
    for trained, other in branches:
        before = snapshot(net)
        optimizer.zero_grad()
        with switch.use(trained):
            net(pictures()).square().sum().backward()
        optimizer.step()
        after = net.state_dict()
        changed = {k for k in before if not torch.equal(before[k], after[k])}
        assert not [k for k in changed if f".{other}." in k]
        assert {k for k in before if f".{trained}." in k} <= changed


def test_input_gradient_of_the_clean_branch_does_not_reach_adv_parameters():
    net = small_net()
    switch = split_norms(net, "batch")
    x = pictures().requires_grad_()
    with switch.use("clean"):
        net(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    for name, parameter in net.named_parameters():
        assert (parameter.grad is None) == (".adv." in name), name


def test_switch_is_shared_restored_and_copied_with_the_net():
    net = small_net()
    switch = split_norms(net, "batch")
    assert {id(m.switch) for m in net.modules() if isinstance(m, SplitNorm)} == {id(switch)}
    with switch.use("clean"):
        assert switch.branch == "clean"
    with pytest.raises(KeyError), switch.use("clean"):
        raise KeyError
    assert switch.branch == "adv"
    with pytest.raises(ValueError, match="adv or clean"), switch.use("dirty"):  # pyright: ignore[reportArgumentType]
        pass
    twin = copy.deepcopy(net)
    twins = {id(m.switch): m.switch for m in twin.modules() if isinstance(m, SplitNorm)}
    assert len(twins) == 1
    assert id(switch) not in twins
    with switch.use("clean"):
        assert next(iter(twins.values())).branch == "adv"


def test_a_norm_under_two_names_stays_one():
    norm = nn.BatchNorm2d(3)
    net: Any = nn.ModuleDict({"a": norm, "b": nn.Sequential(norm, nn.Identity())})
    split_norms(net, "batch")
    assert isinstance(net["a"], SplitNorm)
    assert net["b"][0] is net["a"]


def test_sync_batch_norm_keeps_kind_and_activation():
    net: Any = convert_sync_batchnorm(small_net())
    split_norms(net, "batch")
    assert isinstance(net[1].adv, SyncBatchNormAct)
    assert isinstance(net[1].clean, SyncBatchNormAct)
    assert isinstance(net[1].clean.act, nn.ReLU)
    assert type(net[3].clean) is nn.SyncBatchNorm


def test_layer_split_takes_layer_norms_too():
    net = nn.Sequential(LayerNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.RMSNorm(8))
    batch, layer = copy.deepcopy(net), copy.deepcopy(net)
    split_norms(batch, "batch")
    split_norms(layer, "layer")
    assert [isinstance(m, SplitNorm) for m in batch] == [False, False, True, False, False]
    assert [isinstance(m, SplitNorm) for m in layer] == [True, False, True, False, True]


@pytest.mark.parametrize(
    ("name", "kind", "right"),
    [
        ("resnet50_gn", "batch", "; none would be right"),
        ("resnet50_gn", "layer", "; none would be right"),
        ("vit_tiny_patch16_224", "batch", "; layer or none would be right"),
    ],
)
def test_a_split_that_the_net_cannot_give_is_one_clear_line(name, kind, right):
    net = timm.create_model(name)
    with pytest.raises(UserError) as caught:
        split_norms(net, kind)
    message = str(caught.value)
    assert message.startswith(f"objective.split_norm: {kind}: {name} has no BatchNorm")
    assert message.endswith(right)
    assert "\n" not in message


@pytest.mark.parametrize("branch", ["adv", "clean"])
def test_fold_branch_gives_the_plain_keys_and_that_branch(branch):
    plain = small_net()
    keys = list(plain.state_dict())
    net = copy.deepcopy(plain).eval()
    switch = split_norms(net, "batch")
    with torch.no_grad():
        for value in net.state_dict().values():
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    folded = fold_branch(net.state_dict(), branch)
    assert list(folded) == keys
    plain.load_state_dict(folded)
    x = pictures()
    with switch.use(branch):
        assert torch.equal(net(x), plain.eval()(x))
    with switch.use("clean" if branch == "adv" else "adv"):
        assert not torch.allclose(net(x), plain(x))
    # Both ways round: what was folded, loaded and split again is that branch twice.
    split_norms(plain, "batch")
    assert all(torch.equal(fold_branch(plain.state_dict(), b)[k], folded[k]) for b in ("adv", "clean") for k in keys)


def test_fold_branch_leaves_other_modules_called_adv_or_clean():
    state = {"a.adv.weight": torch.ones(1), "b.clean.weight": torch.ones(1), "c.weight": torch.ones(1)}
    assert fold_branch(state) == state


def make_dropless(net: Any) -> Any:
    net[5].p = 0.0
    return net


@pytest.mark.parametrize("stats", ["batch", "running"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("sync", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_attack_mode_changes_nothing_and_uses_the_statistics_it_names(stats, split, sync, training):
    net = small_net()
    # What the mode has to equal: training mode without dropout for batch, evaluation mode for running.
    reference = make_dropless(copy.deepcopy(net)).train(stats == "batch")
    net: Any = convert_sync_batchnorm(net) if sync else net
    if split:
        split_norms(net, "batch")
    net.train(training)
    net[0].eval()
    attack_mode = AttackMode(net)
    x = pictures()
    state, before = snapshot(net), flags(net)
    with attack_mode(stats):
        logits = net(x)
        again = net(x)
    assert torch.equal(logits, again)
    torch.testing.assert_close(logits, reference(x), rtol=0, atol=1e-12)
    assert flags(net) == before
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


def test_attack_mode_restores_after_an_exception_and_leaves_untracked_norms_untracked():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3), nn.Dropout(0.5))
    net[1].eval()
    attack_mode = AttackMode(net)
    before = flags(net)
    for stats in ("batch", "running"):
        with pytest.raises(KeyError), attack_mode(stats):
            raise KeyError
        assert flags(net) == before
    with pytest.raises(ValueError, match=r"attack\.norm_stats"), attack_mode("both"):
        pass
    assert flags(net) == before


def test_attack_mode_runs_attention_unfused_on_a_cpu_with_the_same_result():
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, embed_dim=48, num_classes=5
    ).double()
    pixels = torch.rand(3, 3, 32, 32, dtype=torch.float64)
    kernels: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kernels.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        plain = net(pixels)
    assert any("scaled_dot_product" in kernel for kernel in kernels)
    kernels.clear()
    with AttackMode(net)("batch"), Watch():
        attacked = net(pixels)
    assert kernels
    assert not any("scaled_dot_product" in kernel for kernel in kernels)
    torch.testing.assert_close(attacked, plain, rtol=0, atol=1e-12)
    assert all(module.fused_attn for module in net.modules() if hasattr(module, "fused_attn"))


def test_a_switch_starts_on_adv():
    assert Switch().branch == "adv"
