"""The Bank of Values: a table of value rows, looked up by token id, split over tensor-parallel ranks.

Shapes: B batch, S sequence, V vocabulary (padded), G query groups, D head dimension, K = G·D (`kv_dim`),
T tensor-parallel ranks, R rows on this rank. A lookup returns this rank's groups: `[S, B, G/T, D]`, or one group where
there are fewer than ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import (
    reduce_scatter_last_dim_to_tensor_parallel_region,
)
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint
from torch import Tensor

from bov_megatron.model.bank import host_tables
from bov_megatron.parallel import process_groups
from bov_megatron.parallel.device import device
from bov_megatron.parallel.parameter import gradient_ready
from bov_megatron.recipe import ModelConfig


class ValueTable(torch.nn.Module):
    """Rows of values by token id (arXiv 2606.02780). Mirrors Megatron's VocabParallelEmbedding.

    Split by `vocab`, this rank owns rows `[rank·V/T, (rank+1)·V/T)`, and a lookup communicates. Split by `head`, it
    owns its groups' columns of all rows, and a lookup does not communicate. With fewer groups than ranks, consecutive
    ranks share a group.

    Args:
        model: the recipe's model section.
        vocab_size: padded vocabulary V; a multiple of the tensor-parallel size.
        tp_group: the tensor-parallel process group.
    """

    def __init__(self, model: ModelConfig, vocab_size: int, dtype: torch.dtype, tp_group: dist.ProcessGroup):
        super().__init__()
        value = model.value
        self.tp_group, self.partition = tp_group, value.table_partition
        self.head_dim, self.ranks_per_group = model.kv_channels, max(tp_group.size() // model.kv_heads, 1)
        size, rank = tp_group.size(), tp_group.rank()
        kv_dim, by_rows = model.kv_dim, self.partition == "vocab"
        rows, columns = (vocab_size // size, kv_dim) if by_rows else (vocab_size, kv_dim // size)
        self.first_row = rank * rows if by_rows else 0
        self.on_host = value.table_memory == "host"
        if self.on_host:
            weight = host_tables.empty(rows, columns, dtype=dtype)
        else:
            weight = torch.empty(rows, columns, dtype=dtype, device=device())
        self.weight = torch.nn.Parameter(weight)
        self.partition_dim = 0 if by_rows else 1
        self.ahead = value.rows_sent_ahead(size)
        """Whether rows are sent ahead of the layer (see lookup_ahead.py)."""
        if self.ahead and size > 1:
            self.lookup_group = process_groups.twin(tp_group)

    def forward(self, ids_BS: Tensor) -> Tensor:
        """Values of every token for this rank's heads, `[S, B, G/T, D]`; RuntimeError where rows are sent ahead."""
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
        """Sum the ranks' partial rows (zeros for other ranks' ids) and keep this rank's columns."""
        # The backward pass gathers. A slice after an all-reduce would give each rank its own columns' gradient only.
        return reduce_scatter_last_dim_to_tensor_parallel_region(partial_SBK, group=self.tp_group)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
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


def lookup_rows(table_RK: Tensor, rows: Tensor, own: Tensor | None) -> Tensor:
    """`table[rows]`, zero where `own` is False; `[*rows.shape, K]`.

    Where the table has a `main_grad` (Megatron's data-parallel wrapper), the gradient is added to its touched rows in
    place, because a dense gradient of the whole table per micro-batch would cost more than the lookup saves.
    """
    if hasattr(table_RK, "main_grad") and torch.is_grad_enabled():
        return _AccumulatingLookup.apply(table_RK, rows, own)
    values = F.embedding(rows, table_RK)
    return values if own is None else values * own.unsqueeze(-1)


class _AccumulatingLookup(torch.autograd.Function):
    """Embedding lookup whose backward pass adds to `table.main_grad`."""

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
        index, grad = rows.flatten(), grad.reshape(-1, main_grad.size(1)).to(main_grad.dtype)
        main_grad.index_add_(0, index, grad)  # on a GPU in a fixed order with `train.deterministic`
        gradient_ready(table)
        return None, None, None
