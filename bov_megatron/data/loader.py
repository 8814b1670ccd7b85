"""Micro-batches of this data-parallel rank.

Tensor, context and pipeline ranks of one data-parallel rank read the same samples themselves, so nothing is broadcast.

Shapes: M = micro_batch_size, T = sequence_length, B = global_batch_size, N any number of samples.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from bov_megatron.data.order import SampleOrder, SkippedBatches, digest
from bov_megatron.data.shards import DataSet, SplitReader, open_data_sets, streams_of
from bov_megatron.data.tokenizer import load_bytes_per_token
from bov_megatron.errors import DataError
from bov_megatron.recipe import DataConfig
from bov_megatron.recipe.layout_checks import micro_batches_per_rank


@dataclass
class TrainBatch:
    """One step's micro-batches for one data-parallel rank."""

    place: int
    """0-based index in the order: the step, unless batches before it were skipped."""
    micro_batches: list[torch.Tensor]
    """int64 `[M, T + 1]` each: inputs are `[:, :-1]`, labels `[:, 1:]`."""
    digest: str
    """Fingerprint of the global batch's sample ids, the same on every rank."""
    ids_B2: np.ndarray
    """(stream, sample) of the whole global batch."""


class TrainLoader:
    """Endless iterator of TrainBatch from `start_step` on.

    Args:
        data: the recipe's section.
        sequence_length, vocab_size: the model's; data of another length or a larger vocabulary is refused.
        global_batch_size, micro_batch_size: the recipe's.
        data_parallel_rank, data_parallel_size: this rank reads a contiguous slice of each global batch.
        start_step: 0-based step of the first batch.
        skipped: windows of the order to leave out, pairs (first, last) of 0-based places.
        tokenizer_hash: a checkpoint's, to refuse data of another tokenizer.
        data_sets: those of `data`, where they are open already.

    The global batch depends on step and skipped windows only, not on data_parallel_size.
    Raises DataError, also from `next()`, and RecipeError where the batch does not divide. Close it, or use it as a
    context manager, to end its threads.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        sequence_length: int,
        vocab_size: int,
        global_batch_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        start_step: int = 0,
        skipped: Sequence[tuple[int, int]] = (),
        tokenizer_hash: str | None = None,
        data_sets: Sequence[DataSet] | None = None,
    ) -> None:
        micro_batches_per_rank(global_batch_size, micro_batch_size, data_parallel_size)  # raises if not a whole number
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(f"data_parallel_rank {data_parallel_rank} is not in [0, {data_parallel_size})")
        self.data_sets = data_sets or open_data_sets(data, sequence_length, vocab_size, tokenizer_hash)
        self._splits = [data_set.split("train") for data_set in self.data_sets]
        self.order = SampleOrder(
            [split.shard_sizes for split in self._splits],
            global_batch_size,
            weights=[stream.weight for stream in streams_of(data)],
            shuffle=data.shuffle,
            shuffle_seed=data.shuffle_seed,
            shuffle_block_size=data.shuffle_block_size,
            num_canonical_nodes=data.num_canonical_nodes or 1,
        )
        per_rank = global_batch_size // data_parallel_size
        self._slots = slice(data_parallel_rank * per_rank, (data_parallel_rank + 1) * per_rank)
        self.micro_batch_size = micro_batch_size
        self.step = start_step
        """0-based step of the next batch."""
        self.skipped = SkippedBatches(skipped)
        self._ahead: deque[Future[TrainBatch]] = deque()
        self._prefetch = max(data.prefetch_factor, 1)
        # Threads, not processes: the work is copying from the page cache, and a process that holds communicators must
        # not fork.
        self._readers = ThreadPoolExecutor(data.num_workers, "data-read") if data.num_workers else None
        self._fetchers = ThreadPoolExecutor(2, "data-fetch") if any(d.cache for d in self.data_sets) else None
        self._requested: set[tuple[int, int]] = set()

    @property
    def tokenizer_hash(self) -> str:
        return self.data_sets[0].manifest.tokenizer_hash

    def __iter__(self) -> Iterator[TrainBatch]:
        return self

    def __next__(self) -> TrainBatch:
        if self._readers is None:
            batch = self._load(self.skipped.place(self.step))
        else:
            while len(self._ahead) < self._prefetch:
                self._ahead.append(self._readers.submit(self._load, self.skipped.place(self.step + len(self._ahead))))
            batch = self._ahead.popleft().result()
        self.step += 1
        return batch

    def go_to(self, step: int, skipped: Sequence[tuple[int, int]]) -> None:
        """Continue at `step`, leaving out `skipped`; batches read ahead are dropped."""
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()
        self.step, self.skipped = step, SkippedBatches(skipped)

    def _load(self, place: int) -> TrainBatch:
        ids_B2 = self.order.batch(place)
        if self._fetchers:
            for stream, shard in self.order.upcoming_shards(place, self._slots.start, self._slots.stop):
                if (stream, shard) not in self._requested and self._splits[stream].data_set.cache:
                    self._requested.add((stream, shard))
                    # An error here is dropped; reading the shard will raise it again.
                    self._fetchers.submit(self._splits[stream].ensure, shard)
        tokens = torch.from_numpy(_read_samples(self._splits, ids_B2[self._slots]))
        return TrainBatch(place, list(tokens.split(self.micro_batch_size)), digest(ids_B2), ids_B2)

    def close(self) -> None:
        """End the threads; batches read ahead are dropped."""
        for data_set in self.data_sets:
            if data_set.cache:
                data_set.cache.close()  # a thread may be waiting for an unreachable remote
        if self._readers:
            self._readers.shutdown(wait=True, cancel_futures=True)
        if self._fetchers:
            self._fetchers.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _read_samples(splits: list[SplitReader], ids_N2: np.ndarray) -> np.ndarray:
    """Tokens of samples given as pairs (stream, sample): int64 `[N, T + 1]`."""
    tokens = np.empty((len(ids_N2), splits[0].length), dtype=np.int64)
    for stream, split in enumerate(splits):
        chosen = ids_N2[:, 0] == stream
        if chosen.any():
            tokens[chosen] = split.read(ids_N2[chosen, 1])
    return tokens


@dataclass
class ValidationBatch:
    """One micro-batch of held-out samples."""

    tokens: torch.Tensor
    """int64 `[M, T + 1]`."""
    mask: torch.Tensor
    """bool `[M]`: False for padding rows, which must not be counted."""


class ValidationLoader:
    """Held-out samples in stored order, each on exactly one data-parallel rank; can be iterated any number of times.

    Every rank gets `len(self)` batches. At most `tokens` targets are read in all, in proportion to the held-out splits
    of the streams. Raises DataError if no stream has one.
    """

    def __init__(
        self,
        data: DataConfig,
        *,
        tokens: int,
        sequence_length: int,
        vocab_size: int,
        micro_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        tokenizer_hash: str | None = None,
        data_sets: Sequence[DataSet] | None = None,
    ) -> None:
        data_sets = data_sets or open_data_sets(data, sequence_length, vocab_size, tokenizer_hash)
        held_out = [data_set for data_set in data_sets if "val" in data_set.manifest.splits] or data_sets[:1]
        self._splits = [data_set.split("val") for data_set in held_out]
        self.tokenizer_folder = data_sets[0].tokenizer_folder
        sizes = [split.num_samples for split in self._splits]
        total = min(tokens // sequence_length, sum(sizes))
        if total < 1:
            raise DataError(f"validation.tokens={tokens} is less than one sample of {sequence_length} tokens")
        # Cumulative rounding: the shares add up to `total`.
        ends = [total * int(end) // sum(sizes) for end in np.cumsum(sizes)]
        counts = np.diff(ends, prepend=0)
        ids = [(stream, sample) for stream, count in enumerate(counts) for sample in range(count)]
        self.micro_batch_size = micro_batch_size
        self._num_batches = -(-total // (data_parallel_size * micro_batch_size))
        begin, end = (total * r // data_parallel_size for r in (data_parallel_rank, data_parallel_rank + 1))
        self._ids_N2 = np.array(ids, dtype=np.int64)[begin:end]

    def bytes_per_token(self) -> torch.Tensor:
        """UTF-8 bytes of every id, int64 `[vocab_size of the tokenizer]`; 0 for special tokens."""
        return torch.from_numpy(load_bytes_per_token(self.tokenizer_folder))

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[ValidationBatch]:
        for number in range(self._num_batches):
            ids_N2 = self._ids_N2[number * self.micro_batch_size : (number + 1) * self.micro_batch_size]
            padding = self.micro_batch_size - len(ids_N2)
            tokens = np.pad(_read_samples(self._splits, ids_N2), ((0, padding), (0, 0)))
            mask = torch.arange(self.micro_batch_size) < len(ids_N2)
            yield ValidationBatch(torch.from_numpy(tokens), mask)
