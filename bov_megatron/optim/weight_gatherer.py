"""How updated weights come back to all data-parallel ranks, at once or while the next forward pass is under way."""

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
"""Elements that one collective brings: large enough for full bandwidth, small against a rank's memory."""


@dataclass
class _UnderWay:
    """A bucket whose weights have not been written into the parameters yet."""

    bucket: int
    sent: Tensor
    received: Tensor
    work: dist.Work


class WeightGatherer:
    """Brings every rank's updated rows to all data-parallel ranks, in the parameters' own dtype.

    One all-gather per bucket, of up to `bucket_elements` over all ranks: each contributes whole row ranges, packed back
    to back.

    `gather` does it at once. `start` sends everything off and returns: until `finish` the parameters hold rows from
    before the update. `finish` concerns this rank alone, so that a rank may read weights that others don't.

    Args:
        positions: of each parameter, when the forward pass reads it (any ascending numbers); a bucket then holds
            parameters of one position only, and `finish(position)` waits for those up to it. Default: all alike.
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
        together: dict[tuple[int, torch.dtype], list[int]] = {}
        for i, assignment in enumerate(assignments):
            if not assignment.replicated:
                together.setdefault((positions[i], parameters[i].dtype), []).append(i)
        ranks = group_size(group)
        self.buckets: list[list[list[int]]] = []
        """In the order of positions; each lists, per rank, the parameters whose rows that rank contributes."""
        self.positions: list[int] = []
        """One per bucket."""
        for position, dtype in sorted(together, key=lambda key: key[0]):
            packed = self._pack(together[position, dtype], ranks, bucket_elements // ranks)
            self.buckets += packed
            self.positions += [position] * len(packed)
        self._under_way: deque[_UnderWay] = deque()

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
        """Write all ranks' rows into the parameters; `main[i]` holds this rank's rows of parameter i, any dtype.

        Collective, one bucket at a time.
        """
        self._copy_replicated(main)
        for number in range(len(self.buckets)):
            self._send(number, main)
            self.finish()

    def start(self, main: Sequence[Tensor]) -> None:
        """Like `gather`, but return with everything under way; collective. `main` may be changed at once.

        Takes memory for all weights that are gathered, given back as `finish` comes to them.
        """
        self.finish()
        self._copy_replicated(main)
        for number in range(len(self.buckets)):
            self._send(number, main)

    @torch.no_grad()
    def finish(self, position: int | None = None) -> None:
        """Wait for what `start` sent off, up to and including `position` (None: all), and write it into the
        parameters."""
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
        self._under_way.append(_UnderWay(number, sent, received, work))

    def _write(self, arrived: _UnderWay) -> None:
        arrived.work.wait()
        bucket = self.buckets[arrived.bucket]
        size = arrived.sent.numel()
        for rank, indices in enumerate(bucket):
            offset = rank * size
            for i in indices:
                start, stop = self.assignments[i].ranges[rank]
                rows = self.parameters[i].detach()[start:stop]
                rows.copy_(arrived.received[offset : offset + rows.numel()].view_as(rows))
                offset += rows.numel()


def wait_before_forward(
    chunks: Iterable[nn.Module], gatherer: WeightGatherer, parameters: Sequence[LocalParameter]
) -> None:
    """Make every module wait for its own weights before its forward pass.

    Only what a module reads of its own parameters, when called as a module, is waited for. Whoever else reads weights
    calls `await_weight` or `gatherer.finish` first.

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
