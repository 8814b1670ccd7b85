"""A vocabulary-parallel lookup off the critical path: every distinct row once, sent ahead of the layer that reads it.

All tensor-parallel ranks know all ids of a micro-batch, so each computes by itself who sends which rows to whom: one
all-to-all with unequal parts per table, and no message about sizes. Its way through a micro-batch:

    started            at the decoder's start owners send each rank its columns of their distinct rows, for all tables
    take               a layer waits for its table's rows and repeats them by token
    take, backward     sums the gradient over tokens by distinct row, sends the sums to the rows' owners without
                       waiting, and adds to its table what has arrived for the layer whose backward ran before
    started, backward  runs last and adds what is left

What travels from layer to layer is a *ticket*, a tensor of one number; a layer knows from its settings that it gets
one. A micro-batch's lookups are found by the storage of its ticket, which recomputation keeps (it detaches tensors, it
doesn't copy them), and never by what ran last. The autograd graph keeps them alive until its backward pass is over.

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

# Global because Megatron hands one tensor from layer to layer, into recomputation and across the graph, and no object
# beside it: what belongs to a ticket has to be found by the tensor alone.
_under_way: weakref.WeakValueDictionary[int, LookupsAhead] = weakref.WeakValueDictionary()
"""By the address of the ticket's storage, which each of them keeps from being used again."""
_unsettled: set[LookupsAhead] = set()
"""Those with gradients that no table has yet: empty between backward passes. It keeps them alive where the graph ends
without settling them, for `check_settled` to see."""


@contextlib.contextmanager
def started(ids_BS: Tensor, tables: Sequence[ValueTable], readers: int = 1) -> Iterator[Tensor]:
    """Start the lookups of one micro-batch in `tables`; yields the ticket that `take` needs for their values.

    Layers take values inside the block. Their recomputation and backward pass may come after it.

    Args:
        ids_BS: token ids; where they are on the CPU, nothing waits for a GPU.
        tables: of one shape and one process group. All ranks of the group call this alike.
        readers: layers that read each table, once each.

    Raises IndexError for ids outside the padded vocabulary.
    """
    check_settled()
    lookups = LookupsAhead(_Distinct.of(ids_BS, tables[0]), tables, readers)
    trained = [table.weight for table in tables if table.weight.requires_grad]
    root = torch.zeros(1, device=device(), requires_grad=True)  # frozen tables' layers are recomputed too
    # A table with a `main_grad` gets its gradient by hand, and stays out of the graph: a hook on its gradient would
    # run before that gradient is there.
    ticket = _Start.apply(lookups, root, *(weight for weight in trained if not hasattr(weight, "main_grad")))
    lookups.ticket_storage = ticket.untyped_storage()
    _under_way[ticket.data_ptr()] = lookups
    yield ticket


def take(ticket: Tensor, table: ValueTable | None) -> Tensor:
    """Values of every token for this rank's heads, `[S, B, k/D, D]` with head dimension D.

    Args:
        ticket: of the micro-batch, or a view or detached copy of it.
        table: None where there is only one, shared by layers.

    Raises RuntimeError where the ticket's lookups are over: a copied ticket, or one kept from another micro-batch.
    """
    lookups = _under_way.get(ticket.data_ptr())
    if lookups is None:
        raise RuntimeError(
            "no lookups are under way for this ticket: it was copied on its way through the layers, or kept from a "
            "micro-batch that is over; pass `context` on as it came"
        )
    lookup = lookups.of(table)
    values_SBk = _Take.apply(ticket, lookups, lookup)
    if torch.is_grad_enabled():  # else it may be taken again, recomputed
        lookup.read()
    return values_SBk.unflatten(-1, (-1, lookup.table.head_dim))


def look_up(ids_BS: Tensor, table: ValueTable) -> Tensor:
    """Values of every token, `[S, B, k/D, D]`, now, for a table of either kind (rows sent ahead or not)."""
    if not table.ahead:
        return table(ids_BS)
    with started(ids_BS, [table]) as ticket:
        return take(ticket, table)


def check_settled() -> None:
    """Raise RuntimeError if a backward pass ended before all gradients had reached their tables."""
    if _unsettled:
        raise RuntimeError(
            f"{len(_unsettled)} micro-batches' gradients of value tables were left on their way: the backward pass "
            "did not reach the decoder's start, so the tables' gradients are incomplete; layers must pass `context` on"
        )


@dataclass(frozen=True)
class _Distinct:
    """A micro-batch's distinct ids, in order of id and so of owner."""

    counts_T: list[int]
    """How many each rank owns; they add up to U."""
    own_blocks: Tensor
    """What this rank sends, `[T·u]`, for rank 0 first: indices into its part of a table, seen as rows of k columns."""
    width: int
    """k"""
    inverse_SB: Tensor
    """Each token's place among the distinct ids."""

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
            own_blocks=own_blocks.to(table.weight.device) if table.on_host else to_device(own_blocks),
            width=table.weight.size(1) // blocks,
            inverse_SB=to_device(place_V[ids_BS.t()]),
        )


class LookupsAhead:
    """One micro-batch's lookups on this rank, from the decoder's start to the end of its backward pass."""

    def __init__(self, ids: _Distinct, tables: Sequence[ValueTable], readers: int):
        self._lookups = {table: _Lookup(table, ids, readers) for table in tables}
        self._on_their_way: list[_Lookup] = []
        self.ticket_storage: torch.UntypedStorage | None = None

    def of(self, table: ValueTable | None) -> _Lookup:
        if table is None:
            (lookup,) = self._lookups.values()
            return lookup
        return self._lookups[table]

    def add_gradient(self, lookup: _Lookup, grad_SBk: Tensor) -> None:
        """One reader's gradient. The last reader's sets the sum on its way and settles what was sent before."""
        lookup.add_gradient(grad_SBk)
        _unsettled.add(self)
        if not lookup.readers_to_come:
            self._send(lookup)
            self._settle(all_but=1)

    def finish(self) -> list[Tensor | None]:
        """Settle everything; returns the gradients of trained tables that have no `main_grad`."""
        for lookup in self._lookups.values():
            if lookup.gradient_Uk is not None:  # a reader's backward pass was not needed
                self._send(lookup)
        self._settle()
        _unsettled.discard(self)
        trained = [lookup for lookup in self._lookups.values() if lookup.table.weight.requires_grad]
        for lookup in trained:
            if not lookup.settled and lookup.by_hand and not lookup.table.on_host:
                gradient_ready(lookup.table.weight)  # nothing to add: complete as it is
        return [lookup.dense_gradient for lookup in trained if not lookup.by_hand]

    def _send(self, lookup: _Lookup) -> None:
        lookup.send_gradient()
        self._on_their_way.append(lookup)

    def _settle(self, all_but: int = 0) -> None:
        while len(self._on_their_way) > all_but:
            self._on_their_way.pop(0).settle()


class _Lookup:
    """One table's rows on their way to this rank, then their gradients on the way to the owners."""

    def __init__(self, table: ValueTable, ids: _Distinct, readers: int):
        self.table, self.ids = table, ids
        self.reads_to_come = self.readers_to_come = readers
        self.gradient_Uk: Any = None
        self.dense_gradient: Tensor | None = None
        self.settled = False
        self.by_hand = hasattr(table.weight, "main_grad")
        self.rows_Uk: Tensor | None = None
        await_weight(table.weight)
        blocks = table.weight.detach().view(-1, ids.width)
        if table.on_host:
            with host_tables.BesideCompute(after_compute=False) as self.copy:
                self._send_rows(host_tables.rows_on_device(blocks, ids.own_blocks))
        else:
            self._send_rows(F.embedding(ids.own_blocks, blocks))

    @property
    def _own_counts_T(self) -> list[int]:
        """Every rank is sent as many rows as this rank owns."""
        ranks = len(self.ids.counts_T)
        return [self.ids.own_blocks.numel() // ranks] * ranks

    def _send_rows(self, sent: Tensor) -> None:
        self.rows_Uk = self._exchange(sent, self.ids.counts_T, self._own_counts_T)

    def _exchange(self, sent: Tensor, received_T: list[int], sent_T: list[int]) -> Tensor:
        """What the ranks send this one, once `_wait` has returned."""
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
        self.work = self.message = None

    def values_SBk(self) -> Tensor:
        if self.rows_Uk is None:
            raise RuntimeError("a layer took its values twice, or a table has more readers than `started` was told")
        self._wait()
        if self.table.on_host:
            self.copy.wait(self.rows_Uk)
        return F.embedding(self.ids.inverse_SB, self.rows_Uk)

    def read(self) -> None:
        """One reader has what it needs for good; after the last, the rows go."""
        self.reads_to_come -= 1
        if not self.reads_to_come:
            self.rows_Uk = None

    def add_gradient(self, grad_SBk: Tensor) -> None:
        """Sum over tokens in fp32."""
        if not self.readers_to_come:
            raise RuntimeError("a second backward pass through the same lookup; run the forward pass again")
        self.readers_to_come -= 1
        flat, index = grad_SBk.flatten(0, 1).float(), self.ids.inverse_SB.flatten()
        # The embedding's own backward: unlike index_add_, it adds in a fixed order on a GPU too.
        summed_Uk = torch.ops.aten.embedding_dense_backward(flat, index, sum(self.ids.counts_T), -1, False)
        self.gradient_Uk = summed_Uk if self.gradient_Uk is None else self.gradient_Uk.add_(summed_Uk)

    def send_gradient(self) -> None:
        """Rounded to the table's dtype, once per distinct row, as a weight's gradient is per micro-batch."""
        sent = self.gradient_Uk.to(self.table.weight.dtype)
        self.gradient_Uk = None
        self.received: Any = self._exchange(sent, self._own_counts_T, self.ids.counts_T)

    def settle(self) -> None:
        """Add the gradients of this rank's rows, once all ranks' have come."""
        self._wait()
        weight: Any = self.table.weight
        target = weight.main_grad if self.by_hand else torch.zeros_like(weight)
        blocks, received = target.view(-1, self.ids.width), self.received
        self.received, self.settled = None, True
        if self.table.on_host and self.by_hand:
            host_tables.add_later(blocks, self.ids.own_blocks, received)
            return
        blocks.index_add_(0, self.ids.own_blocks, received.to(blocks))
        if self.by_hand:
            gradient_ready(weight)
        else:
            self.dense_gradient = target


class _Start(torch.autograd.Function):
    """Makes the ticket. Its backward pass comes after that of every layer that took values with it."""

    @staticmethod
    def forward(ctx, lookups, root, *weights):
        ctx.lookups = lookups
        return torch.zeros_like(root)

    @staticmethod
    def backward(ctx, grad):
        return None, None, *ctx.lookups.finish()


class _Take(torch.autograd.Function):
    """Values by token. The gradient goes to the lookup; the ticket's, zero, makes `_Start` wait for it."""

    @staticmethod
    def forward(ctx, ticket, lookups, lookup):
        ctx.lookups, ctx.lookup = lookups, lookup
        return lookup.values_SBk()

    @staticmethod
    def backward(ctx, grad_SBk):
        if ctx.lookup.table.weight.requires_grad:
            ctx.lookups.add_gradient(ctx.lookup, grad_SBk)
        return grad_SBk.new_zeros(1, dtype=torch.float32), None, None
