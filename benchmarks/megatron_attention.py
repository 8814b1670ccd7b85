"""Megatron's own local attention with this project's windows, to compare with."""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor


class MegatronCoreAttention(DotProductAttention):
    def __init__(self, config, layer_number, attn_mask_type, attention_type, window: int, kernel: str = "", **options):
        super().__init__(config, layer_number, AttnMaskType.causal, attention_type, **options)
        self.window = window

    def forward(self, query, key, value, attention_mask=None, prefix=None, **options):
        hidden = _hidden_keys(self.window, query.size(0), query.device)
        return super().forward(query.contiguous(), key.contiguous(), value.contiguous(), hidden, **options)


@functools.lru_cache(maxsize=8)
def _hidden_keys(window: int, length: int, device: torch.device) -> Tensor:
    """True where a key is out of sight, `[1, 1, S, S]`."""
    distance = torch.arange(length, device=device).unsqueeze(1) - torch.arange(length, device=device)
    return ((distance < 0) | (distance > window))[None, None]
