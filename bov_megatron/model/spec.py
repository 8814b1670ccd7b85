"""Megatron's configuration and layer specs of a recipe."""

from __future__ import annotations

import functools

import torch
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules, get_transformer_layer_offset

from bov_megatron.model.attention import ValueSourceAttention, ValueSourceLayer
from bov_megatron.model.core_attention import SdpaCoreAttention
from bov_megatron.model.linear import fp8_settings, linear_layers
from bov_megatron.model.norm import WeightlessRMSNorm
from bov_megatron.parallel.device import has_gpu
from bov_megatron.parallel.regions import region
from bov_megatron.recipe import ParallelConfig, Recipe
from bov_megatron.recipe.pipeline import megatron_layout


def transformer_config(recipe: Recipe) -> TransformerConfig:
    """Megatron's configuration for the recipe's model and layout."""
    model, layout = recipe.model, recipe.parallel
    bf16 = recipe.train.precision == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.kv_channels,
        activation_func=squared_relu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        normalization="RMSNorm",
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=layout.virtual_stages,
        pipeline_model_parallel_layout=megatron_layout(recipe),
        # In an interleaved pipeline, batched messages of two stages are mixed up: gradients are silently wrong.
        overlap_p2p_comm=layout.virtual_stages is not None,
        batch_p2p_comm=layout.virtual_stages is None,
        batch_p2p_sync=False,  # works around a defect of old releases of torch, by waiting for the whole device
        context_parallel_size=layout.context_parallel_size,
        sequence_parallel=layout.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=bf16,
        deterministic_mode=recipe.train.deterministic,
        **_recomputation(layout),
        **fp8_settings(recipe),
        perform_initialization=False,  # model/initialization.py does it, independent of the layout
        use_cpu_initialization=not has_gpu(),
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
        cuda_graph_scope=[],  # the default warns that it is deprecated
    )


@region
def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """`max(x, 0)²`, the feed-forward layer's activation."""
    return torch.nn.functional.relu(x).square()


def _recomputation(layout: ParallelConfig) -> dict:
    """Megatron's fields of recomputation. Its `block` method recomputes the first layers of a stage, one at a time."""
    if layout.recompute != "full":
        return {"recompute_granularity": None if layout.recompute == "none" else layout.recompute}
    method = "uniform" if layout.recompute_num_layers is None else "block"
    return {
        "recompute_granularity": "full",
        "recompute_method": method,
        "recompute_num_layers": layout.recompute_num_layers or 1,
    }


def block_spec(recipe: Recipe, config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Specs of the layers of this rank's pipeline stage, or of its model chunk `vp_stage`."""
    first = get_transformer_layer_offset(config, vp_stage)
    count = get_num_layers_to_build(config, vp_stage)
    layers = [layer_spec(recipe, first + i) for i in range(count)]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=WeightlessRMSNorm)


def layer_spec(recipe: Recipe, layer: int) -> ModuleSpec:
    """Spec of one layer (0-based). Raises RecipeError where Transformer Engine is missing (see model/linear.py)."""
    model = recipe.model
    column_parallel, row_parallel = linear_layers(recipe)
    attention = ModuleSpec(
        module=ValueSourceAttention,
        params={
            "model": model,
            "source": model.source_of(layer),
            "vocab_size": recipe.padded_vocab_size(),
            "keeps_values": layer == 0 and model.value.facts.reads == "first_layer",
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=column_parallel,
            core_attention=functools.partial(
                SdpaCoreAttention, window=model.windows()[layer], kernel=model.core_attention
            ),
            linear_proj=row_parallel,
        ),
    )
    mlp = ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column_parallel, linear_fc2=row_parallel))
    return ModuleSpec(
        module=ValueSourceLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=WeightlessRMSNorm,
            self_attention=attention,
            mlp=mlp,  # its norm is in ValueSourceLayer
        ),
    )
