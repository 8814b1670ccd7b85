"""All-gather of updated weights over data-parallel ranks, at once or during the next forward pass.

Ranks own unequal shares: a matrix belongs to one rank, and a large world has more ranks than matrices. An all-gather
alone would pad each share to the largest. So weights travel in two steps, as in van de Geijn's broadcast of long
messages: an all-to-all gives every rank an equal part of a bucket, whoever owns it; then the parts are all-gathered.
In any world a rank receives less than the weights' size from others, plus padding of at most one element per rank and
bucket.
"""

from __future__ import annotations

import functools
from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bov_megatron.optim.sharding import RowAssignment, group_rank, group_size
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.parallel.redistribution import Redistribution, equal_parts

BUCKET_ELEMENTS = 128 * 1024 * 1024
"""Most elements of a bucket: large enough for full bandwidth, small compared with a rank's memory."""


@dataclass(frozen=True)
class _Piece:
    """Elements `[start, stop)` of a flattened parameter that one rank updates."""

    owner: int
    index: int
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class _Bucket:
    """Weights that travel together: a flat tensor of pieces, ascending by owner."""

    def __init__(self, pieces: Sequence[_Piece], position: int, group: dist.ProcessGroup | None):
        pieces = sorted(pieces, key=lambda piece: piece.owner)  # stable
        rank, ranks = group_rank(group), group_size(group)
        sizes = [0] * ranks
        for piece in pieces:
            sizes[piece.owner] += piece.size
        bounds = list(accumulate(sizes, initial=0))
        parts = equal_parts(bounds[-1], ranks)
        self.position = position
        self.own = [piece for piece in pieces if piece.owner == rank]
        self.parameters = _joined(pieces)
        """Of all ranks, in the order of the flat tensor."""
        self.part_size = parts[0][1]
        owned = list(zip(bounds[:-1], bounds[1:], strict=True))
        self.to_equal_parts = Redistribution(owned, parts, group) if owned != parts else None
        """None where owners hold equal parts already."""


def _joined(pieces: Sequence[_Piece]) -> list[tuple[int, int, int]]:
    """(parameter, start, stop), where pieces that follow each other in a parameter are one: one copy, however many
    ranks share its rows."""
    joined: list[tuple[int, int, int]] = []
    for piece in pieces:
        if joined and joined[-1][0] == piece.index and joined[-1][2] == piece.start:
            joined[-1] = (piece.index, joined[-1][1], piece.stop)
        else:
            joined.append((piece.index, piece.start, piece.stop))
    return joined


@dataclass
class _Pending:
    """An all-gather whose weights have not been written into the parameters yet."""

    bucket: _Bucket
    part: Tensor
    received: Tensor
    work: dist.Work


class WeightGatherer:
    """Gathers every rank's updated rows on all data-parallel ranks, in the parameters' own dtype.

    Uses an all-to-all and an all-gather per bucket; the number of buckets doesn't depend on the number of ranks.

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
        self.buckets: list[_Bucket] = []
        """Ascending by position."""
        together: dict[tuple, list[_Piece]] = defaultdict(list)
        for i, assignment in enumerate(assignments):
            if not assignment.replicated:
                # Matrices share buckets. A tensor split by rows has its own, in which it is in order and contiguous.
                alone = None if assignment.is_whole else i
                together[positions[i], parameters[i].dtype, alone] += self._pieces(i)
        for key in sorted(together, key=lambda key: key[0]):
            self.buckets += [_Bucket(pieces, key[0], group) for pieces in _cut(together[key], bucket_elements)]
        self._under_way: deque[_Pending] = deque()

    def _pieces(self, index: int) -> list[_Piece]:
        width = self.parameters[index].numel() // self.parameters[index].size(0)
        ranges = enumerate(self.assignments[index].ranges)
        return [_Piece(owner, index, start * width, stop * width) for owner, (start, stop) in ranges if start < stop]

    def gather(self, main: Sequence[Tensor]) -> None:
        """Write all ranks' rows into the parameters, one bucket at a time; collective.

        `main[i]` are this rank's rows of parameter i, in any dtype.
        """
        self._copy_replicated(main)
        for bucket in self.buckets:
            self._all_gather(bucket, self._equal_part(bucket, main))
            self.finish()

    def start(self, main: Sequence[Tensor]) -> None:
        """Like `gather`, but the all-gathers are asynchronous; collective. `main` may be changed at once.

        Allocates memory for all gathered weights; `finish` frees it bucket by bucket.
        """
        self.finish()
        self._copy_replicated(main)
        # Before the first all-gather: an all-to-all is waited for, and would wait for the all-gathers before it.
        parts = [self._equal_part(bucket, main) for bucket in self.buckets]
        for bucket, part in zip(self.buckets, parts, strict=True):
            self._all_gather(bucket, part)

    @torch.no_grad()
    def finish(self, position: int | None = None) -> None:
        """Wait for weights of `start` up to and including `position` (None: all); write them into the parameters."""
        while self._under_way and (position is None or self._under_way[0].bucket.position <= position):
            self._write(self._under_way.popleft())

    @torch.no_grad()
    def _copy_replicated(self, main: Sequence[Tensor]) -> None:
        for i in self.replicated:
            if main[i].data_ptr() != self.parameters[i].data_ptr():
                self.parameters[i].copy_(main[i])

    @torch.no_grad()
    def _equal_part(self, bucket: _Bucket, main: Sequence[Tensor]) -> Tensor:
        """This rank's part of a bucket, with all owners' new weights in it, padded to the parts' common size."""
        dtype = self.parameters[bucket.parameters[0][0]].dtype
        own = main[0].new_empty(sum(piece.size for piece in bucket.own), dtype=dtype)
        offset = 0
        for piece in bucket.own:
            rows = main[piece.index]
            first = piece.start - self._first_element(piece.index)
            own[offset : offset + piece.size].copy_(rows.reshape(-1)[first : first + piece.size])
            offset += piece.size
        part = bucket.to_equal_parts(own) if bucket.to_equal_parts else own
        return nn.functional.pad(part, (0, bucket.part_size - part.numel()))

    def _first_element(self, index: int) -> int:
        """Where this rank's rows start in the flattened parameter."""
        parameter = self.parameters[index]
        return self.assignments[index].ranges[group_rank(self.group)][0] * (parameter.numel() // parameter.size(0))

    @torch.no_grad()
    def _all_gather(self, bucket: _Bucket, part: Tensor) -> None:
        received = part.new_empty(part.numel() * group_size(self.group))
        work = dist.all_gather_into_tensor(received, part, group=self.group, async_op=True)
        self._under_way.append(_Pending(bucket, part, received, work))

    def _write(self, pending: _Pending) -> None:
        pending.work.wait()
        offset = 0
        for index, start, stop in pending.bucket.parameters:
            elements = self.parameters[index].detach().view(-1)[start:stop]
            elements.copy_(pending.received[offset : offset + stop - start])
            offset += stop - start


def _cut(pieces: Sequence[_Piece], limit: int) -> list[list[_Piece]]:
    """Runs of up to `limit` elements, in order."""
    runs: dict[int, list[_Piece]] = defaultdict(list)
    offset = 0
    for piece in pieces:
        start = piece.start
        while start < piece.stop:
            stop = min(piece.stop, start + limit - offset % limit)
            runs[offset // limit].append(_Piece(piece.owner, piece.index, start, stop))
            offset += stop - start
            start = stop
    return list(runs.values())


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
