"""Which samples make up the global batch of each step: a function of the recipe and the data sets' sizes alone.

So every parallel layout sees the same batches, and a run can resume at any step. Each stream's samples are split into
`num_canonical_nodes` contiguous *parts* with their own order and epochs. In each epoch a part's shards are permuted and
grouped into *blocks* of at least `shuffle_block_size` samples, and samples are permuted within a block. Memory holds
only the shards' sizes and the blocks in use.

A global batch takes equally many samples from every part, in part order, so that a contiguous slice of it, such as one
node's, needs the shards of few parts.

Shapes: B = global_batch_size; ids_B2 holds pairs (stream, sample).
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from bov_megatron.errors import DataError

MAX_PERIOD = 1 << 16
"""Stream shares that need a longer period are rounded to multiples of 1 / MAX_PERIOD."""
BLOCKS_KEPT = 3
DIGEST_CHARACTERS = 12


def digest(ids_B2: np.ndarray) -> str:
    """Fingerprint of a batch's sample ids in order: first 12 hex digits of their SHA-256."""
    return hashlib.sha256(np.ascontiguousarray(ids_B2, dtype="<i8").tobytes()).hexdigest()[:DIGEST_CHARACTERS]


class SkippedBatches:
    """Batches of the order that a run leaves out: its step s trains on the s-th of the remaining batches.

    Args:
        windows: pairs (first, last) of 0-based places in the order, inclusive; any order, may overlap.
    """

    def __init__(self, windows: Sequence[tuple[int, int]] = ()) -> None:
        self.windows: list[tuple[int, int]] = []
        """Ascending, disjoint and not adjacent."""
        for first, last in sorted(windows):
            if self.windows and first <= self.windows[-1][1] + 1:
                begin, end = self.windows.pop()
                first, last = begin, max(end, last)
            self.windows.append((first, last))

    def place(self, step: int) -> int:
        """0-based place in the order of the batch that a 0-based step trains on."""
        for first, last in self.windows:
            if step < first:
                break
            step += last - first + 1
        return step


class SampleOrder:
    """The order of samples of one or several weighted streams.

    Args:
        shard_sizes: per stream, number of samples of each shard; a sample's id is its index over all of them.
        weights: relative share of each stream; default equal.
        global_batch_size: samples per step.
        shuffle: False keeps the stored order within parts.
        shuffle_seed, shuffle_block_size, num_canonical_nodes: see the head of this file.

    Raises DataError for sizes that don't fit each other.
    """

    def __init__(
        self,
        shard_sizes: Sequence[Sequence[int] | np.ndarray],
        global_batch_size: int,
        weights: Sequence[float] | None = None,
        shuffle: bool = True,
        shuffle_seed: int = 0,
        shuffle_block_size: int = 1 << 16,
        num_canonical_nodes: int = 1,
    ) -> None:
        if num_canonical_nodes < 1 or global_batch_size % num_canonical_nodes:
            raise DataError(
                f"train.global_batch_size={global_batch_size} must be a multiple of "
                f"data.num_canonical_nodes={num_canonical_nodes}, which takes an equal share of every batch"
            )
        if shuffle_block_size < 1:
            raise DataError(f"data.shuffle_block_size={shuffle_block_size}: must be at least 1")
        self._num_parts = num_canonical_nodes
        self._per_part = global_batch_size // num_canonical_nodes
        self._mixture = Mixture(weights or [1.0] * len(shard_sizes), num_canonical_nodes)
        self._parts = [
            [
                _PartOrder(
                    sizes, part, num_canonical_nodes, (shuffle_seed, stream), shuffle_block_size, shuffle, stream
                )
                for part in range(num_canonical_nodes)
            ]
            for stream, sizes in enumerate(np.asarray(sizes, dtype=np.int64) for sizes in shard_sizes)
        ]
        self._lock = threading.Lock()

    def batch(self, step: int) -> np.ndarray:
        """Pairs (stream, sample) of the global batch at a 0-based place in the order: int64 `[B, 2]`. Thread-safe."""
        with self._lock:
            return np.concatenate([self._part_batch(part, step) for part in range(self._num_parts)])

    def _part_batch(self, part: int, step: int) -> np.ndarray:
        ids = np.empty((self._per_part, 2), dtype=np.int64)
        ids[:, 0] = self._mixture.streams(part, step * self._per_part, self._per_part)
        for stream, parts in enumerate(self._parts):
            chosen = ids[:, 0] == stream
            count = int(chosen.sum())
            if count:
                ids[chosen, 1] = parts[part].samples(self._drawn(part, stream, step), count)
        return ids

    def _drawn(self, part: int, stream: int, step: int) -> int:
        """Samples drawn from a part of a stream before `step`."""
        return self._mixture.count(part, stream, step * self._per_part)

    def upcoming_shards(self, step: int, first: int, last: int) -> list[tuple[int, int]]:
        """Pairs (stream, shard) that slots [first, last) of the batch need at `step` and in the block after it."""
        with self._lock:
            return [
                (stream, int(shard))
                for part in range(first // self._per_part, (last - 1) // self._per_part + 1)
                for stream, parts in enumerate(self._parts)
                for shard in parts[part].upcoming_shards(self._drawn(part, stream, step))
            ]


class Mixture:
    """Assigns the slots of each part to streams, periodically and evenly.

    After any number of slots each stream is less than one sample off its exact share; less than two in parts after the
    first, which start elsewhere in the period so that not all parts favour the same stream at once. The rule is
    R. Tijdeman's for the chairman assignment problem (Discrete Mathematics 32, 1980).
    """

    def __init__(self, weights: Sequence[float], num_parts: int = 1) -> None:
        counts = _slots_per_period(weights)
        self.period = sum(counts)
        self._pattern = _spread(counts)
        # [k, s]: slots of stream s among the first k of a period.
        taken = self._pattern[:, None] == np.arange(len(counts))
        self._before = np.concatenate([np.zeros((1, len(counts)), np.int64), np.cumsum(taken, axis=0)])
        self._offsets = [part * self.period // num_parts for part in range(num_parts)]

    def streams(self, part: int, begin: int, count: int) -> np.ndarray:
        """Streams of a part's slots [begin, begin + count): int64 `[count]`."""
        return self._pattern[(np.arange(begin, begin + count) + self._offsets[part]) % self.period]

    def count(self, part: int, stream: int, slots: int) -> int:
        """Slots of a stream among the part's first `slots`."""
        offset = self._offsets[part]
        return self._count(stream, slots + offset) - self._count(stream, offset)

    def _count(self, stream: int, slots: int) -> int:
        periods, rest = divmod(slots, self.period)
        return int(periods * self._before[-1, stream] + self._before[rest, stream])


def _slots_per_period(weights: Sequence[float]) -> list[int]:
    if not weights or any(not 0 < weight < math.inf for weight in weights):
        raise DataError(f"data.streams: weights must be positive numbers, found {list(weights)}")
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 means a tenth, not the nearest binary fraction
    shares = [weight / sum(exact) for weight in exact]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= MAX_PERIOD:
        return [int(share * period) for share in shares]
    counts = [int(share * MAX_PERIOD) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda s: counts[s] - shares[s] * MAX_PERIOD)
    for stream in by_remainder[: MAX_PERIOD - sum(counts)]:
        counts[stream] += 1
    if 0 in counts:
        raise DataError(
            f"data.streams[{counts.index(0)}].weight={weights[counts.index(0)]} is less than 1/{MAX_PERIOD} of all "
            "weights; raise it or leave the stream out"
        )
    return counts


def _spread(counts: list[int]) -> np.ndarray:
    """A period in which stream s has counts[s] slots and every prefix is within one of the exact shares."""
    period, streams = sum(counts), len(counts)
    if streams == 1:
        return np.zeros(1, dtype=np.int64)
    # All quantities are scaled by period * (2 * streams - 2) to stay integers.
    scale = 2 * streams - 2
    pattern = np.empty(period, dtype=np.int64)
    due = [0] * streams
    for slot in range(period):
        best, best_key = -1, None
        for stream, count in enumerate(counts):
            due[stream] += count * scale
            if due[stream] >= period:
                key = Fraction((scale - 1) * period - due[stream], count)
                if best_key is None or key < best_key:
                    best, best_key = stream, key
        pattern[slot] = best
        due[best] -= period * scale
    return pattern


@dataclass
class _Epoch:
    """One epoch of a part, as arrays over its fragments in order. A fragment is the part's share of a shard."""

    first: np.ndarray
    """Id of the fragment's first sample."""
    ends: np.ndarray
    """Number of samples up to the fragment's end."""
    block_ends: np.ndarray
    """Per block: number of fragments up to its end."""
    shards: np.ndarray
    """Index of the fragment's shard."""


class _PartOrder:
    """The endless sequence of samples of one part of one stream."""

    def __init__(
        self, sizes: np.ndarray, part: int, parts: int, key: tuple[int, ...], block: int, shuffle: bool, stream: int
    ) -> None:
        total = int(sizes.sum())
        self.begin, end = part * total // parts, (part + 1) * total // parts
        self.size = end - self.begin
        if self.size == 0:
            raise DataError(
                f"data.streams[{stream}] has {total} training samples, fewer than "
                f"data.num_canonical_nodes={parts}; lower it or prepare more data"
            )
        starts = np.concatenate([[0], np.cumsum(sizes)])
        # Each shard's overlap with the part; empty shards have none.
        low, high = np.maximum(starts[:-1], self.begin), np.minimum(starts[1:], end)
        self._shards = np.flatnonzero(high > low)
        self._low, self._length = low[self._shards], (high - low)[self._shards]
        self._key, self._block, self._shuffle = (*key, part), block, shuffle
        self._epochs: OrderedDict[int, _Epoch] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def samples(self, begin: int, count: int) -> np.ndarray:
        """Sample ids at positions [begin, begin + count) of the endless sequence: int64 `[count]`."""
        if not self._shuffle:
            return self.begin + np.arange(begin, begin + count) % self.size
        pieces = []
        while count:
            number, position = divmod(begin, self.size)
            epoch = self._epoch(number)
            block = self._block_at(epoch, position)
            block_begin = int(epoch.ends[epoch.block_ends[block - 1] - 1]) if block else 0
            ids = self._permuted_block(number, block)
            piece = ids[position - block_begin : position - block_begin + count]
            pieces.append(piece)
            begin, count = begin + len(piece), count - len(piece)
        return np.concatenate(pieces)

    def upcoming_shards(self, begin: int) -> np.ndarray:
        """Shards of the block at a position and of the one after it."""
        if not self._shuffle:
            starts = np.cumsum(self._length) - self._length
            here = int(np.searchsorted(starts, begin % self.size, side="right")) - 1
            return self._shards[[here, (here + 1) % len(self._shards)]]
        number, position = divmod(begin, self.size)
        epoch = self._epoch(number)
        block = self._block_at(epoch, position)
        fragments = self._fragments(epoch, block)
        if block + 1 < len(epoch.block_ends):
            return np.concatenate([epoch.shards[fragments], epoch.shards[self._fragments(epoch, block + 1)]])
        following = self._epoch(number + 1)
        return np.concatenate([epoch.shards[fragments], following.shards[self._fragments(following, 0)]])

    @staticmethod
    def _block_at(epoch: _Epoch, position: int) -> int:
        fragment = np.searchsorted(epoch.ends, position, side="right")
        return int(np.searchsorted(epoch.block_ends, fragment, side="right"))

    @staticmethod
    def _fragments(epoch: _Epoch, block: int) -> slice:
        return slice(int(epoch.block_ends[block - 1]) if block else 0, int(epoch.block_ends[block]))

    def _epoch(self, number: int) -> _Epoch:
        if number not in self._epochs:
            order = _permutation(len(self._shards), (*self._key, number))
            ends = np.cumsum(self._length[order])
            block_ends = []
            done = 0
            while done < self.size:
                last = min(int(np.searchsorted(ends, done + self._block, side="left")), len(ends) - 1)
                block_ends.append(last + 1)
                done = int(ends[last])
            self._epochs[number] = _Epoch(self._low[order], ends, np.array(block_ends), self._shards[order])
            while len(self._epochs) > 2:
                self._epochs.popitem(last=False)
        return self._epochs[number]

    def _permuted_block(self, number: int, block: int) -> np.ndarray:
        key = (number, block)
        if key not in self._blocks:
            epoch = self._epoch(number)
            fragments = self._fragments(epoch, block)
            lengths = np.diff(epoch.ends, prepend=0)[fragments]
            ids = np.concatenate([np.arange(a, a + n) for a, n in zip(epoch.first[fragments], lengths, strict=True)])
            self._blocks[key] = ids[_permutation(len(ids), (*self._key, number, block))]
            while len(self._blocks) > BLOCKS_KEPT:
                self._blocks.popitem(last=False)
        return self._blocks[key]


def _permutation(count: int, key: tuple[int, ...]) -> np.ndarray:
    """A permutation of `count` that depends on `key` alone."""
    # NumPy guarantees that PCG64's raw output doesn't change between versions, but not `Generator.permutation`.
    # The length distinguishes (1, 0) from (1,), which SeedSequence would pad to the same words.
    bits = np.random.PCG64(np.random.SeedSequence([len(key), *key])).random_raw(count)
    return np.argsort(bits, kind="stable")
