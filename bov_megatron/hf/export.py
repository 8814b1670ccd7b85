"""From a configuration and canonical weights to a Hugging Face model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bov_megatron.recipe import ModelConfig

if TYPE_CHECKING:
    from bov_megatron.hf.configuration_bov import BovConfig


def hf_config(model: ModelConfig, **token_ids: int | None) -> BovConfig:
    """The exported model's configuration; `token_ids` are bos_token_id and its like.

    `BovForCausalLM(hf_config(model)).load_state_dict(weights)` takes weights under their canonical names.
    Call `bov_megatron.compat.register_missing_torchvision_ops` before importing transformers.
    """
    from bov_megatron.hf.configuration_bov import BovConfig

    return BovConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.kv_channels,
        max_position_embeddings=model.sequence_length,
        windows=model.windows(),
        value_source=model.value.source,
        target_layers=model.target_layers(),
        value_coefficient=model.value.coefficient,
        value_table=model.value.table,
        rotary_base=model.rotary_base,
        logit_softcap=model.logit_softcap,
        qk_scale=model.qk_scale,
        **token_ids,
    )
