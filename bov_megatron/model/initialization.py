"""Initial weights (arXiv 2606.02780, "Initialisation"). They depend only on seed and canonical parameter name, so that
every layout starts from the same model.

A tensor is drawn in blocks of rows, each from a generator seeded by (seed, name, block); a rank draws only the blocks
that it holds. A row of an aligned table is `W_V · rms(embedding row)`; a rank draws both again, whoever owns them.

Shapes: H hidden, K = kv_dim.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from bov_megatron.model.decoder import BovModel
from bov_megatron.model.naming import local_from_full
from bov_megatron.model.norm import rms_norm
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import ModelConfig, Recipe
from bov_megatron.recipe.fields import SMEAR_CHANNELS
from bov_megatron.recipe.parameters import VOCABULARY_KINDS, ParameterSpec

BLOCK_ROWS = 1024


@torch.no_grad()
def initialize_weights(model: BovModel) -> None:
    """Set this rank's parameters in place, but for those without memory; drawn on the CPU in fp32, then cast."""
    group = model.pg_collection.tp
    for local in model.local_parameters:
        if not local.parameter.is_meta:
            local.parameter.copy_(_initial_local(local, model.recipe, group.rank(), group.size()))


def _initial_local(local: LocalParameter, recipe: Recipe, tp_rank: int, tp_size: int) -> Tensor:
    shape = local.parameter.shape
    if local.kind in VOCABULARY_KINDS:
        start = tp_rank * shape[0] if local.partition_dim == 0 else 0
        rows = initial_rows(local.specs[0], recipe, start, min(start + shape[0], recipe.model.vocab_size))
        rows = torch.nn.functional.pad(rows, (0, 0, 0, shape[0] - rows.size(0)))
        return rows.chunk(tp_size, dim=1)[tp_rank] if local.partition_dim == 1 else rows
    full = {spec.name: initial_rows(spec, recipe, 0, spec.shape[0]) for spec in local.specs}
    return local_from_full(local, full, tp_rank, tp_size)


def initial_rows(spec: ParameterSpec, recipe: Recipe, start: int, stop: int) -> Tensor:
    """Rows `[start, stop)` of the initial fp32 tensor; empty where start >= stop."""
    model, seed = recipe.model, recipe.train.seed
    if spec.kind == "table" and not model.value.facts.gated:
        return _aligned_rows(spec, recipe, start, stop)
    draw, low, high = _distribution(spec, model)
    if draw == "constant":
        return torch.full((max(stop - start, 0), *spec.shape[1:]), low)
    blocks = []
    for block in range(start // BLOCK_ROWS, -(-stop // BLOCK_ROWS)) if stop > start else ():
        first, last = block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, spec.shape[0])
        generator = torch.Generator().manual_seed(_block_seed(seed, spec.name, block))
        rows = torch.empty(last - first, *spec.shape[1:])
        if draw == "normal":
            rows.normal_(low, high, generator=generator)
        else:
            rows.uniform_(low, high, generator=generator)
        blocks.append(rows[max(start - first, 0) : stop - first])
    return torch.cat(blocks) if blocks else torch.empty(0, *spec.shape[1:])


def _aligned_rows(spec: ParameterSpec, recipe: Recipe, start: int, stop: int) -> Tensor:
    """`W_V · rms(embedding)` of each row, with the `W_V` that this layer would have been initialised with; for a shared
    table that of the first target layer."""
    model = recipe.model
    layer = spec.layer if spec.layer is not None else model.layers_from_source()[0]
    value = ParameterSpec(
        f"model.layers.{layer}.self_attn.v_proj.weight", (model.kv_dim, model.hidden_size), "matrix", layer
    )
    embedding = ParameterSpec("model.embed_tokens.weight", (model.vocab_size, model.hidden_size), "embedding")
    value_KH = initial_rows(value, recipe, 0, model.kv_dim)
    return rms_norm(initial_rows(embedding, recipe, start, stop)) @ value_KH.t()


def _distribution(spec: ParameterSpec, model: ModelConfig) -> tuple[str, float, float]:
    """(`normal`, mean, deviation), (`uniform`, low, high) or (`constant`, value, value)."""
    if spec.kind == "embedding":
        return "normal", 0.0, 0.8
    if spec.kind == "output":
        return "normal", 0.0, 0.001
    bound = math.sqrt(3 / model.hidden_size)
    first_coefficient = 0.0 if model.value.facts.coefficients == 2 else 1.0
    name = spec.name.removesuffix(".weight").rsplit(".", 1)[-1]
    return {
        "gate": ("uniform", -(SMEAR_CHANNELS**-0.5), SMEAR_CHANNELS**-0.5),  # as torch.nn.Linear's
        "scale": ("constant", 0.0, 0.0),
        "value_table": ("uniform", -bound, bound),
        "value_gate": ("uniform", 0.0, 0.02),
        "source_coefficient": ("constant", first_coefficient, first_coefficient),
        "projection_coefficient": ("constant", 1.0, 1.0),
        "q_proj": ("uniform", -bound, bound),
        "k_proj": ("uniform", -bound, bound),
        "v_proj": ("uniform", -bound, bound),
        "up_proj": ("uniform", -0.4 * bound, 0.4 * bound),
        "o_proj": ("constant", 0.0, 0.0),
        "down_proj": ("constant", 0.0, 0.0),
    }[name]


def _block_seed(seed: int, name: str, block: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}/{block}".encode()).digest()[:8], "little") >> 1
