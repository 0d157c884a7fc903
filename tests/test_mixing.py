"""Mixup and CutMix: what becomes of each picture and its label, pixel by pixel."""

import pytest
import torch
from scipy import stats

from arat_dist.mixing import Mixing

NUM_CLASSES = 5


def batch(count: int, side: int = 12) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pictures of one number each, so that a pixel tells whose it is."""
    pixels = (
        torch.linspace(0.1, 0.9, count, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 3, side, side + 4).clone()
    )
    return pixels, torch.arange(count) % NUM_CLASSES, torch.arange(count) * 977 + 13


def own_share(targets: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return targets.gather(1, labels[:, None])[:, 0]


@pytest.mark.parametrize("count", [2, 6, 7])
def test_mixup_blends_neighbours_by_the_share_that_the_targets_say(count):
    pixels, labels, keys = batch(count)
    before = pixels.clone()
    mixed, targets = Mixing(0.8, 0, NUM_CLASSES, 3)(pixels, labels, keys)
    assert torch.equal(pixels, before)
    kept = own_share(targets, labels)
    for i in range(count):
        partner = i ^ 1 if i < count // 2 * 2 else i
        expected = kept[i] * pixels[i] + (1 - kept[i]) * pixels[partner]
        torch.testing.assert_close(mixed[i], expected, rtol=0, atol=1e-12)
        shares = torch.zeros(NUM_CLASSES, dtype=torch.float64)
        shares[labels[i]] += kept[i]
        shares[labels[partner]] += 1 - kept[i]
        torch.testing.assert_close(targets[i], shares, rtol=0, atol=1e-12)
        assert kept[i] == kept[partner]
    assert kept[: count // 2 * 2].max() < 1
    if count % 2:
        assert kept[-1] == 1


def test_cutmix_takes_one_box_and_the_targets_say_its_area():
    pixels, labels, keys = batch(400)
    mixed, targets = Mixing(0, 1.0, NUM_CLASSES, 3)(pixels, labels, keys)
    kept = own_share(targets, labels)
    for i in range(len(pixels)):
        taken = mixed[i, 0] == pixels[i ^ 1, 0, 0, 0]
        assert torch.equal(mixed[i, 0][~taken], pixels[i, 0][~taken])
        assert all(torch.equal(channel, mixed[i, 0]) for channel in mixed[i])
        rows, columns = taken.any(1), taken.any(0)
        assert torch.equal(taken, rows[:, None] & columns[None, :])
        assert all(int(line.diff().abs().sum()) <= 2 for line in (rows.int(), columns.int()))
        torch.testing.assert_close(kept[i], 1 - taken.double().mean(), rtol=0, atol=1e-12)
    # Boxes of every size, cut off at the border.
    assert kept.min() < 0.1
    assert kept.max() > 0.95


def test_shares_follow_the_beta_distribution():
    pixels, labels, keys = batch(4000, side=2)
    for alpha in (0.2, 1.0, 2.0):
        _, targets = Mixing(alpha, 0, NUM_CLASSES, 0)(pixels, labels, keys)
        assert stats.kstest(own_share(targets, labels)[::2].numpy(), stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_both_share_the_pairs_evenly():
    pixels, labels, keys = batch(2000, side=4)
    mixed, targets = Mixing(1.0, 1.0, NUM_CLASSES, 0)(pixels, labels, keys)
    whole = (mixed.flatten(1).std(1) < 1e-12) & (own_share(targets, labels) < 0.95)
    assert 0.3 < whole.double().mean() < 0.6  # blended evenly: mixup


def test_a_pair_is_mixed_alike_in_any_batch_and_differs_by_seed_and_visit():
    pixels, labels, keys = batch(8)
    mixing = Mixing(1.0, 1.0, NUM_CLASSES, 1)
    mixed, targets = mixing(pixels, labels, keys)
    part, part_targets = mixing(pixels[4:6], labels[4:6], keys[4:6])
    assert torch.equal(part, mixed[4:6])
    assert torch.equal(part_targets, targets[4:6])
    for other, other_keys in ((Mixing(1.0, 1.0, NUM_CLASSES, 2), keys), (mixing, keys + 10**6)):
        assert not torch.equal(other(pixels, labels, other_keys)[0], mixed)


def test_float32_in_any_memory_format_stays_as_it_is():
    pixels, labels, keys = batch(6)
    single = pixels.float().contiguous(memory_format=torch.channels_last)
    mixed, targets = Mixing(1.0, 1.0, NUM_CLASSES, 1)(single, labels, keys)
    assert (mixed.dtype, targets.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(targets.sum(1), torch.ones(6))
    assert mixed.is_contiguous(memory_format=torch.channels_last)
