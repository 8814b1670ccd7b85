"""Which data-parallel rank updates which rows, and how updated weights come back to all of them (ZeRO stage 1).

Muon needs whole matrices, so each block matrix has one owner; the large AdamW tensors are split by rows; small ones
are updated by every rank. Every rank computes the same assignment from the same list: nothing is negotiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SMALL_TENSOR_ELEMENTS = 16384
"""Tensors below this are updated by all ranks: their state is not worth a collective."""
BUCKET_ELEMENTS = 128 * 1024 * 1024
"""Elements that one collective brings: large enough for full bandwidth, small against a rank's memory."""


@dataclass(frozen=True)
class OptimizerProcessGroups:
    """The process groups that an update needs; `None` stands for a group of one."""

    tensor: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    """Data × context parallel ranks: all that hold the same weights."""
    model: dist.ProcessGroup | None = None
    """Tensor × pipeline parallel ranks: all that together hold the weights once."""

    @classmethod
    def from_parallel_state(cls) -> OptimizerProcessGroups:
        """Megatron's groups, or groups of one where torch.distributed is not running."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        from megatron.core import parallel_state

        return cls(
            tensor=parallel_state.get_tensor_model_parallel_group(),
            data=parallel_state.get_data_parallel_group(with_context_parallel=True),
            model=parallel_state.get_model_parallel_group(),
        )


def group_size(group: dist.ProcessGroup | None) -> int:
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


@dataclass(frozen=True)
class RowAssignment:
    """Rows `[start, stop)` of one local tensor that each data-parallel rank updates."""

    ranges: tuple[tuple[int, int], ...]
    """One per data-parallel rank; empty ranges where a rank has no part."""
    replicated: bool
    """True where every rank updates all rows by itself, so that nothing needs to be gathered."""

    @property
    def is_whole(self) -> bool:
        """Whether the rank or ranks that update the tensor hold all of its rows."""
        total = max(stop for _, stop in self.ranges)
        return all(stop - start in (0, total) for start, stop in self.ranges)


def replicate_rows(rows: int, ranks: int) -> RowAssignment:
    """Every rank updates everything."""
    return RowAssignment(((0, rows),) * ranks, replicated=True)


def own_rows(rows: int, owner: int, ranks: int) -> RowAssignment:
    """`owner` alone updates everything."""
    return RowAssignment(tuple((0, rows if rank == owner else 0) for rank in range(ranks)), replicated=ranks == 1)


def split_rows(rows: int, ranks: int) -> RowAssignment:
    """Equal shares in rank order; the last ones are smaller, or empty, where rows do not divide."""
    share = -(-rows // ranks)
    bounds = [min(rows, share * rank) for rank in range(ranks + 1)]
    return RowAssignment(tuple(zip(bounds[:-1], bounds[1:], strict=True)), replicated=ranks == 1)


def balance(costs: Sequence[float], ranks: int) -> list[int]:
    """Owner of each item such that loads are nearly equal: heaviest first, each to the least loaded rank.

    Deterministic; ties go to the earlier item and the lower rank.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[item] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners


class WeightGatherer:
    """Brings every rank's updated rows to all data-parallel ranks, in the parameters' own dtype.

    One all-gather per bucket, of up to `bucket_elements` over all ranks: each contributes whole row ranges, packed back
    to back.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        assignments: Sequence[RowAssignment],
        group: dist.ProcessGroup | None,
        bucket_elements: int = BUCKET_ELEMENTS,
    ):
        self.group = group
        self.parameters = list(parameters)
        self.assignments = list(assignments)
        shared = [i for i, assignment in enumerate(assignments) if not assignment.replicated]
        self.replicated = [i for i, assignment in enumerate(assignments) if assignment.replicated]
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in shared:
            by_dtype.setdefault(parameters[i].dtype, []).append(i)
        ranks = group_size(group)
        self.buckets = [
            bucket for dtype in by_dtype for bucket in self._pack(by_dtype[dtype], ranks, bucket_elements // ranks)
        ]

    def _pack(self, indices: list[int], ranks: int, limit: int) -> list[list[list[int]]]:
        """Buckets; each lists, per rank, the indices of the tensors whose rows that rank contributes."""
        queues = []
        for rank in range(ranks):
            queue, filled = [[]], 0
            for i in indices:
                size = self._numel(i, rank)
                if size == 0:
                    continue
                if queue[-1] and filled + size > limit:
                    queue.append([])
                    filled = 0
                queue[-1].append(i)
                filled += size
            queues.append(queue)
        length = max(len(queue) for queue in queues)
        return [[queue[n] if n < len(queue) else [] for queue in queues] for n in range(length)]

    def _numel(self, index: int, rank: int) -> int:
        start, stop = self.assignments[index].ranges[rank]
        parameter = self.parameters[index]
        return (stop - start) * (parameter.numel() // parameter.size(0))

    @torch.no_grad()
    def gather(self, main: Sequence[Tensor | None]) -> None:
        """Write all ranks' rows into the parameters; `main[i]` holds this rank's rows of parameter i, any dtype."""
        for i in self.replicated:
            if main[i].data_ptr() != self.parameters[i].data_ptr():
                self.parameters[i].copy_(main[i])
        me = group_rank(self.group)
        for bucket in self.buckets:
            size = max(sum(self._numel(i, rank) for i in indices) for rank, indices in enumerate(bucket))
            parameter = self.parameters[next(i for indices in bucket for i in indices)]
            sent = torch.empty(size, dtype=parameter.dtype, device=parameter.device)
            offset = 0
            for i in bucket[me]:
                sent[offset : offset + main[i].numel()].copy_(main[i].reshape(-1))
                offset += main[i].numel()
            received = torch.empty(size * len(bucket), dtype=parameter.dtype, device=parameter.device)
            dist.all_gather_into_tensor(received, sent, group=self.group)
            for rank, indices in enumerate(bucket):
                offset = rank * size
                for i in indices:
                    start, stop = self.assignments[i].ranges[rank]
                    rows = self.parameters[i].detach()[start:stop]
                    rows.copy_(received[offset : offset + rows.numel()].view_as(rows))
                    offset += rows.numel()
