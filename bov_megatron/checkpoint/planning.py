"""Which rank writes what of a checkpoint: agreed on once, and asked of each later save in one number.

Planning is collective and doesn't touch the disk. At the first save of a layout ranks exchange what they hold, divide
replicas and validate that every tensor is written once; after it, rank 0 learns where each tensor lies. Both grow with
the world, to millions of entries over thousands of ranks, and neither changes until the layout does. So they are kept,
and a save begins by asking whether all ranks hold what they held: only if not, everything is exchanged anew. What is
new in each save, the checksums, is a few numbers a rank.

Megatron's format, planning and division of replicas are used. Its own caches are not trusted: each rank would decide
alone whether to use them, and those of the division are never compared with what a rank holds.
"""

from __future__ import annotations

import pickle
import queue
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.dist_checkpointing.validation import validate_sharding_integrity
from torch import Tensor
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION
from torch.distributed.checkpoint.metadata import Metadata

from bov_megatron.checkpoint.manifest import FileEntry
from bov_megatron.checkpoint.writing import BACKEND, BACKEND_VERSION, FILES_PER_RANK, Share, Written
from bov_megatron.engines.base import Engine
from bov_megatron.errors import CheckpointError
from bov_megatron.parallel.agreement import all_agree, gather_on_first_rank, on_first_rank
from bov_megatron.parallel.device import device

_planners: weakref.WeakKeyDictionary[Engine, Planner] = weakref.WeakKeyDictionary()


def planner_of(engine: Engine) -> Planner:
    """The planner of an engine's saves, which remembers what its ranks agreed on."""
    if engine not in _planners:
        _planners[engine] = Planner(parallel_state.get_data_parallel_group(with_context_parallel=True))
    return _planners[engine]


@dataclass(frozen=True)
class Index:
    """Where each tensor of a checkpoint lies, and in which files."""

    content: bytes
    """Of `.metadata`. As objects it would be many times as large, and slow down each garbage collection."""
    sizes: list[dict[str, int]]
    """By rank: its files' names and bytes."""


class Planner:
    """What ranks have agreed on about their checkpoints.

    Args:
        replicas: group over which the writing of replicated tensors is divided.
    """

    def __init__(self, replicas: dist.ProcessGroup):
        self._replicas = replicas
        self._held: list | None = None
        """This rank's shards, without their data, when ranks last agreed on who writes what."""
        self._replica_ids: list = []
        """Of these shards, where 0 is for those that this rank writes."""
        self._strategy = _PlanningStrategy()
        self._metadata: Metadata | None = None
        """Index of the whole checkpoint on rank 0, without its files, until they are known."""
        self._placed: tuple | None = None
        """Where this rank's tensors lay in its files at the last save, and how large these were."""
        self._index = Index(b"", [])
        """Of the last save, on rank 0."""

    def plan(self, state: dict[str, Any], folder: Path, read: Callable[[str], Tensor] | None = None) -> Share:
        """Copy what this rank writes to host memory; collective, one number if all ranks hold what they held before.

        Args:
            state: Megatron's sharded state dict; what isn't a tensor is stored once.
            folder: existing and empty.
            read: gives a tensor by its key as it is written, where those of `state` have no memory.
        """
        # Keeps Megatron from starting a server process per rank, which its own writers would need.
        filesystem_async._results_queue = queue.Queue()
        sharded, common = save_preprocess(state, validate_access_integrity=False)
        shards = list(nested_values(sharded))
        held = [shard.without_data() for shard in shards]
        if not all_agree(held == self._held):
            self._divide(sharded, shards)
            self._held = held
        for shard, replica_id in zip(shards, self._replica_ids, strict=True):
            shard.replica_id = replica_id
        writer, metadata = self._strategy.async_save(sharded, str(folder))
        self._metadata = metadata or self._metadata
        buckets = writer.write_buckets
        staged = writer.preload_tensors(buckets) if buckets and read is None else buckets
        return Share(folder, staged or [], common if dist.get_rank() == 0 else None, read)

    def _divide(self, sharded: dict[str, Any], shards: list) -> None:
        """Agree on who writes which replica, and validate that every tensor is written once; collective."""
        distribution = determine_main_replica_uniform_distribution(sharded, self._replicas)
        distribute_main_replicas_with_precomputed_distribution(sharded, self._replicas, distribution)
        everyone = gather_on_first_rank([shard.without_data() for shard in shards])
        on_first_rank(lambda: _validate(everyone))
        self._replica_ids = [shard.replica_id for shard in shards]
        self._strategy, self._placed = _PlanningStrategy(), None

    def collect(self, written: Written) -> tuple[bytes, dict[str, FileEntry]]:
        """Content of the index, and the entries of all ranks' files of tensors, on rank 0; collective. Each rank sends
        its checksums, and where its tensors lie only if that has changed on any rank.

        Args:
            written: this rank's share, without error.
        """
        sizes = {name: entry.size for name, entry in written.files.items()}
        placed = (written.results, sizes)
        if not all_agree(placed == self._placed):
            everyone = gather_on_first_rank(placed)
            if dist.get_rank() == 0:
                self._index = self._make_index(everyone)
            self._placed = placed
        checksums = _all_checksums([entry.xxh3_64 for entry in written.files.values()])
        if dist.get_rank() != 0:
            return b"", {}
        entries = {
            name: FileEntry(size, checksum)
            for sizes, of_rank in zip(self._index.sizes, checksums, strict=True)
            for (name, size), checksum in zip(sizes.items(), of_rank[: len(sizes)], strict=True)
        }
        return self._index.content, entries

    def _make_index(self, everyone: Sequence[tuple]) -> Index:
        metadata = self._metadata or pickle.loads(self._index.content)  # the same tensors, placed elsewhere
        metadata.version = CURRENT_DCP_VERSION
        metadata.storage_data = {result.index: result.storage_data for results, _ in everyone for result in results}
        self._metadata = None
        return Index(pickle.dumps(metadata), [sizes for _, sizes in everyone])


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy without the writing. After the first save it plans as in that one, without asking others."""

    def __init__(self):
        super().__init__(BACKEND, BACKEND_VERSION, thread_count=FILES_PER_RANK, cached_metadata=True)

    def _get_save_and_finalize_callbacks(self, writer, planned):
        self.validated_cache_reuse = True  # ours to say: see Planner
        metadata = planned[1]
        if metadata is not None:
            vars(metadata).pop("all_local_plans", None)  # of all ranks; the index has the same and is as large
        return writer, metadata


def _validate(everyone: list[list]) -> None:
    """Raise CheckpointError unless each part of every tensor is written by one rank. `everyone`: all ranks' shards."""
    try:
        validate_sharding_integrity(everyone)
    except (CheckpointingException, AssertionError) as error:
        raise CheckpointError(
            f"this layout can't be saved: {error}; report it with the recipe, and use another layout meanwhile"
        ) from error


def _all_checksums(own: list[str]) -> list[list[str]]:
    """Checksums of every rank's files, by rank; collective."""
    numbers = [int.from_bytes(bytes.fromhex(checksum), "big", signed=True) for checksum in own]
    sent = torch.zeros(FILES_PER_RANK, dtype=torch.int64)
    sent[: len(own)] = torch.tensor(numbers, dtype=torch.int64)
    received = torch.empty(dist.get_world_size() * FILES_PER_RANK, dtype=torch.int64, device=device())
    # To all ranks, although rank 0 alone needs them: a ring, where a gather would connect it to every other rank.
    dist.all_gather_into_tensor(received, sent.to(received.device))
    digits = received.cpu().numpy().astype(">i8").tobytes().hex()
    each = [digits[at : at + 16] for at in range(0, len(digits), 16)]
    return [each[at : at + FILES_PER_RANK] for at in range(0, len(each), FILES_PER_RANK)]
