"""The Bank of Values: a table of value rows, looked up by token id, split over tensor-parallel ranks.

Shapes: B batch, S sequence, V vocabulary (padded), G query groups, D head dimension, K = G·D (`kv_dim`),
T tensor-parallel ranks. A lookup returns this rank's groups: `[S, B, G/T, D]` (of fewer groups than ranks, one).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_last_dim_to_tensor_parallel_region,
    scatter_to_tensor_model_parallel_region,
)
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from bov_megatron.model.bank import host_tables
from bov_megatron.parallel import process_groups
from bov_megatron.parallel.parameter import gradient_ready


class ValueTable(torch.nn.Module):
    """Rows of values by token id (arXiv 2606.02780). Mirrors Megatron's VocabParallelEmbedding.

    Args:
        vocab_size: padded vocabulary V; a multiple of the tensor-parallel size.
        num_groups: query groups G of the whole layer; a multiple of the tensor-parallel size, or a divisor of it
            (with `partition="vocab"`), and then consecutive ranks share a group.
        head_dim: D.
        partition: `vocab`: this rank owns rows `[rank·V/T, (rank+1)·V/T)` and a lookup communicates;
            `head`: it owns all rows of its own groups' columns and a lookup needs no traffic.
        lookup: how a vocabulary-parallel lookup communicates: `distinct` (see lookup_ahead.py), `reduce_scatter`,
            `all_reduce`, `all_to_all`.
        dtype: of the table.
        tp_group: the tensor-parallel process group.
        on_host: keep the table in host memory (see host_tables.py); with `partition="vocab"`, `lookup="distinct"`.
    """

    def __init__(
        self,
        vocab_size: int,
        num_groups: int,
        head_dim: int,
        partition: str,
        lookup: str,
        dtype,
        tp_group,
        on_host: bool = False,
    ):
        super().__init__()
        self.tp_group, self.partition, self.lookup = tp_group, partition, lookup
        self.head_dim, self.ranks_per_group = head_dim, max(tp_group.size() // num_groups, 1)
        size, rank = tp_group.size(), tp_group.rank()
        kv_dim = num_groups * head_dim
        rows, columns = (vocab_size // size, kv_dim) if partition == "vocab" else (vocab_size, kv_dim // size)
        self.first_row = rank * rows if partition == "vocab" else 0
        self.on_host = on_host
        if on_host:
            weight = host_tables.empty(rows, columns, dtype=dtype)
        else:
            weight = torch.empty(rows, columns, dtype=dtype, device=torch.cuda.current_device())
        self.weight = torch.nn.Parameter(weight)
        self.partition_dim = 0 if partition == "vocab" else 1
        self.ahead = rows_sent_ahead(partition, lookup, on_host, size)
        """Whether rows are sent ahead of the layer, to be taken with a ticket (see lookup_ahead.py)."""
        if self.ahead and size > 1:
            self.lookup_group = process_groups.twin(tp_group)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Values of every token for this rank's heads, `[S, B, G/T, D]`; not where rows are sent ahead."""
        if self.ahead:
            raise RuntimeError("this table's rows are sent ahead of its layer: use lookup_ahead.look_up")
        ids_SB = ids_BS.t().contiguous()
        if self.partition == "head" or self.tp_group.size() == 1:
            values_SBK = lookup_rows(self.weight, ids_SB, None)
        else:
            local_SB = ids_SB - self.first_row
            own_SB = (local_SB >= 0) & (local_SB < self.weight.size(0))
            partial_SBK = lookup_rows(self.weight, local_SB.clamp(0, self.weight.size(0) - 1), own_SB)
            values_SBK = self._combine(partial_SBK)
        return values_SBK.unflatten(-1, (-1, self.head_dim))

    def _combine(self, partial_SBK: Tensor) -> Tensor:
        """Sum the ranks' partial rows (zeros for foreign ids) and keep this rank's columns.

        Every variant is a sum followed by a scatter whose backward gathers: a plain slice after an all-reduce
        would leave each rank with its own columns' gradient only.
        """
        if self.ranks_per_group > 1:
            return self._combine_shared(partial_SBK)
        if self.lookup == "reduce_scatter":
            return reduce_scatter_last_dim_to_tensor_parallel_region(partial_SBK, group=self.tp_group)
        if self.lookup == "all_to_all":
            return _SumByAllToAll.apply(partial_SBK, self.tp_group)
        summed_SBK = reduce_from_tensor_model_parallel_region(partial_SBK.contiguous(), group=self.tp_group)
        return scatter_to_tensor_model_parallel_region(summed_SBK, group=self.tp_group)

    def _combine_shared(self, partial_SBK: Tensor) -> Tensor:
        """Sum the ranks' partial rows and keep the one group that this rank shares with others, whatever `lookup`: a
        rank's equal share of the columns would be less than a group. Backward sums over the ranks again."""
        summed_SBK = reduce_from_tensor_model_parallel_region(partial_SBK.contiguous(), group=self.tp_group)
        summed_SBK = copy_to_tensor_model_parallel_region(summed_SBK, group=self.tp_group)
        group = self.tp_group.rank() // self.ranks_per_group
        return summed_SBK.narrow(-1, group * self.head_dim, self.head_dim).contiguous()

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        # The padded vocabulary, and so the global shape, differs between tensor-parallel sizes.
        key = f"{prefix}weight"
        return {
            key: make_tp_sharded_tensor_for_checkpoint(
                self.weight,
                key,
                tp_axis=self.partition_dim,
                allow_shape_mismatch=True,
                prepend_offsets=sharded_offsets,
                tp_group=self.tp_group,
                dp_cp_group=metadata["dp_cp_group"],
            )
        }


def rows_sent_ahead(partition: str, lookup: str, on_host: bool, ranks: int) -> bool:
    """Whether a table's distinct rows are sent ahead of its layer, over that many tensor-parallel ranks."""
    return on_host or (lookup == "distinct" and partition == "vocab" and ranks > 1)


def lookup_rows(table_RK: Tensor, rows: Tensor, own: Tensor | None) -> Tensor:
    """`table[rows]`, zero where `own` is False; `[*rows.shape, K]`.

    Where the table has a `main_grad` (Megatron's data-parallel wrapper), the gradient is added to the touched
    rows in place: a dense gradient of the whole table per micro-batch would cost more than the lookup saves.
    """
    if hasattr(table_RK, "main_grad") and torch.is_grad_enabled():
        return _AccumulatingLookup.apply(table_RK, rows, own)
    values = F.embedding(rows, table_RK)
    return values if own is None else values * own.unsqueeze(-1)


class _AccumulatingLookup(torch.autograd.Function):
    """Embedding lookup whose backward adds straight into `table.main_grad`."""

    @staticmethod
    def forward(ctx, table_RK, rows, own):
        ctx.table = table_RK
        ctx.save_for_backward(rows, own)
        values = F.embedding(rows, table_RK)
        return values if own is None else values.mul_(own.unsqueeze(-1))

    @staticmethod
    def backward(ctx, grad):
        rows, own = ctx.saved_tensors
        table = ctx.table
        if own is not None:
            grad = grad * own.unsqueeze(-1)
        main_grad = table.main_grad
        index = rows.reshape(-1, 1).expand(-1, main_grad.size(1))
        # Eight times as fast as index_add_ on a CPU.
        main_grad.scatter_add_(0, index, grad.reshape(-1, main_grad.size(1)).to(main_grad.dtype))
        gradient_ready(table)
        return None, None, None


class _SumByAllToAll(torch.autograd.Function):
    """Reduce-scatter of the last dimension as one all-to-all and a local sum (half the time on gloo)."""

    @staticmethod
    def forward(ctx, partial_SBK, group):
        ctx.group = group
        parts_TSBk = torch.stack(partial_SBK.chunk(group.size(), dim=-1))
        received_TSBk = torch.empty_like(parts_TSBk)
        dist.all_to_all_single(received_TSBk, parts_TSBk, group=group)
        return received_TSBk.sum(0)

    @staticmethod
    def backward(ctx, grad_SBk):
        parts = grad_SBk.new_empty(ctx.group.size(), *grad_SBk.shape)
        dist.all_gather_into_tensor(parts.flatten(0, 1), grad_SBk.contiguous(), group=ctx.group)
        return torch.cat(tuple(parts), dim=-1), None
