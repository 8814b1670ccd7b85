"""Core attention with windows, by torch's kernels that never hold the scores, instead of Megatron's
matmul-softmax-matmul.

A query at position i sees key j where `0 <= i - j <= window`.

Shapes: S sequence (under context parallelism this rank's part of it), T the keys, from position 0 on, B batch, N this
rank's query heads, G its query groups, D head dimension. Behind a prefix (prefix.py), S are the positions after it.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor

from bov_megatron.model.attention_blocks import LARGEST_BLOCK, attend_in_blocks
from bov_megatron.model.context_parallel import gather_sequence, stretches
from bov_megatron.model.prefix import Prefix, first_position
from bov_megatron.parallel.device import has_gpu


class SdpaCoreAttention(torch.nn.Module):
    """Causal attention within a window, by the kernel that `choose_kernel` names.

    Under context parallelism each rank gathers all keys and values, and attends from each of its two stretches of
    queries.
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
        self.layer_number = layer_number
        self.window = window
        self.cp_group = pg_collection.cp
        self.wanted = kernel
        if has_gpu():
            use_flash_attention_3()

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask=None,
        prefix: Prefix | None = None,
        **megatron_options,
    ) -> Tensor:
        """Attention output `[S, B, N·D]`. `attention_mask` is ignored: the mask follows from the window."""
        group = self.cp_group
        if group.size() > 1:
            both = gather_sequence(torch.stack((key_SBGD, value_SBGD), dim=1), group)
            key_SBGD, value_SBGD = both.unbind(1)
        if prefix is not None:
            key_SBGD, value_SBGD = prefix.joined(self.layer_number, key_SBGD, value_SBGD)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
        held = stretches(key.size(2), group.rank(), group.size(), first_position(prefix))
        mixed = [
            attend(queries, key, value, self.window, start, self.wanted)
            for queries, (start, _) in zip(query.chunk(len(held), dim=2), held, strict=True)
        ]
        return (mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=2)).permute(2, 0, 1, 3).flatten(2)


def attend(
    query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int = 0, wanted: str = "auto"
) -> Tensor:
    """Attention `[B, N, S, D]` of the queries from position `first_query` on.

    Args:
        wanted: the recipe's `model.core_attention`.
    """
    stop = first_query + query_BNSD.size(2)
    first_key = max(first_query - window, 0)
    kernel = choose_kernel(
        wanted,
        on_gpu=query_BNSD.is_cuda,
        dtype=query_BNSD.dtype,
        head_dim=query_BNSD.size(3),
        grouped=query_BNSD.size(1) != key_BGTD.size(1),
        whole=first_query == 0,
        windowed=window < stop - 1,
    )
    if (first_key, stop) != (0, key_BGTD.size(2)):  # the backward pass of a view of everything would copy all gradients
        # Only the keys that some query sees.
        key_BGTD, value_BGTD = (x.narrow(2, first_key, stop - first_key) for x in (key_BGTD, value_BGTD))
    return KERNELS[kernel](query_BNSD, key_BGTD, value_BGTD, window, first_query - first_key)


def choose_kernel(
    wanted: str, *, on_gpu: bool, dtype: torch.dtype, head_dim: int, grouped: bool, whole: bool, windowed: bool
) -> str:
    """The fastest kernel (of KERNELS) that computes a case without holding its scores.

    Args:
        wanted: the recipe's `model.core_attention`.
        grouped: fewer key heads than query heads.
        whole: queries begin where keys do.
        windowed: the window hides keys that come before a query.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    # On a GPU, SDPA has no kernel for grouped heads in fp32, and would hold the scores.
    if whole and not windowed and not (on_gpu and grouped and not half):
        return "sdpa"
    if not on_gpu:
        return "windowed_sdpa" if whole else "blocks"
    if wanted != "flex" and half and head_dim % 8 == 0 and head_dim <= 256:
        return "flash"
    return "windowed_sdpa" if wanted == "sdpa" else "flex"


def sdpa(query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int) -> Tensor:
    """torch's causal attention; neither window nor `first_query` may matter."""
    grouped = query_BNSD.size(1) != key_BGTD.size(1)
    return F.scaled_dot_product_attention(query_BNSD, key_BGTD, value_BGTD, is_causal=True, enable_gqa=grouped)


def flash(query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int) -> Tensor:
    """Flash attention on a GPU; the last query must be at the last key's position.

    Its causal mask is aligned there (https://github.com/Dao-AILab/flash-attention, changes of 2.1), so that it needs no
    mask for a stretch of queries either.
    """
    query, key, value = (x.transpose(1, 2) for x in (query_BNSD, key_BGTD, value_BGTD))
    # scaled_dot_product_attention calls this operator without the window. Keywords after `is_causal` differ between
    # releases of torch, but for these.
    mixed_BSND, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        None,
        None,
        query.size(1),
        key.size(1),
        0.0,
        True,
        False,
        window_size_left=window,
        window_size_right=0,
    )
    return mixed_BSND.transpose(1, 2)


def flex(query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int) -> Tensor:
    """FlexAttention, with any type and head dimension; compiled on a GPU."""
    mask = _flex_mask(window, first_query, query_BNSD.size(2), key_BGTD.size(2), query_BNSD.device)
    grouped = query_BNSD.size(1) != key_BGTD.size(1)
    return _flex_attention()(query_BNSD, key_BGTD, value_BGTD, block_mask=mask, enable_gqa=grouped)


def windowed_sdpa(
    query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int = 0
) -> Tensor:
    """SDPA in blocks of queries, each with only the keys in its window: work grows with S · 1.5·window instead of S²,
    without copying inputs."""
    grouped = query_BNSD.size(1) != key_BGTD.size(1)
    if grouped and query_BNSD.is_cuda:  # SDPA's kernel that takes masks there has no grouped heads
        repeats = query_BNSD.size(1) // key_BGTD.size(1)
        key_BGTD, value_BGTD = (x.repeat_interleave(repeats, dim=1) for x in (key_BGTD, value_BGTD))
        grouped = False
    window = min(window, key_BGTD.size(2))
    # Half a window: measured on a CPU, faster than a whole window or a quarter.
    block = min(max(window // 2, 1), query_BNSD.size(2), LARGEST_BLOCK)
    mask = _band(block, window, query_BNSD.dtype, query_BNSD.device)
    mixed = []
    starts = range(first_query, first_query + query_BNSD.size(2), block)
    for start, queries in zip(starts, query_BNSD.split(block, dim=2), strict=True):
        first, stop = max(start - window, 0), start + queries.size(2)
        keys, values = key_BGTD[:, :, first:stop], value_BGTD[:, :, first:stop]
        seen = mask[: stop - start, first - start + window : stop - start + window]
        mixed.append(F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen, enable_gqa=grouped))
    return torch.cat(mixed, dim=2)


KERNELS = {
    "sdpa": sdpa,
    "flash": flash,
    "flex": flex,
    "windowed_sdpa": windowed_sdpa,
    "blocks": attend_in_blocks,
}
"""By name: functions of queries, keys, values, window and the first query's position, counted from the first key."""


@functools.lru_cache(maxsize=8)
def _band(block: int, window: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Mask `[block, window + block]`: 0 where a query of a block sees a key, else -inf. Column 0 is the key `window`
    positions before the block."""
    # torch would convert a boolean mask to this form at each call, and keep it for the backward pass.
    query = torch.arange(block, device=device).unsqueeze(1) + window
    key = torch.arange(window + block, device=device)
    hidden = (key > query) | (query - key > window)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))


@functools.cache
def use_flash_attention_3() -> None:
    """Let FlashAttention-3 serve torch's flash attention in this process, on a Hopper GPU with `flash_attn_interface`
    installed; a warning, and torch's own kernel, where it can't be loaded."""
    if torch.cuda.get_device_capability()[0] != 9 or importlib.util.find_spec("flash_attn_interface") is None:
        return
    try:
        torch.nn.attention.activate_flash_attention_impl("FA3")
    except (ImportError, RuntimeError) as error:
        warnings.warn(f"FlashAttention-3 is installed and can't be used: {error}", stacklevel=2)


@functools.cache
def _flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False) if has_gpu() else flex_attention


@functools.lru_cache(maxsize=8)
def _flex_mask(window: int, first_query: int, queries: int, keys: int, device: torch.device):
    from torch.nn.attention.flex_attention import create_block_mask

    def visible(batch, head, query, key):
        distance = query + first_query - key
        return (distance >= 0) & (distance <= window)

    # Compiled, the mask's blocks are computed without a tensor of queries × keys.
    return create_block_mask(visible, None, None, queries, keys, device=device, _compile=device.type == "cuda")
