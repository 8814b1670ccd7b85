"""Value tables in host memory over data-parallel ranks: rows travel between ranks, tables don't.

Every rank has whole tables (of its tensor-parallel rows), and updates an equal part of their rows. Which rows a step
reads is known before it, from its token ids:

    begin     each rank sends the rows' owners the ids that its micro-batches hold, and gets the rows as the last update
              left them
    reduce    gradients of those rows go back to the owners, who add them in the order of ranks

So a step moves what it touches. Rows that a rank hasn't asked for are old on it, until `BovOptimizer.finish_gather`
brings all of them to whoever reads whole tables: validation, checkpoints.

Shapes: N data- and context-parallel ranks, R rows of a table on this rank, K its columns, U rows that this rank's
micro-batches read, A rows of this rank's part that other ranks and itself have asked for, rank by rank. Messages hold
the same rows of all tables, side by side.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from bov_megatron.model import context_parallel
from bov_megatron.model.bank import host_tables
from bov_megatron.model.bank.table import ValueTable
from bov_megatron.model.decoder import BovModel
from bov_megatron.parallel import process_groups
from bov_megatron.parallel.redistribution import equal_parts


def trained_host_tables(chunks: Iterable[BovModel]) -> list[ValueTable]:
    """Tables in host memory of a rank's model chunks, without frozen ones."""
    tables = [module for chunk in chunks for module in chunk.modules() if isinstance(module, ValueTable)]
    return [table for table in tables if table.on_host and table.weight.requires_grad]


@contextlib.contextmanager
def hidden_from_megatron(tables: Sequence[ValueTable]) -> Iterator[None]:
    """Context in which to construct Megatron's DistributedDataParallel, so that it ignores host tables. They get a
    `main_grad` of zeros in host memory."""
    weights: list[Any] = [table.weight for table in tables]
    for weight in weights:
        weight.requires_grad_(False)
    yield
    for weight in weights:
        weight.requires_grad_(True)
        weight.main_grad = host_tables.empty(*weight.shape, dtype=torch.float32).zero_()


@dataclass(frozen=True)
class _Exchange:
    """Who reads which rows in a step; of all tables."""

    read_U: Tensor
    """Ascending, and so by owner."""
    asked_A: Tensor
    read_counts_N: list[int]
    """They add up to U."""
    asked_counts_N: list[int]
    """They add up to A."""
    group: dist.ProcessGroup

    def to_readers(self, rows_A: Tensor) -> Tensor:
        """`[A, …]` -> `[U, …]`; collective."""
        return self._all_to_all(rows_A, self.read_counts_N, self.asked_counts_N)

    def to_owners(self, rows_U: Tensor) -> Tensor:
        """`[U, …]` -> `[A, …]`; collective."""
        return self._all_to_all(rows_U, self.asked_counts_N, self.read_counts_N)

    def _all_to_all(self, sent: Tensor, received_N: list[int], sent_N: list[int]) -> Tensor:
        received = sent.new_empty(sum(received_N), *sent.shape[1:])
        dist.all_to_all_single(received, sent, received_N, sent_N, group=self.group)
        return received


class HostRows:
    """Rows of a rank's host tables, and their gradients.

    Args:
        tables: see `trained_host_tables`; of the same shape.
        group: data- and context-parallel ranks.
        sharded: whether each rank updates its part of a table, as `optim.sharding.split_rows` has it; else all ranks
            update all rows.
    """

    def __init__(self, tables: Sequence[ValueTable], group: dist.ProcessGroup, sharded: bool):
        self.tables, self.sharded = tables, sharded
        self._weights: list[Any] = [table.weight for table in tables]
        self.group = process_groups.twin(group, "gloo") if tables and group.size() > 1 else group
        self._with_gradient = torch.empty(0, dtype=torch.long)
        """Rows whose gradients are not zero."""

    @torch.no_grad()
    def begin(self, micro_batches: Sequence[Tensor]) -> None:
        """Set all gradients to zero, and get the rows of a step's micro-batches `[B, T+1]`; collective."""
        if not self.tables:
            return
        host_tables.wait_for_additions()
        self._clear()
        self._with_gradient = self._rows_of(micro_batches)
        if self.group.size() > 1:
            self._exchange = self._ask(self._with_gradient)
            if self.sharded:
                self._get_rows()

    @torch.no_grad()
    def reduce(self) -> None:
        """Average gradients over data-parallel ranks, with gloo; collective. A rank's `main_grad` is then that of the
        rows which it updates, and elsewhere zero."""
        if not self.tables:
            return
        host_tables.wait_for_additions()
        if self.group.size() == 1:
            return
        exchange, gradients = self._exchange, [weight.main_grad for weight in self._weights]
        received = exchange.to_owners(_of_all(gradients, exchange.read_U).div_(self.group.size()))
        for gradient, received_AK in zip(gradients, received.chunk(len(gradients), dim=1), strict=True):
            gradient.index_fill_(0, exchange.read_U, 0)
            gradient.index_add_(0, exchange.asked_A, received_AK)  # on a CPU, in this order
        self._with_gradient = exchange.asked_A.unique()
        if not self.sharded:
            self._bring_to_all()

    def _clear(self) -> None:
        for weight in self._weights:
            weight.main_grad.index_fill_(0, self._with_gradient, 0)

    def _get_rows(self) -> None:
        received = self._exchange.to_readers(_of_all(self._weights, self._exchange.asked_A))
        for weight, rows_UK in zip(self._weights, received.chunk(len(self._weights), dim=1), strict=True):
            weight[self._exchange.read_U] = rows_UK

    def _rows_of(self, micro_batches: Sequence[Tensor]) -> Tensor:
        """Rows that this rank's part of the micro-batches reads, of those it holds; ascending."""
        rows, first = self.tables[0].weight.size(0), self.tables[0].first_row
        present_R = torch.zeros(rows, dtype=torch.bool)
        for ids_BT in micro_batches:
            inputs = context_parallel.take(ids_BT[:, :-1], 1, parallel_state.get_context_parallel_group()).cpu() - first
            present_R[inputs[(inputs >= 0) & (inputs < rows)]] = True
        return present_R.nonzero().flatten()

    def _ask(self, read_U: Tensor) -> _Exchange:
        ranks = self.group.size()
        ends_N = torch.tensor([stop for _, stop in equal_parts(self.tables[0].weight.size(0), ranks)])
        read_N = torch.searchsorted(read_U, ends_N).diff(prepend=torch.zeros(1, dtype=torch.long))
        asked_N = torch.empty_like(read_N)
        dist.all_to_all_single(asked_N, read_N, group=self.group)
        read, asked = read_N.tolist(), asked_N.tolist()
        asked_A = read_U.new_empty(sum(asked))
        dist.all_to_all_single(asked_A, read_U, asked, read, group=self.group)
        return _Exchange(read_U, asked_A, read, asked, self.group)

    def _bring_to_all(self) -> None:
        """Sums of every owner's rows, on all ranks."""
        own, ranks = self._with_gradient, self.group.size()
        counts_N = own.new_empty(ranks)
        dist.all_gather_into_tensor(counts_N, torch.tensor([len(own)]), group=self.group)
        longest = int(counts_N.max())
        held = torch.arange(longest) < counts_N[:, None]
        rows = self._all_gather(own, longest)[held]
        gradients = [weight.main_grad for weight in self._weights]
        sums = self._all_gather(_of_all(gradients, own), longest)[held]
        for gradient, sums_of_table in zip(gradients, sums.chunk(len(gradients), dim=1), strict=True):
            gradient[rows] = sums_of_table
        self._with_gradient = rows

    def _all_gather(self, mine: Tensor, longest: int) -> Tensor:
        """`[N, longest, …]`, each rank's padded at the end."""
        padded = torch.cat([mine, mine.new_zeros(longest - len(mine), *mine.shape[1:])])
        gathered = padded.new_empty(self.group.size() * longest, *mine.shape[1:])
        dist.all_gather_into_tensor(gathered, padded, group=self.group)
        return gathered.unflatten(0, (self.group.size(), longest))


def _of_all(tensors: Sequence[Tensor], rows: Tensor) -> Tensor:
    """These rows of all tables side by side, for one message to a rank instead of one per table."""
    return torch.cat([tensor[rows] for tensor in tensors], dim=1)
