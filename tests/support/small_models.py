"""Small models with random weights, for tests."""

import torch

from bov_megatron.exchange.export import hf_config
from bov_megatron.recipe import ModelConfig, ValueConfig
from bov_megatron.recipe.value_sources import VALUE_SOURCES

# Every value source, and every option that changes what is computed or kept.
VARIANTS = {
    **{source: ValueConfig(source=source, target_layers="last_two_thirds") for source in VALUE_SOURCES},
    "bank_every": ValueConfig(source="bank", target_layers="every"),
    "bank_listed_shared_fixed": ValueConfig(source="bank", target_layers=[1, 3], table="shared", coefficient="fixed"),
    "first_layer_every_fixed": ValueConfig(source="first_layer", target_layers="every", coefficient="fixed"),
    "sum_fixed": ValueConfig(source="projection_plus_bank", target_layers="second_half", coefficient="fixed"),
    "gated_shared": ValueConfig(source="gated_value_embedding", target_layers="every_second", table="shared"),
}


def small_model_config(value: ValueConfig, **fields) -> ModelConfig:
    """4 layers, grouped queries, head_dim unlike hidden_size / heads."""
    sizes = dict(num_layers=4, hidden_size=32, num_attention_heads=4, num_query_groups=2, head_dim=6)
    return ModelConfig(
        **{**sizes, "ffn_hidden_size": 48, "vocab_size": 61, "sequence_length": 64, **fields}, value=value
    )


def small_model(value: ValueConfig, windows=(3, 5, 3, 64), seed=0, **fields):
    """`BovForCausalLM` in fp32 with every parameter away from its initial value, and windows that bite."""
    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    config = hf_config(small_model_config(value, **fields))
    if windows is not None:
        config.windows = list(windows)
    model = BovForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.dim() > 1 else 0.8
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def random_ids(batch, length, vocab=61, seed=1):
    return torch.randint(0, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
