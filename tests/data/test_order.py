"""Sample order: every key once, pairs kept together, no tiny batch, the same at any world size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arat_dist.data.order import SampleOrder, eval_shares, permutation

orders = st.builds(
    SampleOrder,
    num_samples=st.integers(1, 60),
    batch_size=st.integers(2, 40),
    epochs=st.integers(1, 5),
    seed=st.integers(0, 2**31 - 1),
    block=st.integers(1, 9),
    window=st.integers(1, 5),
)
few = settings(max_examples=60, deadline=None)


def all_keys(order: SampleOrder) -> list[int]:
    return [int(key) for step in range(order.num_steps) for key in order.batch(step)]


@few
@given(orders)
def test_every_sample_comes_once_an_epoch(order: SampleOrder):
    keys = all_keys(order)
    for epoch in range(order.epochs):
        part = keys[epoch * order.num_samples : (epoch + 1) * order.num_samples]
        assert sorted(part) == list(range(epoch * order.num_samples, (epoch + 1) * order.num_samples))


@few
@given(orders, st.integers(1, 9))
def test_ranks_together_see_the_batch_in_whole_pairs(order: SampleOrder, world_size: int):
    for step in range(order.num_steps):
        batch = order.batch(step)
        shares = [order.share(step, rank, world_size) for rank in range(world_size)]
        np.testing.assert_array_equal(np.concatenate(shares), batch)
        num_pairs = [len(share) // 2 for share in shares]
        assert sum(num_pairs) == len(batch) // 2, "a pair was torn apart"
        assert max(num_pairs) - min(num_pairs) <= 1
        assert sum(len(share) % 2 for share in shares) == len(batch) % 2
        if len(batch) > 1:
            assert 1 not in map(len, shares), "a rank got a batch of one"
        assert max(map(len, shares)) <= order.largest_share(world_size)


@few
@given(orders, st.integers(1, 9))
def test_no_rank_is_empty_while_pairs_suffice(order: SampleOrder, world_size: int):
    if order.smallest_batch < 2 * world_size:
        return
    sizes = [len(order.share(step, rank, world_size)) for step in range(order.num_steps) for rank in range(world_size)]
    assert min(sizes) >= 2
    assert max(sizes) == order.largest_share(world_size)


@few
@given(orders, st.lists(st.tuples(st.integers(0, 30), st.integers(1, 9)), max_size=5))
def test_a_run_that_stops_anywhere_and_goes_on_anywhere_sees_what_is_left(order: SampleOrder, launches):
    """Any number of stops, in mid-epoch too, each followed by another world size."""
    seen, step = [], 0
    for num_steps, world_size in [*launches, (order.num_steps, 3)]:
        stop = min(step + num_steps, order.num_steps)
        per_rank = [list(order.shares(rank, world_size, step, stop)) for rank in range(world_size)]
        assert {len(shares) for shares in per_rank} == {stop - step}
        seen += [int(key) for at in range(stop - step) for shares in per_rank for key in shares[at]]
        step = stop
    assert seen == all_keys(order)


@few
@given(orders)
def test_only_the_end_has_smaller_batches_and_none_is_tiny(order: SampleOrder):
    sizes = [order.batch_size_at(step) for step in range(order.num_steps)]
    assert sizes == [len(order.batch(step)) for step in range(order.num_steps)]
    assert all(size == order.batch_size for size in sizes[:-2])
    assert max(sizes) <= order.batch_size
    assert order.smallest_batch == min(sizes)
    if len(sizes) > 1:
        assert min(sizes) >= order.batch_size / 2 - 1


@pytest.mark.parametrize(
    ("num_samples", "batch_size", "epochs", "sizes"),
    [
        (10, 5, 2, [5, 5, 5, 5]),  # Nothing is left.
        (8, 5, 1, [5, 3]),  # More than half a batch is left: a smaller last one.
        (11, 8, 2, [8, 8, 6]),
        (9, 8, 1, [4, 5]),  # Less: the last two share it.
        (10, 8, 1, [6, 4]),  # Both even where that is possible.
        (18, 8, 1, [8, 6, 4]),
        (12, 8, 1, [8, 4]),  # Exactly half is not less.
        (3, 8, 1, [3]),  # Nothing to share with.
        (3, 8, 3, [4, 5]),  # A batch of several epochs.
    ],
)
def test_sizes_at_the_end(num_samples: int, batch_size: int, epochs: int, sizes: list[int]):
    order = SampleOrder(num_samples, batch_size, epochs, seed=0)
    assert [order.batch_size_at(step) for step in range(order.num_steps)] == sizes


@few
@given(orders, st.integers(1, 5), st.integers(1, 5), st.data())
def test_resume_at_another_world_size_sees_the_rest(order: SampleOrder, before: int, after: int, data: st.DataObject):
    stop = data.draw(st.integers(0, order.num_steps))
    first = [key for rank in range(before) for share in order.shares(rank, before, 0, stop) for key in share]
    second = [key for rank in range(after) for share in order.shares(rank, after, stop) for key in share]
    assert sorted(first + second) == list(range(order.num_samples * order.epochs))


def test_epochs_and_seeds_differ_in_order():
    order = SampleOrder(100, 50, 2, seed=0)
    assert not np.array_equal(permutation(100, 0, 0), permutation(100, 0, 1))
    assert not np.array_equal(permutation(100, 0, 0), permutation(100, 1, 0))
    assert [order.epoch_of(step) for step in range(4)] == [0, 0, 1, 1]
    assert SampleOrder(7, 5, 2, seed=0).epoch_of(1) == 0, "the remainder of an epoch opens this batch"


def test_permutation_is_pinned():
    """A run that is resumed elsewhere must find the same order: written down here, from plain integers."""
    assert permutation(10, 0, 0).tolist() == [2, 4, 6, 8, 5, 1, 7, 0, 9, 3]
    mask = 2**64 - 1

    def mix(word: int) -> int:
        word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & mask
        word = (word ^ (word >> 27)) * 0x94D049BB133111EB & mask
        return word ^ (word >> 31)

    golden, seed, epoch = 0x9E3779B97F4A7C15, 2**31 - 1, 3
    start = mix(mix(seed) + epoch * golden & mask)
    hashes = [mix(start + (index + 1) * golden & mask) for index in range(50)]
    assert permutation(50, seed, epoch).tolist() == sorted(range(50), key=hashes.__getitem__)


def test_positions_of_a_sample_are_uniform():
    """Where sample 0 of 8 comes, over 4,000 epochs: chi-squared with 7 degrees of freedom, 1 in 10^5 at 35."""
    places = [int(np.flatnonzero(permutation(8, 0, epoch) == 0)[0]) for epoch in range(4000)]
    counts = np.bincount(places, minlength=8)
    assert ((counts - 500) ** 2 / 500).sum() < 35


def test_shares_are_lazy():
    order = SampleOrder(1000, 10, 10**9, seed=0)
    shares = order.shares(0, 2, start=3)
    assert len(shares) == 10**11 - 3
    np.testing.assert_array_equal(shares[0], order.share(3, 0, 2))
    np.testing.assert_array_equal(shares[5:7][1], order.share(9, 0, 2))
    with pytest.raises(IndexError):
        order.shares(0, 2, 0, 3)[3]


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("num_samples", [1, 5, 64, 100])
def test_evaluation_sees_every_sample_once(num_samples: int, world_size: int):
    shares = [share for rank in range(world_size) for share in eval_shares(num_samples, 8, rank, world_size)]
    assert np.concatenate(shares).tolist() == list(range(num_samples))
    assert all(1 <= len(share) <= 8 for share in shares)


def test_bad_arguments():
    with pytest.raises(ValueError, match="epochs: 0"):
        SampleOrder(10, 5, 0, seed=0)
    with pytest.raises(ValueError, match="rank: 2"):
        SampleOrder(10, 5, 1, seed=0).share(0, 2, 2)
    with pytest.raises(IndexError):
        SampleOrder(10, 5, 1, seed=0).batch(2)


def test_an_epoch_ends_with_the_batch_that_holds_its_last_sample():
    order = SampleOrder(44, 8, 3, 0)
    ends = [step for step in range(order.num_steps) if order.ends_epoch(step)]
    assert ends == [5, 10, 16]
    last_visits = [max(np.flatnonzero([epoch in order.batch(s) // 44 for s in range(17)])) for epoch in range(3)]
    assert ends == last_visits
    assert [order.epochs_after(n) for n in (0, 11, 17)] == [0, 2, 3]


def test_blocks_are_read_in_windows():
    """Four windows of three blocks of ten: each is used up before the next begins, and is mixed within itself."""
    order = permutation(120, 3, 1, 10, 3)
    assert sorted(order) == list(range(120))
    windows = [order[start : start + 30] for start in range(0, 120, 30)]
    assert all(len(set(window // 10)) == 3 for window in windows)
    assert all(len(set(window[:10] // 10)) > 1 for window in windows), "blocks follow each other unmixed"
    assert not np.array_equal(order, permutation(120, 3, 2, 10, 3))
    assert not np.array_equal(order, permutation(120, 4, 1, 10, 3))


@pytest.mark.parametrize(("block", "window"), [(1, 1), (16, 1000), (50, 40)])
def test_wide_windows_mix_as_a_full_shuffle_does(block, window):
    """Neighbours in the order are as far apart in the file as chance has it, a third of its length on average."""
    num_samples = 2000
    order = permutation(num_samples, 0, 0, block, window)
    assert abs(np.abs(np.diff(order)).mean() / (num_samples / 3) - 1) < 0.05
    assert abs(np.corrcoef(order, np.arange(num_samples))[0, 1]) < 0.07


def test_the_last_block_may_be_short():
    assert sorted(permutation(23, 0, 0, 10, 2)) == list(range(23))
