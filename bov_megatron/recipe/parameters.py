"""Every parameter of a model by its canonical name.

Canonical names are those of the exported Hugging Face model. Linear weights are `[out, in]`, heads are contiguous
blocks of `out`, vocabulary rows are unpadded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bov_megatron.recipe.fields import SMEAR_CHANNELS, ModelConfig

GATE_CHANNELS = 12
"""Leading channels of a token that the gate of a gated value source reads."""

KINDS = ("matrix", "embedding", "output", "table", "coefficient", "projection_coefficient", "smear")
"""Optimizer kinds: `matrix` is what Muon takes; `coefficient` is gamma or b, `projection_coefficient` is a."""
VOCABULARY_KINDS = frozenset({"embedding", "output", "table"})
"""Kinds with one row per token id; they are stored with padding rows."""


@dataclass(frozen=True)
class ParameterSpec:
    """One parameter: canonical name, full unpadded shape, optimizer kind (one of KINDS) and 0-based layer."""

    name: str
    shape: tuple[int, ...]
    kind: str
    layer: int | None = None

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def table_name(model: ModelConfig, layer: int) -> str:
    """Canonical name of the value table that target layer `layer` reads."""
    if model.value.table == "shared":
        return "model.value_table.weight"
    return f"model.layers.{layer}.self_attn.value_table.weight"


def parameter_specs(model: ModelConfig) -> list[ParameterSpec]:
    """All parameters of `model`, in the order of a forward pass."""
    d, vocab = model.hidden_size, model.vocab_size
    specs = [
        ParameterSpec("model.embed_tokens.weight", (vocab, d), "embedding"),
        ParameterSpec("model.smear.gate.weight", (1, SMEAR_CHANNELS), "smear"),
        ParameterSpec("model.smear.scale", (1,), "smear"),
    ]
    if model.value.table == "shared" and model.value.facts.has_table and model.layers_from_source():
        specs.append(ParameterSpec(table_name(model, 0), (vocab, model.kv_dim), "table"))
    for layer in range(model.num_layers):
        specs += _layer_specs(model, layer)
    specs.append(ParameterSpec("lm_head.weight", (vocab, d), "output"))
    return specs


def _layer_specs(model: ModelConfig, layer: int) -> list[ParameterSpec]:
    d, kv, facts = model.hidden_size, model.kv_dim, model.facts_of(layer)
    prefix = f"model.layers.{layer}"

    def matrix(name: str, *shape: int) -> ParameterSpec:
        return ParameterSpec(f"{prefix}.{name}.weight", shape, "matrix", layer)

    specs = [matrix("self_attn.q_proj", model.query_dim, d), matrix("self_attn.k_proj", kv, d)]
    if facts.has_value_matrix:
        specs.append(matrix("self_attn.v_proj", kv, d))
    if facts.has_table and model.value.table == "per_layer":
        specs.append(ParameterSpec(table_name(model, layer), (model.vocab_size, kv), "table", layer))
    if facts.gated:
        specs.append(matrix("self_attn.value_gate", model.kv_heads, GATE_CHANNELS))
    if model.value.coefficient == "learned" and facts.coefficients:
        if facts.coefficients == 2:
            name = f"{prefix}.self_attn.projection_coefficient"
            specs.append(ParameterSpec(name, (1,), "projection_coefficient", layer))
        specs.append(ParameterSpec(f"{prefix}.self_attn.source_coefficient", (1,), "coefficient", layer))
    specs += [
        matrix("self_attn.o_proj", d, model.query_dim),
        matrix("mlp.up_proj", model.ffn_size, d),
        matrix("mlp.down_proj", d, model.ffn_size),
    ]
    return specs
