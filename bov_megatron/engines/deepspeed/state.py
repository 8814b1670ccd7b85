"""ZeRO's shards of the parameters, and their conversion to the rows that checkpoints store.

A data-parallel rank has a range of each parameter's elements, a "stretch". ZeRO 1 and 2 flatten a group of parameters
and cut it, so a stretch is anything from nothing to the whole parameter; ZeRO 3 cuts every parameter into equal parts.
Checkpoints store rows (see optim.sharded_state). `Redistribution` converts between the two, one parameter at a time, so
that no rank holds more than its share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bov_megatron.optim.sharding import RowAssignment, group_rank, group_size, split_rows
from bov_megatron.parallel.device import device
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.parallel.redistribution import Ranges, Redistribution


@dataclass(frozen=True)
class Stretch:
    """This rank's elements `[start, stop)` of a flattened parameter. They start at `offset` of `flat`, the fp32 weights
    that DeepSpeed's optimizer updates."""

    flat: Tensor
    offset: int
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """The stretch's view of a tensor with the layout of `flat`."""
        return tensor.detach().narrow(0, self.offset, self.stop - self.start)


class ZeroParameter:
    """A parameter, this rank's stretch of it, and the rows that this rank writes into checkpoints."""

    def __init__(self, local: LocalParameter, group: dist.ProcessGroup):
        self.local, self.group = local, group
        self.shape, self.dtype = local.shape, local.parameter.dtype
        self.assignment: RowAssignment = split_rows(self.shape[0], group_size(group))
        self.rows = self.assignment.ranges[group_rank(group)]
        self.stretch: Stretch | None = None
        """None where this rank has no element."""
        self.ranges: Ranges = ()
        """All data-parallel ranks' stretches."""

    @property
    def row_ranges(self) -> Ranges:
        """All data-parallel ranks' rows, counted in elements."""
        width = self.shape[1:].numel()
        return [(start * width, stop * width) for start, stop in self.assignment.ranges]

    @property
    def has_rows(self) -> bool:
        """Whether this rank writes any part of the parameter."""
        return self.rows[0] < self.rows[1]

    def empty_rows(self, dtype: torch.dtype) -> Tensor:
        """Space in host memory for this rank's rows."""
        return torch.empty(self.rows[1] - self.rows[0], *self.shape[1:], dtype=dtype)

    def to_rows(self, read: Callable[[Stretch], Tensor], dtype: torch.dtype) -> Tensor:
        """This rank's rows, in host memory, assembled from `read(stretch)` of all ranks; collective."""
        mine = torch.empty(0, dtype=dtype) if self.stretch is None else read(self.stretch)
        rows = Redistribution(self.ranges, self.row_ranges, self.group)(mine.to(device(), dtype))
        return rows.view(-1, *self.shape[1:]).cpu()

    def from_rows(self, rows: Tensor | None, read: Callable[[Stretch], Tensor], dtype: torch.dtype) -> None:
        """The inverse: write this rank's elements, from all ranks' rows, into the view `read(stretch)`; collective."""
        mine = torch.empty(0, dtype=dtype) if rows is None else rows.reshape(-1)
        elements = Redistribution(self.row_ranges, self.ranges, self.group)(mine.to(device(), dtype))
        if self.stretch is not None:
            read(self.stretch).copy_(elements)


def gather_ranges(parameters: Sequence[ZeroParameter], group: dist.ProcessGroup | None) -> None:
    """Set `ranges` of every parameter, from all ranks' stretches; collective."""
    mine = [(p.stretch.start, p.stretch.stop) if p.stretch else (0, 0) for p in parameters]
    sent = torch.tensor(mine, device=device())
    received = sent.new_empty(group_size(group), *sent.shape)
    dist.all_gather_into_tensor(received.flatten(0, 1), sent, group=group)
    for parameter, ranges in zip(parameters, received.transpose(0, 1).tolist(), strict=True):
        parameter.ranges = _ascending(ranges, parameter.shape.numel(), parameter.local.qualified_name)


def _ascending(ranges: list[list[int]], total: int, name: str) -> Ranges:
    """The ranges with empty ones moved into order. Raises RuntimeError where they don't split the tensor in the order
    of ranks, which `Redistribution` requires."""
    result, reached = [], 0
    for start, stop in ranges:
        if start == stop:
            start = stop = reached
        if start != reached:
            raise RuntimeError(f"{name}: DeepSpeed's stretches {ranges} are not in the order of data-parallel ranks")
        result.append((start, stop))
        reached = stop
    if reached != total:
        raise RuntimeError(f"{name}: DeepSpeed's stretches {ranges} end at {reached} of {total} elements")
    return result
