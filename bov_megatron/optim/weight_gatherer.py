"""All-gather of updated weights over data-parallel ranks, at once or during the next forward pass."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bov_megatron.optim.sharding import RowAssignment, group_rank, group_size
from bov_megatron.parallel.parameter import LocalParameter

BUCKET_ELEMENTS = 128 * 1024 * 1024
"""Elements per collective: large enough for full bandwidth, small compared with a rank's memory."""


@dataclass
class _Pending:
    """An all-gather whose weights have not been written into the parameters yet."""

    bucket: int
    sent: Tensor
    received: Tensor
    work: dist.Work


class WeightGatherer:
    """Gathers every rank's updated rows on all data-parallel ranks, in the parameters' own dtype.

    Uses one all-gather per bucket, of up to `bucket_elements` over all ranks; each rank contributes whole row ranges.

    `gather` is synchronous. `start` returns at once, and other ranks' rows are old until `finish`. `finish` is not
    collective: a rank may read weights that others don't.

    Args:
        positions: of each parameter, when the forward pass reads it (any ascending numbers). A bucket holds parameters
            of one position only, so that `finish(position)` waits for no later ones. Default: all the same.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        assignments: Sequence[RowAssignment],
        group: dist.ProcessGroup | None,
        bucket_elements: int = BUCKET_ELEMENTS,
        positions: Sequence[int] | None = None,
    ):
        self.group = group
        self.parameters = list(parameters)
        self.assignments = list(assignments)
        self.replicated = [i for i, assignment in enumerate(assignments) if assignment.replicated]
        positions = positions or [0] * len(parameters)
        gathered: dict[tuple[int, torch.dtype], list[int]] = {}
        for i, assignment in enumerate(assignments):
            if not assignment.replicated:
                gathered.setdefault((positions[i], parameters[i].dtype), []).append(i)
        ranks = group_size(group)
        self.buckets: list[list[list[int]]] = []
        """Ascending by position; for each rank, the parameters whose rows it contributes."""
        self.positions: list[int] = []
        """Of each bucket."""
        for position, dtype in sorted(gathered, key=lambda key: key[0]):
            packed = self._pack(gathered[position, dtype], ranks, bucket_elements // ranks)
            self.buckets += packed
            self.positions += [position] * len(packed)
        self._under_way: deque[_Pending] = deque()

    def _pack(self, indices: list[int], ranks: int, limit: int) -> list[list[list[int]]]:
        queues = []
        for rank in range(ranks):
            queue: list[list[int]] = [[]]
            filled = 0
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

    def gather(self, main: Sequence[Tensor]) -> None:
        """Write all ranks' rows into the parameters, one bucket at a time; collective.

        `main[i]` are this rank's rows of parameter i, in any dtype.
        """
        self._copy_replicated(main)
        for number in range(len(self.buckets)):
            self._send(number, main)
            self.finish()

    def start(self, main: Sequence[Tensor]) -> None:
        """Like `gather`, but asynchronous; collective. `main` may be changed at once.

        Allocates memory for all gathered weights; `finish` frees it bucket by bucket.
        """
        self.finish()
        self._copy_replicated(main)
        for number in range(len(self.buckets)):
            self._send(number, main)

    @torch.no_grad()
    def finish(self, position: int | None = None) -> None:
        """Wait for weights of `start` up to and including `position` (None: all); write them into the parameters."""
        while self._under_way and (position is None or self.positions[self._under_way[0].bucket] <= position):
            self._write(self._under_way.popleft())

    @torch.no_grad()
    def _copy_replicated(self, main: Sequence[Tensor]) -> None:
        for i in self.replicated:
            if main[i].data_ptr() != self.parameters[i].data_ptr():
                self.parameters[i].copy_(main[i])

    @torch.no_grad()
    def _send(self, number: int, main: Sequence[Tensor]) -> None:
        bucket = self.buckets[number]
        size = max(sum(self._numel(i, rank) for i in indices) for rank, indices in enumerate(bucket))
        parameter = self.parameters[next(i for indices in bucket for i in indices)]
        sent = torch.empty(size, dtype=parameter.dtype, device=parameter.device)
        offset = 0
        for i in bucket[group_rank(self.group)]:
            sent[offset : offset + main[i].numel()].copy_(main[i].reshape(-1))
            offset += main[i].numel()
        received = torch.empty(size * len(bucket), dtype=parameter.dtype, device=parameter.device)
        work = dist.all_gather_into_tensor(received, sent, group=self.group, async_op=True)
        self._under_way.append(_Pending(number, sent, received, work))

    def _write(self, pending: _Pending) -> None:
        pending.work.wait()
        bucket = self.buckets[pending.bucket]
        size = pending.sent.numel()
        for rank, indices in enumerate(bucket):
            offset = rank * size
            for i in indices:
                start, stop = self.assignments[i].ranges[rank]
                rows = self.parameters[i].detach()[start:stop]
                rows.copy_(pending.received[offset : offset + rows.numel()].view_as(rows))
                offset += rows.numel()


def wait_before_forward(
    chunks: Iterable[nn.Module], gatherer: WeightGatherer, parameters: Sequence[LocalParameter]
) -> None:
    """Make every module wait for its own parameters before its forward pass.

    Code that reads weights in any other way must call `await_weight` or `gatherer.finish` first.

    Args:
        parameters: those that `gatherer` gathers.
    """
    positions = {id(local.parameter): local.forward_position for local in parameters}
    for chunk in chunks:
        for module in chunk.modules():
            own = [positions[id(p)] for p in module.parameters(recurse=False) if id(p) in positions]
            if own:
                module.register_forward_pre_hook(functools.partial(_finish, gatherer, max(own)))
    for local in parameters:
        local.parameter.on_read = functools.partial(gatherer.finish, local.forward_position)


def _finish(gatherer: WeightGatherer, position: int, module: nn.Module, arguments: tuple) -> None:
    gatherer.finish(position)
