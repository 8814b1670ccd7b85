"""Core attention with windows, by scaled-dot-product attention instead of Megatron's matmul-softmax-matmul.

A query at position i sees key j where `0 <= i - j <= window`.

Shapes: S sequence (under context parallelism this rank's part of it), B batch, N this rank's query heads, G its query
groups, D head dimension.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_megatron.model.context_parallel import gather_sequence, stretches
from bov_megatron.parallel.device import has_gpu


class SdpaCoreAttention(torch.nn.Module):
    """torch's scaled_dot_product_attention, which is flash attention where torch has it for the device.

    Layers without a window use the causal kernel. Layers with a window use `windowed_sdpa`, or FlexAttention on a GPU.
    Under context parallelism each rank gathers all keys and values, and uses `windowed_sdpa` for each of its two chunks
    of queries.
    """

    def __init__(
        self,
        config,
        layer_number,
        attn_mask_type,
        attention_type,
        window: int,
        pg_collection,
        kernel: str = "auto",
        **megatron_options,
    ):
        super().__init__()
        self.window = window
        self.cp_group = pg_collection.cp
        self.flex = kernel == "flex" or (kernel == "auto" and has_gpu())

    def forward(
        self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor, attention_mask=None, **megatron_options
    ) -> Tensor:
        """Attention output `[S, B, N·D]`. `attention_mask` is ignored: the mask follows from the window."""
        if self.cp_group.size() > 1:
            return self._over_ranks(query_SBND, key_SBGD, value_SBGD)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        length = query.size(2)
        grouped = query.size(1) != key.size(1)
        if self.window >= length - 1:
            mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
        elif self.flex:
            mixed = _flex_attention()(
                query, key, value, block_mask=_flex_mask(self.window, length, query.device), enable_gqa=grouped
            )
        else:
            mixed = windowed_sdpa(query, key, value, self.window)
        return mixed.permute(2, 0, 1, 3).flatten(2)

    def _over_ranks(self, query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
        """`forward` under context parallelism; queries, keys and values are this rank's part of the sequence."""
        group = self.cp_group
        both = gather_sequence(torch.stack((key_SBGD, value_SBGD), dim=1), group)
        key, value = (x.permute(1, 2, 0, 3) for x in both.unbind(1))
        query = query_SBND.permute(1, 2, 0, 3)
        held = stretches(key.size(2), group.rank(), group.size())
        window = min(self.window, key.size(2))
        mixed = [
            windowed_sdpa(queries, key, value, window, start)
            for queries, (start, _) in zip(query.chunk(len(held), dim=2), held, strict=True)
        ]
        return torch.cat(mixed, dim=2).permute(2, 0, 1, 3).flatten(2)


def windowed_sdpa(
    query_BNSD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, window: int, first_query: int = 0
) -> Tensor:
    """Exact causal window attention in blocks of queries, each with only the keys in its window: work grows with
    S · 1.5·window instead of S², without copying inputs. Returns `[B, N, S, D]`.

    Args:
        first_query: position of the first query; keys start at position 0.
    """
    grouped = query_BNSD.size(1) != key_BGSD.size(1)
    # Half a window: measured on a CPU, faster than a whole window or a quarter.
    block = min(max(window // 2, 1), query_BNSD.size(2))
    mask = _band(block, window, query_BNSD.dtype, query_BNSD.device)
    mixed = []
    starts = range(first_query, first_query + query_BNSD.size(2), block)
    for start, queries in zip(starts, query_BNSD.split(block, dim=2), strict=True):
        first, stop = max(start - window, 0), start + queries.size(2)
        keys, values = key_BGSD[:, :, first:stop], value_BGSD[:, :, first:stop]
        seen = mask[: stop - start, first - start + window : stop - start + window]
        mixed.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=grouped))
    return torch.cat(mixed, dim=2)


@functools.lru_cache(maxsize=8)
def _band(block: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask `[block, window + block]`: 0 where a query of a block sees a key, else -inf. Column 0 is the key `window`
    positions before the block."""
    # torch would convert a boolean mask to this form at each call, and keep it for the backward pass.
    query = torch.arange(block, device=device).unsqueeze(1) + window
    key = torch.arange(window + block, device=device)
    hidden = (key > query) | (query - key > window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


@functools.lru_cache(maxsize=1)
def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if has_gpu() else flex_attention


@functools.lru_cache(maxsize=8)
def _flex_mask(window: int, length: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, query, key):
        return (key <= query) & (query - key <= window)

    return create_block_mask(visible, None, None, length, length, device=device)
