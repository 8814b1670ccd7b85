"""A vocabulary-parallel lookup off the critical path: every distinct row once, sent ahead of the layer that reads it.

All tensor-parallel ranks have all ids of a micro-batch, so each computes which rows go where. A table needs one
all-to-all with unequal parts, and no exchange of sizes. The steps of a micro-batch:

    started            at the decoder's start, owners send each rank its columns of their distinct rows, for all tables
    take               a layer waits for its table's rows and expands them to tokens
    take, backward     sums the gradient over tokens by distinct row, starts sending the sums to the rows' owners, and
                       adds the gradients received for the previous table
    started, backward  runs last and adds the gradients that remain

Layers pass on a *ticket*, a tensor with one element. Its storage identifies the micro-batch's lookups, also during
recomputation, which detaches tensors but does not copy them. The autograd graph keeps the lookups alive until its
backward pass is over.

Shapes: B batch, S sequence, T tensor-parallel ranks, V padded vocabulary, R rows of a table on a rank, K = kv_dim, k
this rank's columns (K/T, or one group's where ranks share groups), U distinct ids of the micro-batch, u those whose
rows this rank owns.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from bov_megatron.model.bank import host_tables
from bov_megatron.model.bank.table import ValueTable
from bov_megatron.parallel.device import device, to_device
from bov_megatron.parallel.parameter import await_weight, gradient_ready

# Global because Megatron passes only a tensor from layer to layer and into recomputation.
_under_way: weakref.WeakValueDictionary[int, LookupsAhead] = weakref.WeakValueDictionary()
"""By the address of the ticket's storage, which the lookups keep alive so that it is not reused."""
_unsettled: set[LookupsAhead] = set()
"""Lookups with gradients that are not in their tables yet; empty between backward passes. Keeps them alive for
`check_settled` if the graph is freed before they are settled."""


@contextlib.contextmanager
def started(ids_BS: Tensor, tables: Sequence[ValueTable], readers: int = 1) -> Iterator[Tensor]:
    """Start the lookups of one micro-batch in `tables`; yields the ticket for `take`. Collective.

    Layers must call `take` inside the block; recomputation and backward pass may come after it.

    Args:
        ids_BS: token ids; on the CPU, so that the host does not wait for the GPU.
        tables: of the same shape and process group.
        readers: number of layers that read each table, once each.

    Raises IndexError for ids outside the padded vocabulary.
    """
    check_settled()
    lookups = LookupsAhead(_Distinct.of(ids_BS, tables[0]), tables, readers)
    trained = [table.weight for table in tables if table.weight.requires_grad]
    root = torch.zeros(1, device=device(), requires_grad=True)  # layers of frozen tables are recomputed too
    # A table with a `main_grad` gets its gradient without autograd and is not in the graph: hooks on its gradient would
    # run too early.
    ticket = _Start.apply(lookups, root, *(weight for weight in trained if not hasattr(weight, "main_grad")))
    lookups.ticket_storage = ticket.untyped_storage()
    _under_way[ticket.data_ptr()] = lookups
    yield ticket


def take(ticket: Tensor, table: ValueTable | None) -> Tensor:
    """Values of every token for this rank's heads, `[S, B, k/D, D]` with head dimension D.

    Args:
        ticket: from `started`, or a view of it; detached or not.
        table: None for a single table that layers share.

    Raises RuntimeError for a copy of a ticket, or one from a micro-batch that is over.
    """
    lookups = _under_way.get(ticket.data_ptr())
    if lookups is None:
        raise RuntimeError(
            "no lookups are under way for this ticket: it was copied between layers, or is from a micro-batch that is "
            "over; layers must pass `context` on unchanged"
        )
    lookup = lookups.of(table)
    values_SBk = _Take.apply(ticket, lookups, lookup)
    if torch.is_grad_enabled():  # without gradients, recomputation may take the values again
        lookup.read()
    return values_SBk.unflatten(-1, (-1, lookup.table.head_dim))


def look_up(ids_BS: Tensor, table: ValueTable) -> Tensor:
    """Values of every token, `[S, B, k/D, D]`, of a single table, whether or not its rows are sent ahead."""
    if not table.ahead:
        return table(ids_BS)
    with started(ids_BS, [table]) as ticket:
        return take(ticket, table)


def check_settled() -> None:
    """Raise RuntimeError if a backward pass ended before all gradients were added to their tables."""
    if _unsettled:
        raise RuntimeError(
            f"value-table gradients of {len(_unsettled)} micro-batches were not added to their tables: the backward "
            "pass did not reach the decoder's start; layers must pass `context` on"
        )


@dataclass(frozen=True)
class _Distinct:
    """A micro-batch's distinct ids, ascending, and so in order of the ranks that own them."""

    counts_T: list[int]
    """Distinct ids that each rank owns; they add up to U."""
    own_counts_T: list[int]
    """u, T times: every rank gets all of this rank's distinct rows."""
    own_blocks: Tensor
    """What this rank sends, `[T·u]`, rank 0's first: indices into its part of a table, viewed as rows of k columns."""
    width: int
    """k"""
    inverse_SB: Tensor
    """Each token's index among the distinct ids."""

    @staticmethod
    def of(ids_BS: Tensor, table: ValueTable) -> _Distinct:
        ranks, rank, rows = table.tp_group.size(), table.tp_group.rank(), table.weight.size(0)
        if ids_BS.min() < 0 or ids_BS.max() >= ranks * rows:
            raise IndexError(
                f"token ids from {ids_BS.min()} to {ids_BS.max()} reach outside the padded vocabulary of "
                f"{ranks * rows}; the data belongs to another tokenizer"
            )
        present_V = torch.zeros(ranks * rows, dtype=torch.bool, device=ids_BS.device)
        present_V[ids_BS.flatten()] = True
        place_V = present_V.cumsum(0) - 1
        present_TR = present_V.view(ranks, rows)
        blocks = ranks // table.ranks_per_group
        block_T1 = (torch.arange(ranks, device=ids_BS.device) // table.ranks_per_group).unsqueeze(1)
        own_blocks = (present_TR[rank].nonzero().flatten() * blocks + block_T1).flatten()
        return _Distinct(
            counts_T=present_TR.sum(1).tolist(),
            own_counts_T=[own_blocks.numel() // ranks] * ranks,
            own_blocks=own_blocks.to(table.weight.device) if table.on_host else to_device(own_blocks),
            width=table.weight.size(1) // blocks,
            inverse_SB=to_device(place_V[ids_BS.t()]),
        )


class LookupsAhead:
    """A micro-batch's lookups on this rank, from the decoder's start to the end of the backward pass."""

    def __init__(self, ids: _Distinct, tables: Sequence[ValueTable], readers: int):
        self._lookups = {table: _Lookup(table, ids, readers) for table in tables}
        self._sent: _Lookup | None = None
        """The last one whose gradient was sent, until it is settled."""
        self.ticket_storage: torch.UntypedStorage | None = None

    def of(self, table: ValueTable | None) -> _Lookup:
        if table is None:
            (lookup,) = self._lookups.values()
            return lookup
        return self._lookups[table]

    def add_gradient(self, lookup: _Lookup, grad_SBk: Tensor) -> None:
        """Add one reader's gradient; the last reader's starts sending the sum."""
        lookup.add_gradient(grad_SBk)
        _unsettled.add(self)
        if not lookup.readers_to_come:
            self._send(lookup)

    def finish(self) -> list[Tensor | None]:
        """Settle all lookups; returns the gradients of trained tables without a `main_grad`."""
        for lookup in self._lookups.values():
            if lookup.gradient_Uk is not None:  # autograd skipped the backward pass of a reader
                self._send(lookup)
        self._send(None)
        _unsettled.discard(self)
        trained = [lookup for lookup in self._lookups.values() if lookup.table.weight.requires_grad]
        for lookup in trained:
            if not lookup.settled and lookup.has_main_grad and not lookup.table.on_host:
                gradient_ready(lookup.table.weight)  # no gradient to add
        return [lookup.dense_gradient for lookup in trained if not lookup.has_main_grad]

    def _send(self, lookup: _Lookup | None) -> None:
        """Start sending a gradient, then settle the one sent before, which has had time to arrive."""
        if lookup is not None:
            lookup.send_gradient()
        if self._sent is not None:
            self._sent.settle()
        self._sent = lookup


class _Lookup:
    """Rows of one table sent to this rank, and then their gradients, sent back to the rows' owners."""

    def __init__(self, table: ValueTable, ids: _Distinct, readers: int):
        self.table, self.ids = table, ids
        self.reads_to_come = self.readers_to_come = readers
        self.gradient_Uk: Any = None
        self.dense_gradient: Tensor | None = None
        self.settled = False
        self.has_main_grad = hasattr(table.weight, "main_grad")
        self.rows_Uk: Tensor | None
        await_weight(table.weight)
        blocks = table.weight.detach().view(-1, ids.width)
        if table.on_host:
            with host_tables.CopyStream(after_compute=False) as self.copy:
                rows = host_tables.rows_on_device(blocks, ids.own_blocks)
                self.rows_Uk = self._exchange(rows, ids.counts_T, ids.own_counts_T)
        else:
            self.rows_Uk = self._exchange(F.embedding(ids.own_blocks, blocks), ids.counts_T, ids.own_counts_T)

    def _exchange(self, sent: Tensor, received_T: list[int], sent_T: list[int]) -> Tensor:
        """All-to-all; the result is valid once `_wait` has returned."""
        if len(sent_T) == 1:
            self.work = self.message = None
            return sent
        received = sent.new_empty(sum(received_T), self.ids.width)
        self.message = sent  # must live until it has been sent
        self.work = dist.all_to_all_single(
            received, sent, received_T, sent_T, group=self.table.lookup_group, async_op=True
        )
        return received

    def _wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            if self.message is not None and self.message.is_cuda:
                # A host table's rows are the copy stream's memory, which may reuse it once this stream is here: behind
                # the collective that reads it.
                self.message.record_stream(torch.cuda.current_stream())
        self.work = self.message = None

    def values_SBk(self) -> Tensor:
        if self.rows_Uk is None:
            raise RuntimeError("a layer took its values twice, or more layers read a table than `readers` of `started`")
        self._wait()
        if self.table.on_host:
            self.copy.wait(self.rows_Uk)
        return F.embedding(self.ids.inverse_SB, self.rows_Uk)

    def read(self) -> None:
        """Count one read; the last frees the rows."""
        self.reads_to_come -= 1
        if not self.reads_to_come:
            self.rows_Uk = None

    def add_gradient(self, grad_SBk: Tensor) -> None:
        """Add a reader's gradient, summed over tokens by distinct row in fp32."""
        if not self.readers_to_come:
            raise RuntimeError("a second backward pass through the same lookup; run the forward pass again")
        self.readers_to_come -= 1
        flat, index = grad_SBk.flatten(0, 1).float(), self.ids.inverse_SB.flatten()
        # Unlike index_add_, the embedding's backward pass is deterministic on a GPU too.
        summed_Uk = torch.ops.aten.embedding_dense_backward(flat, index, sum(self.ids.counts_T), -1, False)
        self.gradient_Uk = summed_Uk if self.gradient_Uk is None else self.gradient_Uk.add_(summed_Uk)

    def send_gradient(self) -> None:
        sent = self.gradient_Uk.to(self.table.weight.dtype)  # as any weight's gradient of a micro-batch
        self.gradient_Uk = None
        self.received: Any = self._exchange(sent, self.ids.own_counts_T, self.ids.counts_T)

    def settle(self) -> None:
        """Wait for the gradients of this rank's rows from all ranks, and add them to the table's."""
        self._wait()
        weight: Any = self.table.weight
        target = weight.main_grad if self.has_main_grad else torch.zeros_like(weight)
        blocks, received = target.view(-1, self.ids.width), self.received
        self.received, self.settled = None, True
        if self.table.on_host and self.has_main_grad:
            host_tables.add_later(blocks, self.ids.own_blocks, received)
            return
        blocks.index_add_(0, self.ids.own_blocks, received.to(blocks))
        if self.has_main_grad:
            gradient_ready(weight)
        else:
            self.dense_gradient = target


class _Start(torch.autograd.Function):
    """Creates the ticket. Its backward pass runs after that of every layer that took values with it."""

    @staticmethod
    def forward(ctx, lookups, root, *weights):
        ctx.lookups = lookups
        return torch.zeros_like(root)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *ctx.lookups.finish()


class _Take(torch.autograd.Function):
    """Values by token. Their gradient goes to the lookup; a zero gradient of the ticket makes `_Start` wait for it."""

    @staticmethod
    def forward(ctx, ticket, lookups, lookup):
        ctx.lookups, ctx.lookup = lookups, lookup
        return lookup.values_SBk()

    @staticmethod
    def backward(ctx, grad_SBk):
        if ctx.lookup.table.weight.requires_grad:
            ctx.lookups.add_gradient(ctx.lookup, grad_SBk)
        return grad_SBk.new_zeros(1, dtype=torch.float32), None, None
