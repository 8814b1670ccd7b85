import time
from collections import Counter

import numpy as np
import pytest

from bov_megatron.data.order import Mixture, SampleOrder, SkippedBatches, digest
from bov_megatron.errors import DataError

UNEVEN = [7, 31, 0, 1, 64, 20, 13, 50, 5]  # 191 samples, one empty shard


def positions(order, steps, stream=0):
    """Sample ids of a stream, in the order drawn."""
    ids = np.concatenate([order.batch(step) for step in range(steps)])
    return ids[ids[:, 0] == stream, 1]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("batch", "block"), [(1, 1), (5, 40), (8, 1000), (191, 60), (400, 60)])
def test_every_sample_once_per_epoch(batch, block, shuffle):
    order = SampleOrder([UNEVEN], batch, shuffle_block_size=block, shuffle=shuffle)
    drawn = positions(order, 3 * 191)
    for epoch in range(3):
        assert sorted(drawn[epoch * 191 : (epoch + 1) * 191]) == list(range(191))


def test_every_sample_once_per_epoch_of_each_part():
    order = SampleOrder([UNEVEN], 12, num_canonical_nodes=3, shuffle_block_size=30)
    batches = np.stack([order.batch(step)[:, 1] for step in range(3 * 64)])
    for part in range(3):
        begin, end = part * 191 // 3, (part + 1) * 191 // 3
        drawn = batches[:, part * 4 : (part + 1) * 4].ravel()
        for epoch in range(3):
            here = drawn[epoch * (end - begin) : (epoch + 1) * (end - begin)]
            assert sorted(here) == list(range(begin, end)), (
                "a part of the batch reads its own part of the data, all of it"
            )


def test_epochs_and_seeds_differ_and_nothing_else_matters():
    order = SampleOrder([UNEVEN], 191, shuffle_seed=1)
    first, second = order.batch(0), order.batch(1)
    assert (first[:, 1] != np.arange(191)).sum() > 150 and (first != second).any()
    assert (SampleOrder([UNEVEN], 191, shuffle_seed=2).batch(0) != first).any()
    assert (SampleOrder([UNEVEN], 191, shuffle_seed=1, shuffle_block_size=20).batch(0) != first).any()
    assert (SampleOrder([UNEVEN], 191, shuffle_seed=1).batch(0) == first).all()


def test_any_step_alone_equals_the_step_of_a_whole_run():
    def fresh():
        return SampleOrder(
            [UNEVEN, [40, 9], [300]], 24, weights=[0.5, 0.2, 0.3], num_canonical_nodes=2, shuffle_block_size=50
        )

    whole = fresh()
    run = [whole.batch(step) for step in range(120)]
    for step in (0, 1, 7, 55, 119):
        assert (fresh().batch(step) == run[step]).all()
    for step in (119, 3, 64, 2):  # going back, as a resumed or skipping run may
        assert (whole.batch(step) == run[step]).all()


def test_skipped_batches_are_left_out():
    rng = np.random.default_rng(0)
    for _ in range(50):
        windows = [(first, first + rng.integers(4)) for first in rng.integers(0, 40, rng.integers(6))]
        left = [place for place in range(80) if not any(first <= place <= last for first, last in windows)]
        skipped = SkippedBatches(windows)
        assert [skipped.place(step) for step in range(len(left))] == left


def test_the_order_is_the_one_of_earlier_versions():
    order = SampleOrder([UNEVEN, [100, 23]], 16, weights=[3, 1], shuffle_seed=9176, num_canonical_nodes=2)
    found = [digest(order.batch(step)) for step in (0, 1, 1000)]
    assert found == ["c8ad22650f18", "02d095755a2f", "4d4765d05ed6"], (
        "a change here reorders the data of every resumed run"
    )


def test_a_block_holds_whole_shards_of_the_wanted_size():
    order = SampleOrder([[10] * 40], 1, shuffle_block_size=35)
    shards = positions(order, 400) // 10
    blocks = [set(shards[i : i + 40]) for i in range(0, 400, 40)]
    assert all(len(block) == 4 for block in blocks) and set().union(*blocks) == set(range(40))
    assert any(max(block) - min(block) > 3 for block in blocks), "shards are permuted too"
    upcoming = order.upcoming_shards(0, 0, 1)
    assert {shard for _, shard in upcoming} == blocks[0] | blocks[1]


def test_a_billion_samples_cost_neither_memory_nor_time():
    import tracemalloc

    sizes = np.full(61_036, 16_384)  # 4 TB of 2048-token samples
    tracemalloc.start()
    start = time.perf_counter()
    order = SampleOrder([sizes], 512, num_canonical_nodes=4)
    ids = order.batch(1_900_000)
    seconds, (_, peak) = time.perf_counter() - start, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(np.unique(ids[:, 1])) == 512 and ids[:, 1].max() < sizes.sum()
    assert seconds < 5 and peak < 100e6


@pytest.mark.parametrize(
    "weights", [[1, 1], [0.7, 0.3], [0.6, 0.3, 0.1], [5, 3, 2, 2, 1], [0.97, 0.01, 0.02], [1, 1e-4], [3.14159, 2.71828]]
)
def test_shares_are_exact_at_every_sample(weights):
    mixture = Mixture(weights)
    slots = max(3 * min(mixture.period, 20_000), 1000)
    drawn = np.cumsum(mixture.streams(0, 0, slots)[:, None] == np.arange(len(weights)), axis=0)
    share = np.array([weight / sum(weights) for weight in weights])
    off = drawn - share * np.arange(1, slots + 1)[:, None]
    rounding = slots / 65_536 if mixture.period == 65_536 else 1e-6
    assert np.abs(off).max() < 1 + rounding
    for slots_before in (1, 17, slots // 2):
        for stream in range(len(weights)):
            assert mixture.count(0, stream, slots_before) == drawn[slots_before - 1, stream]


def test_parts_keep_their_shares_and_do_not_drift():
    order = SampleOrder([[500]] * 3, 32, weights=[0.6, 0.3, 0.1], num_canonical_nodes=4)
    drawn = Counter()
    for step in range(200):
        drawn.update(order.batch(step)[:, 0].tolist())
        for stream, share in enumerate([0.6, 0.3, 0.1]):
            assert abs(drawn[stream] - share * 32 * (step + 1)) < 2 * 4
    mixture = Mixture([0.6, 0.3, 0.1], 4)
    for part in range(4):
        for slots in (10**6 + 3, 10**12 + 7):
            assert abs(mixture.count(part, 2, slots) - slots // 10) < 3


def test_streams_have_epochs_of_their_own():
    order = SampleOrder([[100], [30]], 10, weights=[1, 1])
    for stream, size in ((0, 100), (1, 30)):
        drawn = positions(order, 60, stream)
        for epoch in range(len(drawn) // size):
            assert sorted(drawn[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"global_batch_size": 10, "num_canonical_nodes": 4}, "global_batch_size=10 must be a multiple of .*nodes=4"),
        ({"num_canonical_nodes": 0}, "num_canonical_nodes=0"),
        ({"shuffle_block_size": 0}, "shuffle_block_size=0"),
        ({"shard_sizes": [[3]], "num_canonical_nodes": 4}, "has 3 training samples, fewer than .*nodes=4"),
        ({"weights": [0.0]}, "weights must be positive"),
        ({"weights": [float("nan")]}, "weights must be positive"),
        ({"shard_sizes": [[9], [9]], "weights": [1, 1e-9]}, r"streams\[1\].weight=1e-09 is less than 1/65536"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        SampleOrder(**{"shard_sizes": [UNEVEN], "global_batch_size": 16, **arguments})
