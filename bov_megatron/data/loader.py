"""This data-parallel rank's micro-batches, step by step.

Every rank builds its own loader from the recipe and its data-parallel rank: tensor, context and pipeline ranks of one
data-parallel rank read the same samples, so nothing is broadcast and no process waits for another. Threads read ahead:
the work is copying from the page cache, and threads neither fork a process that holds communicators nor
copy tensors between processes.

Shapes: M = micro_batch_size, T = sequence_length, B = global_batch_size.
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
from bov_megatron.errors import DataError
from bov_megatron.recipe import DataConfig
from bov_megatron.recipe.layout_checks import micro_batches_per_rank


@dataclass
class TrainBatch:
    """One step's work for one data-parallel rank."""

    place: int
    """0-based, in the order: the step, unless batches were skipped before it."""
    micro_batches: list[torch.Tensor]
    """int64 `[M, T + 1]` each: inputs are `[:, :-1]`, labels `[:, 1:]`."""
    digest: str
    """Fingerprint of the ids of the whole global batch, the same on every rank."""
    ids_B2: np.ndarray
    """(stream, sample) of the whole global batch."""


class TrainLoader:
    """Endless iterator of TrainBatch from `start_step` on.

    Args:
        data: the recipe's section.
        sequence_length, vocab_size: the model's; data of another length or a larger vocabulary is refused.
        global_batch_size, micro_batch_size: the recipe's.
        data_parallel_rank, data_parallel_size: which contiguous slice of each global batch is this rank's.
        start_step: 0-based step that comes first; resuming is just this.
        skipped: windows of the order that are left out, pairs (first, last) of 0-based places.
        tokenizer_hash: a checkpoint's, to refuse data of another tokenizer.

    Batches depend on step and skipped windows alone: the union of all ranks' micro-batches is the same for every
    data_parallel_size.
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
    ) -> None:
        micro_batches_per_rank(global_batch_size, micro_batch_size, data_parallel_size)  # raises if not a whole number
        if not 0 <= data_parallel_rank < data_parallel_size:
            raise DataError(f"data_parallel_rank {data_parallel_rank} is not in [0, {data_parallel_size})")
        self.data_sets = open_data_sets(data, sequence_length, vocab_size, tokenizer_hash)
        self._splits = [data_set.split("train") for data_set in self.data_sets]
        self.order = SampleOrder(
            [split.shard_sizes for split in self._splits],
            global_batch_size,
            weights=[stream.weight for stream in streams_of(data)],
            shuffle=data.shuffle,
            shuffle_seed=data.shuffle_seed,
            shuffle_block_size=data.shuffle_block_size,
            num_canonical_nodes=data.num_canonical_nodes,
        )
        per_rank = global_batch_size // data_parallel_size
        self._slots = slice(data_parallel_rank * per_rank, (data_parallel_rank + 1) * per_rank)
        self.micro_batch_size = micro_batch_size
        self.step = start_step
        """The step that comes next."""
        self.skipped = SkippedBatches(skipped)
        self._ahead: deque[Future[TrainBatch]] = deque()
        self._prefetch = max(data.prefetch_factor, 1)
        self._readers = ThreadPoolExecutor(data.num_workers, "data-read") if data.num_workers else None
        self._fetcher = _ShardFetcher(self._splits) if any(d.cache for d in self.data_sets) else None

    @property
    def tokenizer_hash(self) -> str:
        """To be stored with checkpoints."""
        return self.data_sets[0].manifest.tokenizer_hash

    def epoch(self, stream: int = 0) -> float:
        """Passes over a stream's training samples before the next step."""
        place = self.skipped.place(self.step)
        drawn = sum(self.order.drawn(part, stream, place) for part in range(self.order.num_parts))
        return drawn / self._splits[stream].num_samples

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
        """Give `step` next, leaving out `skipped` (as at the beginning); batches read ahead are dropped."""
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()
        self.step, self.skipped = step, SkippedBatches(skipped)

    def _load(self, place: int) -> TrainBatch:
        ids_B2 = self.order.batch(place)
        if self._fetcher:
            self._fetcher.fetch(self.order.upcoming_shards(place, self._slots.start, self._slots.stop))
        tokens = torch.from_numpy(self._read(ids_B2[self._slots]))
        return TrainBatch(place, list(tokens.split(self.micro_batch_size)), digest(ids_B2), ids_B2)

    def _read(self, ids_N2: np.ndarray) -> np.ndarray:
        tokens = np.empty((len(ids_N2), self._splits[0].length), dtype=np.int64)
        for stream, split in enumerate(self._splits):
            chosen = ids_N2[:, 0] == stream
            if chosen.any():
                tokens[chosen] = split.read(ids_N2[chosen, 1])
        return tokens

    def close(self) -> None:
        """End the threads; batches read ahead are dropped."""
        for data_set in self.data_sets:
            if data_set.cache:
                data_set.cache.close()  # a thread may be waiting for a home that is out of reach
        if self._readers:
            self._readers.shutdown(wait=True, cancel_futures=True)
        if self._fetcher:
            self._fetcher.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _ShardFetcher:
    """Downloads the shards that will be needed, before they are."""

    def __init__(self, splits: list[SplitReader]) -> None:
        self._splits = splits
        self._asked: set[tuple[int, int]] = set()
        self._pool = ThreadPoolExecutor(2, "data-fetch")

    def fetch(self, shards: list[tuple[int, int]]) -> None:
        for stream, shard in shards:
            if (stream, shard) not in self._asked and self._splits[stream].data_set.cache:
                self._asked.add((stream, shard))
                # A failure comes again, and is raised, when the shard is read.
                self._pool.submit(self._splits[stream].ensure, shard)

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class ValidationBatch:
    """One micro-batch of held-out samples."""

    tokens: torch.Tensor
    """int64 `[M, T + 1]`."""
    mask: torch.Tensor
    """bool `[M]`: False for rows that only fill the batch and must not be counted."""


class ValidationLoader:
    """The held-out samples in stored order, each on exactly one data-parallel rank.

    Iterate it any number of times; every rank gets the same number of batches, `len(self)`. Of several streams each
    gives the same share of its held-out split, up to `tokens` predicted tokens in all. A stream may have none; if all
    have none DataError says so.
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
    ) -> None:
        data_sets = open_data_sets(data, sequence_length, vocab_size, tokenizer_hash)
        having = [data_set for data_set in data_sets if "val" in data_set.manifest.splits] or data_sets[:1]
        self._splits = [data_set.split("val") for data_set in having]
        self.data_sets: list[DataSet] = data_sets
        sizes = [split.num_samples for split in self._splits]
        wanted = min(tokens // sequence_length, sum(sizes))
        if wanted < 1:
            raise DataError(f"validation.tokens={tokens} is less than one sample of {sequence_length} tokens")
        # Cumulative rounding: the shares add up to `wanted`.
        ends = [wanted * int(end) // sum(sizes) for end in np.cumsum(sizes)]
        counts = np.diff(ends, prepend=0)
        ids = [(stream, sample) for stream, count in enumerate(counts) for sample in range(count)]
        self.num_samples = wanted
        """Samples over all ranks."""
        self.micro_batch_size = micro_batch_size
        self._num_batches = -(-wanted // (data_parallel_size * micro_batch_size))
        begin, end = (wanted * r // data_parallel_size for r in (data_parallel_rank, data_parallel_rank + 1))
        self._ids_N2 = np.array(ids, dtype=np.int64)[begin:end]

    def bytes_per_token(self) -> torch.Tensor:
        """UTF-8 bytes of every id, int64 `[vocab_size of the tokenizer]`; 0 for special tokens, which count nothing."""
        return torch.from_numpy(self.data_sets[0].bytes_per_token())

    def __len__(self) -> int:
        """Micro-batches on each rank."""
        return self._num_batches

    def __iter__(self) -> Iterator[ValidationBatch]:
        for number in range(self._num_batches):
            ids_N2 = self._ids_N2[number * self.micro_batch_size : (number + 1) * self.micro_batch_size]
            tokens = np.zeros((self.micro_batch_size, self._splits[0].length), dtype=np.int64)
            for stream, split in enumerate(self._splits):
                chosen = np.flatnonzero(ids_N2[:, 0] == stream)
                if len(chosen):
                    tokens[chosen] = split.read(ids_N2[chosen, 1])
            mask = torch.arange(self.micro_batch_size) < len(ids_N2)
            yield ValidationBatch(torch.from_numpy(tokens), mask)
