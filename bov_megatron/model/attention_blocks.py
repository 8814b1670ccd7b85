"""Causal attention of some of a sequence's queries, on a CPU: blocks of keys, merged by their log-sum-exp.

A block is one call of torch's flash attention for CPUs, which also returns the logarithm of the sum of exp(score) for
each query. With it, results over different keys combine exactly (arXiv 2205.14135, "tiling"), so that only blocks which
a window's edge crosses need a mask, of the size of such a block.

Shapes: S queries, T keys, B batch, N query heads, G query groups, D head dimension.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST_BLOCK = 1024
"""Queries in a block where a window hides keys. A mask at the window's edge has the square of it; that of
`core_attention.windowed_sdpa` has it times itself and the window."""


class Block(NamedTuple):
    """Queries and keys at positions `[start, stop)` of the sequence."""

    queries: tuple[int, int]
    keys: tuple[int, int]
    kind: str
    """`diagonal`: the same positions twice, seen causally; `full`: all queries see all keys; `edge`: the window ends
    within the keys, and the last query sees the last one."""


def blocks(first: int, stop: int, window: int, largest: int = LARGEST_BLOCK) -> Iterator[Block]:
    """What queries `first` to `stop` see, each pair of query and key in one block; all keys start at position 0."""
    size = stop - first if window >= stop - 1 else max(min(window, largest), 1)
    for start in range(first, stop, size):
        queries = start, min(start + size, stop)
        edge = max(start - window, 0)
        full = min(queries[1] - window, start) if window < queries[1] - 1 else 0
        yield Block(queries, queries, "diagonal")
        if full < start:
            yield Block(queries, (full, start), "full")
        if edge < full:
            yield Block(queries, (edge, full), "edge")


def attend_in_blocks(query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int) -> Tensor:
    """Causal attention `[B, N, S, D]` of the queries at `first_query` and after; keys start at position 0.

    A query at position i sees key j where `0 <= i - j <= window`. Needs memory for its inputs and results, and for a
    mask of at most LARGEST_BLOCK² elements.
    """
    return _MergedBlocks.apply(query_BNSD, key_BGTD, value_BGTD, window, first_query)


class _MergedBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, window, first):
        logsumexp = query.new_full(query.shape[:-1], -torch.inf, dtype=torch.promote_types(query.dtype, torch.float32))
        mixed = torch.zeros_like(query, dtype=logsumexp.dtype)
        for block in blocks(first, first + query.size(2), window):
            part, part_logsumexp = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _at(query, block.queries, first), _at(key, block.keys), _at(value, block.keys), **_mask(block, query)
            )
            whole, whole_logsumexp = _at(mixed, block.queries, first), _at(logsumexp, block.queries, first)
            whole.lerp_(part.to(whole.dtype), (part_logsumexp - whole_logsumexp).sigmoid_().unsqueeze(-1))
            torch.logaddexp(whole_logsumexp, part_logsumexp, out=whole_logsumexp)
        mixed = mixed.to(query.dtype)
        ctx.save_for_backward(query, key, value, mixed, logsumexp)
        ctx.window, ctx.first = window, first
        return mixed

    @staticmethod
    def backward(ctx, grad):
        query, key, value, mixed, logsumexp = ctx.saved_tensors
        grad, first = grad.contiguous(), ctx.first
        gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block in blocks(first, first + query.size(2), ctx.window):
            # From result and log-sum-exp over all keys follow the block's true probabilities, and so its gradients.
            grad_q, out, normalisation, q = (_at(x, block.queries, first) for x in (grad, mixed, logsumexp, query))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grad_q, q, _at(key, block.keys), _at(value, block.keys), out, normalisation, 0.0, **_mask(block, query)
            )
            _at(gradients[0], block.queries, first).add_(parts[0])
            _at(gradients[1], block.keys).add_(parts[1])
            _at(gradients[2], block.keys).add_(parts[2])
        return *gradients, None, None


def _at(x: Tensor, positions: tuple[int, int], first: int = 0) -> Tensor:
    """A view of some positions of `[B, heads, positions from first, …]`."""
    return x[:, :, positions[0] - first : positions[1] - first]


def _mask(block: Block, query: Tensor) -> dict:
    """A block's arguments of torch's flash attention."""
    if block.kind != "edge":
        return {"is_causal": block.kind == "diagonal"}
    rows, columns = block.queries[1] - block.queries[0], block.keys[1] - block.keys[0]
    return {"is_causal": False, "attn_mask": _edge(rows, columns, query.dtype, query.device)}


@functools.lru_cache(maxsize=8)
def _edge(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask `[rows, columns]`: 0 where a query sees a key, else -inf. The last query sees only the last key, each query
    before it one key more."""
    hidden = torch.ones(rows, columns, dtype=torch.bool, device=device).tril(columns - rows - 1)
    return torch.zeros(rows, columns, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
