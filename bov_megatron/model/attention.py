"""Megatron self-attention with values from a value source.

Shapes: S sequence, B batch, H hidden, N this rank's query heads, G its query groups, D head dimension,
C this rank's columns of a projection.
Under sequence parallelism hidden states are `[S/T, B, H]`; queries, keys and values are whole sequences. Under context
parallelism S is this rank's part of the sequence; only core attention sees the whole sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core import tensor_parallel
from megatron.core.tensor_parallel.mappings import all_gather_last_dim_from_tensor_parallel_region
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from bov_megatron.model.norm import add_and_normalise, rms_norm
from bov_megatron.model.prefix import Prefix
from bov_megatron.model.sources import SOURCE_CLASSES
from bov_megatron.parallel.regions import region
from bov_megatron.recipe.value_sources import VALUE_SOURCES


@dataclass
class Carried:
    """Megatron's `context` during one layer call (see sources.py); the layer may replace the tensor."""

    tensor: Tensor | None


class ValueSourceAttention(Attention):
    """Self-attention: query and key from the residual stream, values from the layer's value source.

    Mirrors megatron.core.transformer.attention.SelfAttention. `linear_qkv` holds query, key and (only where
    the source needs `W_V · x`) value, interleaved by query group, as Megatron's does.

    Args:
        model: the recipe's model section.
        source: this layer's value source.
        vocab_size: padded vocabulary of the value tables.
        keeps_values: whether this layer's values become `context` for later layers (layer 0 of first-layer sources).
    """

    def __init__(
        self,
        config,
        submodules,
        layer_number,
        model,
        source,
        vocab_size,
        keeps_values=False,
        attn_mask_type=AttnMaskType.causal,
        cp_comm_type=None,
        pg_collection=None,
    ):
        super().__init__(config, submodules, layer_number, attn_mask_type, "self", cp_comm_type, pg_collection)
        self.model, self.keeps_values = model, keeps_values
        # With fewer query groups than tensor-parallel ranks, consecutive ranks share a group's key and value.
        self.ranks_per_group = max(self.tp_group.size() // model.kv_heads, 1)
        facts = VALUE_SOURCES[source]
        self.value_source = SOURCE_CLASSES[source](
            facts, model, config.params_dtype, self.tp_group, vocab_size, config.sequence_parallel
        )
        dim, per_group = self.hidden_size_per_attention_head, model.num_attention_heads // model.kv_heads
        self.split = (per_group * dim, dim) + ((dim,) if facts.fused_projection else ())
        self.linear_qkv = self._column_parallel(submodules.linear_qkv, sum(self.split) * model.kv_heads)
        if facts.separate_projection:
            self.linear_v = self._column_parallel(submodules.linear_qkv, self.kv_projection_size)

    def _column_parallel(self, linear, output_size: int):
        return linear(
            self.config.hidden_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_comm_buffer_name="qkv",
            tp_group=self.tp_group,
        )

    def forward(
        self,
        hidden_SBH: Tensor,
        attention_mask=None,
        *,
        key_value_states: Carried,
        rotary_pos_emb=None,
        inference_context: Prefix | None = None,
        **_,
    ) -> tuple[Tensor, None]:
        """Attention output `[S, B, H]` (a chunk of it under sequence parallelism), and no bias.

        Args:
            key_value_states: Megatron's `context`; layer 0 of a first-layer source sets its tensor to its own values.
            rotary_pos_emb: cosine and sine, `[2, S, 1, 1, D/2]`.
            inference_context: what the sequences go on from.
        """
        query, key, projected = self.get_query_key_value_tensors(hidden_SBH)
        value = self.value_source(projected, hidden_SBH, key_value_states.tensor, self._project_values)
        if self.keeps_values:
            key_value_states.tensor = value
        query, key = rotate_and_normalise(query, key, rotary_pos_emb, self.model.qk_scale)
        if self.checkpoint_core_attention and self.training:
            mixed = tensor_parallel.checkpoint(self.core_attention, False, query, key, value, None)
        else:
            mixed = self.core_attention(query, key, value, None, prefix=inference_context)
        return self.linear_proj(mixed)

    def get_query_key_value_tensors(self, hidden_SBH: Tensor, *_, **__) -> tuple[Tensor, Tensor, Tensor | None]:
        """Query `[S, B, N, D]`, key `[S, B, G, D]` and projected value, None where the value source doesn't need it."""
        mixed, _ = self.linear_qkv(hidden_SBH)
        query, key, *value = self._own_groups(mixed, sum(self.split)).split(self.split, dim=-1)
        query = query.reshape(*query.shape[:2], -1, self.hidden_size_per_attention_head)
        query = query.chunk(self.ranks_per_group, dim=2)[self.tp_group.rank() % self.ranks_per_group]
        return query, key, value[0] if value else None

    def _project_values(self, hidden_SBH: Tensor) -> Tensor:
        values, _ = self.linear_v(hidden_SBH)
        return self._own_groups(values, self.hidden_size_per_attention_head)

    def _own_groups(self, columns_SBC: Tensor, width: int) -> Tensor:
        """This rank's query groups `[S, B, G, width]` from its columns of a projection."""
        if self.ranks_per_group == 1:
            return columns_SBC.unflatten(-1, (-1, width))
        # A rank has part of a group's columns. The backward pass sums the gradients of all ranks that share the group.
        groups = all_gather_last_dim_from_tensor_parallel_region(columns_SBC, group=self.tp_group)
        own = self.tp_group.rank() // self.ranks_per_group
        return groups.unflatten(-1, (-1, width))[:, :, own : own + 1].contiguous()


@region
def rotate_and_normalise(query_SBND: Tensor, key_SBGD: Tensor, cos_sin: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Query and key, each rotated and normalised."""
    return _rotated_and_normalised(query_SBND, cos_sin, scale), _rotated_and_normalised(key_SBGD, cos_sin, scale)


def _rotated_and_normalised(x_SBND: Tensor, cos_sin: Tensor, scale: float) -> Tensor:
    """Half-split rotary embedding, then RMSNorm per head, then `scale`.

    Rotates by `y1 = x1·cos + x2·sin`, `y2 = -x1·sin + x2·cos`, opposite to the usual Llama code.
    """
    cos, sin = cos_sin[0].to(x_SBND.dtype), cos_sin[1].to(x_SBND.dtype)
    first, second = x_SBND.chunk(2, dim=-1)
    rotated = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    return rms_norm(rotated) * scale


def rotary_cos_sin(positions_S: Tensor, head_dim: int, base: float) -> Tensor:
    """Cosine and sine of each position's angles in fp32, `[2, S, 1, 1, D/2]`."""
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_S.device)
    angles = torch.outer(positions_S.float(), 1.0 / base ** (channels / head_dim))
    return torch.stack((angles.cos(), angles.sin()))[:, :, None, None, :]


class ValueSourceLayer(TransformerLayer):
    """Megatron's transformer layer, which passes `context` to self-attention instead of cross-attention."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask=None,
        context: Tensor | None = None,
        rotary_pos_emb=None,
        inference_context: Prefix | None = None,
        **_,
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[S, B, H]` (a chunk of them under sequence parallelism), and the next layer's `context`."""
        carried = Carried(context)
        attended, _ = self.self_attention(
            self.input_layernorm(hidden_states),
            key_value_states=carried,
            rotary_pos_emb=rotary_pos_emb,
            inference_context=inference_context,
        )
        hidden_states, normalised = add_and_normalise(hidden_states, attended)
        output, _ = self.mlp(normalised)
        return hidden_states + output, carried.tensor
