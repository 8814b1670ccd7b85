"""Which data-parallel rank updates which rows (ZeRO stage 1).

Muon needs whole matrices, so each block matrix has one owner. Large AdamW tensors are split by rows, small ones are
updated by every rank. Every rank computes the same assignment from the same list, without communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch.distributed as dist
from megatron.core import parallel_state

from bov_megatron.parallel.redistribution import equal_parts

SMALL_TENSOR_ELEMENTS = 16384
"""Tensors smaller than this are updated by all ranks: sharding their state is not worth a collective."""


@dataclass(frozen=True)
class OptimizerProcessGroups:
    """Process groups of an update; None stands for a group of one rank."""

    tensor: dist.ProcessGroup | None = None
    data: dist.ProcessGroup | None = None
    """Data × context parallel ranks, which hold the same weights."""
    model: dist.ProcessGroup | None = None
    """Tensor × pipeline parallel ranks, which together hold the weights once."""

    @classmethod
    def from_parallel_state(cls) -> OptimizerProcessGroups:
        """Megatron's groups, or groups of one where torch.distributed is not running."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
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
    """One per data-parallel rank; an empty range where a rank updates no rows."""
    replicated: bool
    """Whether every rank updates all rows, so that nothing needs to be gathered."""

    @property
    def is_whole(self) -> bool:
        """Whether every rank updates either all rows or none."""
        total = max(stop for _, stop in self.ranges)
        return all(stop - start in (0, total) for start, stop in self.ranges)


def replicate_rows(rows: int, ranks: int) -> RowAssignment:
    return RowAssignment(((0, rows),) * ranks, replicated=True)


def own_rows(rows: int, owner: int, ranks: int) -> RowAssignment:
    """Only rank `owner` updates the tensor."""
    return RowAssignment(tuple((0, rows if rank == owner else 0) for rank in range(ranks)), replicated=ranks == 1)


def split_rows(rows: int, ranks: int) -> RowAssignment:
    """Equal shares in rank order; where rows do not divide, the last ones are smaller or empty."""
    return RowAssignment(tuple(equal_parts(rows, ranks)), replicated=ranks == 1)


def balance(costs: Sequence[float], ranks: int) -> list[int]:
    """Owner of each item, for nearly equal loads: the heaviest item first, each to the least loaded rank.

    Deterministic; ties go to the earlier item and the lower rank.
    """
    loads = [0.0] * ranks
    owners = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[item] = min(range(ranks), key=lambda rank: (loads[rank], rank))
        loads[owners[item]] += costs[item]
    return owners
