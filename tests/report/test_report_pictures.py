"""The attacked pictures against a loop written out over them, and what is kept of them."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from report_runs import record, trained_run, written_run
from toys import BlotchSource, Sets

from arat_dist.attacks import PGD
from arat_dist.errors import UserError
from arat_dist.report.gallery import amplification, perturbations
from arat_dist.report.pictures import FACTORS, Attacked, attack_run, attack_target, choose
from arat_dist.run import Run
from arat_dist.targets import open_target

VAL = BlotchSource(23, 1)


def ignore(*_: Any) -> None:
    pass


@pytest.fixture(scope="module")
def attacked(trained) -> Attacked:
    return attack_run(record(trained), limit=11, num_shown=4, on_progress=ignore)


def test_pictures_break_where_a_written_out_loop_breaks_them(attacked, trained):
    target = open_target(trained.folder.uri)
    net, eps = target.classifier, 0.05
    assert attacked.samples.tolist() == [n * 23 // 11 for n in range(11)]
    assert attacked.radii.tolist() == [factor * eps for factor in FACTORS]
    assert attacked.eps == eps
    with net.branch("adv"):
        for at, index in enumerate(attacked.samples.tolist()):
            picture, label = VAL[index]
            x, y = torch.tensor(picture).permute(2, 0, 1)[None].float() / 255, torch.tensor([label])
            expected = np.inf if int(net(x).argmax()) == label else 0.0
            for radius in attacked.radii if expected else ():
                attack = PGD("linf", radius, radius / 4, 20)
                moved = attack(lambda x, y=y: F.cross_entropy(net(x), y, reduction="none"), x, torch.tensor([index]))
                if int(net(moved).argmax()) != label:
                    expected = radius
                    break
            assert attacked.broken_at[at] == expected
            assert attacked.labels[at] == label
    assert len(set(attacked.broken_at.tolist())) > 2


def test_the_curve_is_the_share_that_stands(attacked):
    radii, shares = attacked.curve()
    assert radii[0] == 0
    assert shares[0] == attacked.is_clean_right.mean()
    for radius, share in zip(radii, shares, strict=True):
        assert share == np.mean([broken > radius for broken in attacked.broken_at])
    assert all(np.diff(shares) <= 0)
    assert shares[list(radii).index(attacked.eps)] == attacked.is_robust.mean()


def test_shown_pictures_are_those_of_the_set_and_stay_in_the_ball(attacked, trained):
    assert len(attacked.shown) == 4
    samples = attacked.samples[attacked.shown]
    assert all(np.array_equal(clean, VAL[index][0]) for clean, index in zip(attacked.clean, samples, strict=True))
    delta = attacked.adversarial.astype(np.float64) - attacked.clean / 255
    assert np.abs(delta).max() <= attacked.eps + 1e-6
    assert np.abs(delta).max() > attacked.eps / 2
    factor = amplification(attacked)
    assert factor == pytest.approx(0.5 / np.abs(delta).max(), rel=1e-4)
    np.testing.assert_allclose(perturbations(attacked), 0.5 + factor * delta, atol=1e-4)
    target = open_target(trained.folder.uri)
    net, attack = target.classifier, PGD("linf", attacked.eps, attacked.eps / 4, 20, seed=target.config.seed)
    with net.branch("adv"):
        for at, index in enumerate(samples.tolist()):
            x, y = torch.tensor(VAL[index][0]).permute(2, 0, 1)[None].float() / 255, torch.tensor([VAL[index][1]])
            moved = attack(lambda x, y=y: F.cross_entropy(net(x), y, reduction="none"), x, torch.tensor([index]))
            # A gradient near zero may have another sign in a batch of another size.
            same = np.isclose(moved[0].permute(1, 2, 0), attacked.adversarial[at], atol=1e-5)
            assert same.mean() > 0.9
    pixels = torch.tensor(attacked.adversarial).permute(0, 3, 1, 2)
    with torch.no_grad(), net.branch("adv"):
        shares = net(pixels).softmax(1)
    assert shares.argmax(1).tolist() == attacked.adversarial_predictions.tolist()
    np.testing.assert_allclose(shares.amax(1), attacked.confidences[:, 1], atol=1e-4)


@pytest.mark.parametrize(
    ("broken_at", "count", "expected"),
    [
        ([2, 2, 2, 9, 9, 9], 4, [0, 1, 3, 4]),  # half and half, evenly spaced among their kind
        ([2, 9, 9, 9, 9, 9], 4, [0, 1, 2, 4]),
        ([9, 2, 2, 2, 2, 2], 4, [0, 1, 2, 4]),
        ([0, 0, 9, 2], 4, [0, 1, 2, 3]),
        ([0, 0, 9, 2], 2, [2, 3]),
        ([0, 0, 0], 2, [0, 1]),
        ([1, 9], 9, [0, 1]),
        ([1, 9], 0, []),
    ],
)
def test_as_many_that_fell_as_stood_are_chosen(broken_at, count, expected):
    assert choose(np.array(broken_at, float), eps=3, count=count).tolist() == expected


def test_what_was_asked_before_is_read_and_anything_else_computed(trained, attacked, monkeypatch):
    def refuse(*_: Any, **__: Any) -> Attacked:
        raise AssertionError("attacked again")

    monkeypatch.setattr("arat_dist.report.pictures.attack_target", refuse)
    again = attack_run(record(trained), limit=11, num_shown=4, on_progress=ignore)
    for name, value in vars(attacked).items():
        np.testing.assert_array_equal(getattr(again, name), value)
        assert type(getattr(again, name)) is type(value)
    for changed in ({"limit": 12, "num_shown": 4}, {"limit": 11, "num_shown": 5}):
        with pytest.raises(AssertionError, match="attacked again"):
            attack_run(record(trained), **changed, on_progress=ignore)
    read = record(trained)
    other_eps = read.recipe.model_copy(update={"eval": read.recipe.eval.model_copy(update={"eps": 0.1})})
    with pytest.raises(AssertionError, match="attacked again"):
        attack_run(replace(read, recipe=other_eps), limit=11, num_shown=4, on_progress=ignore)


def test_another_checkpoint_other_data_and_half_a_file_are_no_match(sets: Sets, tmp_path, monkeypatch):
    run = trained_run(sets, tmp_path)
    asked: dict[str, Any] = {"limit": 3, "num_shown": 1, "on_progress": ignore}
    attack_run(record(run), **asked)
    calls = []
    monkeypatch.setattr(
        "arat_dist.report.pictures.attack_target", lambda *a, **k: calls.append(1) or attack_target(*a, **k)
    )
    attack_run(record(run), **asked)
    assert calls == []
    (kept,) = (run.folder / "report").names()
    content = (run.folder / "report").read(kept)
    (run.folder / "report").write(kept, content[: len(content) // 2])
    attack_run(record(run), **asked)
    assert len(calls) == 1
    manifest = record(run).manifest
    assert manifest is not None
    changed = record(run)
    vars(changed)["manifest"] = manifest.model_copy(update={"sha256": "c" * 64})
    attack_run(changed, **asked)
    assert len(calls) == 2
    vars(changed)["manifest"] = None  # the set is gone: what is kept is all there is
    attack_run(changed, **asked)
    assert len(calls) == 2
    run.checkpoints.delete(run.checkpoints.names()[-1])
    attack_run(record(run), **asked)
    assert len(calls) == 3


def test_a_run_that_can_only_be_read_is_attacked_all_the_same(trained, monkeypatch, caplog):
    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("arat_dist.storage.Storage.write", refuse)
    assert len(attack_run(record(trained), limit=2, num_shown=1, on_progress=ignore).samples) == 2
    assert "Read-only file system; the next report attacks again" in caplog.text


def test_no_pictures_are_a_curve_alone(trained):
    attacked = attack_run(record(trained), limit=3, num_shown=0, on_progress=ignore)
    assert attacked.clean.shape == (0, 0, 0, 3)
    assert len(attacked.curve()[0]) == len(FACTORS) + 1


def test_progress_comes_to_its_end(trained):
    seen: list[tuple[int, int]] = []
    target = open_target(trained.folder.uri)
    attack_target(target, limit=7, num_shown=2, on_progress=lambda *at: seen.append(at))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (7 * len(FACTORS), 7 * len(FACTORS))


def test_a_ball_of_all_pictures_is_the_last(trained):
    target = open_target(trained.folder.uri)
    large = replace(target, config=target.config.model_copy(update={"eps": 0.6}))
    attacked = attack_target(large, limit=2, num_shown=0, on_progress=ignore)
    assert attacked.radii.tolist() == [factor * 0.6 for factor in (0.25, 0.5, 0.75, 1, 1.5)]


def test_a_run_without_checkpoint_or_data_is_refused(sets: Sets, tmp_path, trained):
    with pytest.raises(UserError, match="no whole checkpoint yet"):
        attack_run(record(written_run(tmp_path, "new")), limit=2, num_shown=1, on_progress=ignore)
    moved = Run(str(tmp_path), "moved")
    for step in trained.checkpoints.names():
        for name in (trained.checkpoints / step).names():
            (moved.checkpoints / step).write(name, (trained.checkpoints / step).read(name))
    recipe = trained.recipe()
    moved.open(recipe.model_copy(update={"data": recipe.data.model_copy(update={"val": "gone.beton"})}), "a" * 64)
    with pytest.raises(UserError, match=r"gone\.beton: no such file"):
        attack_run(record(moved), limit=2, num_shown=1, on_progress=ignore)
