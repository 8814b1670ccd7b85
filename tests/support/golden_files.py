"""Golden tensors of the paper's reference implementation (arXiv 2606.02780), under canonical names.

`tests/golden/*.safetensors` hold outputs of the reference in fp32 on CPU with random weights, one file per
value source; nothing in them was computed by this project. Linear weights are `[out, in]`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from bov_megatron.recipe import ModelConfig, ValueConfig
from bov_megatron.recipe.parameters import parameter_specs, table_name

GOLDEN_DIR = Path(__file__).parents[1] / "golden"

VALUE_CONFIGS = {
    "baseline": ValueConfig(source="projection"),
    "bov": ValueConfig(source="bank"),
    "bov_fixed": ValueConfig(source="bank", coefficient="fixed"),
    "bov_shared": ValueConfig(source="bank", table="shared"),
    "bov_every_layer": ValueConfig(source="bank", target_layers="every"),
    "x0_wv": ValueConfig(source="embedding_projection"),
    "v1": ValueConfig(source="first_layer"),
    "ve_add_every2": ValueConfig(source="gated_value_embedding", target_layers="every_second"),
}
GOLDEN_NAMES = tuple(VALUE_CONFIGS)
TRAJECTORY_NAMES = ("baseline", "bov")
"""Files that also hold ten optimizer steps."""


@dataclass(frozen=True)
class Trajectory:
    """Ten steps of the reference's optimizer (Muon + AdamW), fp32 except Muon's bf16 orthogonalisation."""

    initial: dict[str, torch.Tensor]
    final: dict[str, torch.Tensor]
    """Weights after the ten steps: expect agreement to 1e-3 in block matrices, 1e-5 elsewhere."""
    batches: torch.Tensor
    """`[10, 2, 65]` int64: inputs `[:, :-1]`, targets `[:, 1:]`."""
    losses: torch.Tensor
    """`[10]` float64, the mean cross-entropy before each step."""
    schedule: dict
    """Learning rates before the width-dependent AdamW scaling, warmup and horizon in steps."""


@dataclass(frozen=True)
class Golden:
    """One golden file; dictionaries are keyed by canonical parameter name."""

    name: str
    model: ModelConfig
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    """Of the mean cross-entropy over all targets, one for every weight."""
    tokens: torch.Tensor
    """`[2, 600]` int64."""
    targets: torch.Tensor
    """`[2, 600]` int64."""
    positions: torch.Tensor
    """`[7]` positions at which `logits` are given."""
    logits: torch.Tensor
    """`[2, 7, vocab]`, after the soft cap."""
    loss: torch.Tensor
    meta: dict
    """`flops_per_token`, `counts`, `window_sizes`, as the reference states them."""
    trajectory: Trajectory | None


def load_golden(name: str) -> Golden:
    """Read `tests/golden/<name>.safetensors` (one of GOLDEN_NAMES)."""
    if name not in VALUE_CONFIGS:
        raise KeyError(f"no golden file {name!r}; there are: {', '.join(GOLDEN_NAMES)}")
    with safe_open(GOLDEN_DIR / f"{name}.safetensors", framework="pt") as file:
        meta = json.loads(file.metadata()["meta"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    model = ModelConfig(
        num_layers=meta["n_layer"],
        hidden_size=meta["n_embd"],
        num_attention_heads=meta["n_head"],
        num_query_groups=meta["n_kv_head"],
        vocab_size=meta["vocab_size"],
        sequence_length=meta["sequence_len"],
        window_pattern=meta["window_pattern"],
        value=VALUE_CONFIGS[name],
    )
    trajectory = None
    if "train_losses" in tensors:
        trajectory = Trajectory(
            initial=_group(tensors, "init.", model),
            final=_group(tensors, "final.", model),
            batches=tensors["batches"],
            losses=tensors["train_losses"],
            schedule=meta["schedule"],
        )
    return Golden(
        name=name,
        model=model,
        weights=_group(tensors, "weight.", model),
        gradients=_group(tensors, "grad.", model),
        **{key: tensors[key] for key in ("tokens", "targets", "positions", "logits", "loss")},
        meta=meta,
        trajectory=trajectory,
    )


def _group(tensors: dict[str, torch.Tensor], prefix: str, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors under `prefix` by canonical name, in the order of `parameter_specs`, none missing or left."""
    found = {canonical_name(key.removeprefix(prefix), model): key for key in tensors if key.startswith(prefix)}
    specs = {spec.name: spec.shape for spec in parameter_specs(model)}
    # The reference keeps a value matrix in layers that never use it; it has no gradient, and no place here.
    unused = {f"model.layers.{i}.self_attn.v_proj.weight" for i in range(model.num_layers)} - specs.keys()
    assert found.keys() - unused == specs.keys(), (found.keys() - unused) ^ specs.keys()
    group = {name: tensors[found[name]] for name in specs}
    assert all(tensor.shape == specs[name] for name, tensor in group.items())
    return group


def canonical_name(reference_name: str, model: ModelConfig) -> str:
    """Canonical name of a parameter of the reference implementation."""
    top = {
        "transformer.wte.weight": "model.embed_tokens.weight",
        "smear_gate.weight": "model.smear.gate.weight",
        "smear_lambda": "model.smear.scale",
        "lm_head.weight": "lm_head.weight",
    }
    if reference_name in top:
        return top[reference_name]
    if match := re.fullmatch(r"value_embeds\.(\d+)\.weight", reference_name):
        return table_name(model, int(match[1]))
    layer, rest = re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", reference_name).groups()
    return (
        f"model.layers.{layer}."
        + {
            "attn.c_q.weight": "self_attn.q_proj.weight",
            "attn.c_k.weight": "self_attn.k_proj.weight",
            "attn.c_v.weight": "self_attn.v_proj.weight",
            "attn.c_proj.weight": "self_attn.o_proj.weight",
            "attn.gamma_v": "self_attn.source_coefficient",
            "attn.ve_gate.weight": "self_attn.value_gate.weight",
            "mlp.c_fc.weight": "mlp.up_proj.weight",
            "mlp.c_proj.weight": "mlp.down_proj.weight",
        }[rest]
    )
