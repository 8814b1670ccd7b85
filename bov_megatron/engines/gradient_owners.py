"""Reduced gradients, from the ranks that a reduce-scatter leaves them on to the ranks that update with them.

A reduce-scatter gives data-parallel rank r the sum of the r-th of equal parts of each of Megatron's buckets, whoever
owns its rows (optim/sharding.py). An all-to-all sends every row to its owner. In both together a rank receives about
the gradients' size at most, in any world, where an all-reduce takes twice that.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bov_megatron.engines.data_parallel import DataParallel
from bov_megatron.optim.parameter_shard import ParameterShard
from bov_megatron.optim.sharding import RowAssignment
from bov_megatron.parallel.redistribution import equal_parts

Stretch = tuple[int, int]
"""Elements `[start, stop)` of a bucket's gradients."""
MESSAGE_ELEMENTS = 32 * 1024 * 1024
"""Most elements that a rank sends at a time."""


class GradientOwners:
    """Sends the gradients of wrapped model chunks to their owners, in place.

    Args:
        wrapped: with `use_distributed_optimizer`, so that gradients are reduce-scattered.
        parameters: of all chunks.
        group: data- and context-parallel ranks.
    """

    def __init__(self, wrapped: Sequence[DataParallel], parameters: Sequence[ParameterShard], group: dist.ProcessGroup):
        self.group = group
        assignments = {id(shard.local.parameter): shard.assignment for shard in parameters}
        self.buckets = [
            _Bucket(buffer.param_index_map, bucket, assignments, group)
            for chunk in wrapped
            for buffer in chunk.buffers
            for bucket in buffer.buckets
        ]

    @torch.no_grad()
    def send(self) -> None:
        """Complete the `main_grad` of this rank's rows, once all reduce-scatters are; collective.

        What other rows of `main_grad` hold afterwards is of no use: this rank's own share of their sum.
        """
        for bucket in self.buckets:
            bucket.send_to_owners()
        # Tensors that every rank updates are small: the rank that has the sum of an element adds it to zeros.
        everybodys = [bucket.everybodys_sums() for bucket in self.buckets]
        sums = torch.cat(everybodys)
        if sums.numel():
            dist.all_reduce(sums, group=self.group)
            for bucket, part in zip(self.buckets, sums.split([len(own) for own in everybodys]), strict=True):
                bucket.set_everybodys(part)


class _Bucket:
    """One of Megatron's buckets.

    Args:
        places: of each parameter, its first element in the buffer that the bucket is part of.
    """

    def __init__(self, places: dict, bucket: Any, assignments: dict[int, RowAssignment], group: dist.ProcessGroup):
        self.gradients, self.group = bucket.grad_data, group
        ranks = group.size()
        parts = equal_parts(self.gradients.numel(), ranks)
        self.held = parts[group.rank()]
        owned: list[list[Stretch]] = [[] for _ in range(ranks)]
        self.everybodys: list[Stretch] = []
        for parameter in sorted(bucket.params_list, key=lambda parameter: places[parameter][0]):
            start, width = places[parameter][0] - bucket.offset, parameter.numel() // parameter.size(0)
            assignment = assignments[id(parameter)]
            if assignment.replicated:
                self.everybodys.append((start, start + parameter.numel()))
                continue
            for (first, last), stretches in zip(assignment.ranges, owned, strict=True):
                if first < last:
                    stretches.append((start + first * width, start + last * width))
        self.messages = []
        for offset in range(0, parts[0][1], MESSAGE_ELEMENTS):
            held = [(min(start + offset, stop), min(start + offset + MESSAGE_ELEMENTS, stop)) for start, stop in parts]
            self.messages.append(_Message(owned, held, group.rank()))

    def send_to_owners(self) -> None:
        for message in self.messages:
            sent = torch.cat([self.gradients[:0], *(self.gradients[start:stop] for start, stop in message.sent)])
            received = self.gradients.new_empty(sum(message.sizes_received))
            dist.all_to_all_single(received, sent, message.sizes_received, message.sizes_sent, group=self.group)
            self._set(message.received, received)

    def everybodys_sums(self) -> Tensor:
        """Gradients of tensors that every rank updates, flat: the sums that this rank holds, zeros elsewhere."""
        sums = self.gradients.new_zeros(_size(self.everybodys))
        offset = 0
        for start, stop in self.everybodys:
            for first, last in _inside([(start, stop)], self.held):
                sums[offset + first - start : offset + last - start] = self.gradients[first:last]
            offset += stop - start
        return sums

    def set_everybodys(self, sums: Tensor) -> None:
        self._set(self.everybodys, sums)

    def _set(self, stretches: Sequence[Stretch], values: Tensor) -> None:
        offset = 0
        for start, stop in stretches:
            self.gradients[start:stop].copy_(values[offset : offset + stop - start])
            offset += stop - start


class _Message:
    """What this rank sends to the owners in one all-to-all, and what it receives.

    Args:
        owned, held: of each rank; `held` ascend by rank, so what comes from all ranks is in the bucket's order.
    """

    def __init__(self, owned: Sequence[Sequence[Stretch]], held: Sequence[Stretch], rank: int):
        sent = [_inside(stretches, held[rank]) for stretches in owned]
        received = [_inside(owned[rank], part) for part in held]
        self.sizes_sent = [_size(stretches) for stretches in sent]
        self.sizes_received = [_size(stretches) for stretches in received]
        self.sent = _joined(sent)
        self.received = _joined(received)


def _inside(stretches: Sequence[Stretch], part: Stretch) -> list[Stretch]:
    clipped = [(max(start, part[0]), min(stop, part[1])) for start, stop in stretches]
    return [(start, stop) for start, stop in clipped if start < stop]


def _joined(of_ranks: Sequence[Sequence[Stretch]]) -> list[Stretch]:
    """All ranks' elements in order, where stretches that follow each other are one: one copy, however many ranks share
    a tensor's rows."""
    joined: list[Stretch] = []
    for start, stop in itertools.chain.from_iterable(of_ranks):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return joined


def _size(stretches: Sequence[Stretch]) -> int:
    return sum(stop - start for start, stop in stretches)
