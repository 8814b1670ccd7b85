"""The mapping between Megatron's parameters and canonical ones (recipe/parameters.py).

Megatron fuses query, key and value into one matrix, interleaved by query group, splits matrices over tensor-parallel
ranks and pads the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from bov_megatron.model.attention import ValueSourceAttention
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe.parameters import VOCABULARY_KINDS, ParameterSpec, parameter_specs, table_name


def local_parameters(model: GPTModel) -> list[LocalParameter]:
    """Every parameter of a BovModel once, in the order of `model.named_parameters`."""
    specs = {spec.name: spec for spec in parameter_specs(model.recipe.model)}
    named = {id(entry[0]): entry[1:] for entry in _named(model)}
    ahead = {id(table.weight): table for table in model.tables_ahead}
    ranks = model.pg_collection.tp.size()
    result = []
    for qualified_name, parameter in model.named_parameters():
        if id(parameter) not in named:
            raise RuntimeError(f"{qualified_name} has no canonical name: extend model/naming.py")
        names, partition_dim, fused_split = named[id(parameter)]
        split = ranks > 1 and partition_dim >= 0
        table, spec = ahead.get(id(parameter)), specs[names[0]]
        result.append(
            LocalParameter(
                qualified_name,
                parameter,
                tuple(specs[name] for name in names),
                partition_dim=partition_dim if split else -1,
                tensor_parallel_size=ranks if split else 1,
                fused_split=fused_split,
                on_host=table is not None and table.on_host,
                forward_position=_forward_position(spec, model.recipe.model.num_layers + 1) if table is None else 0,
            )
        )
    return result


def _forward_position(spec: ParameterSpec, last: int) -> int:
    """0 for the decoder's input, then the layers from 1, then `last` for the output matrix."""
    if spec.layer is not None:
        return spec.layer + 1
    return last if spec.kind == "output" else 0


def _named(model: GPTModel) -> Iterator[tuple[torch.nn.Parameter, tuple[str, ...], int, tuple[int, ...] | None]]:
    """(parameter, canonical names, dimension split over tensor-parallel ranks, fused split) of the chunk."""
    if model.pre_process:
        yield model.embedding.word_embeddings.weight, ("model.embed_tokens.weight",), 0, None
        yield model.smear.gate, ("model.smear.gate.weight",), -1, None
        yield model.smear.scale, ("model.smear.scale",), -1, None
    if model.value_table is not None:
        table = model.value_table
        yield table.weight, (table_name(model.recipe.model, 0),), table.partition_dim, None
    for layer in model.decoder.layers:
        prefix = f"model.layers.{layer.layer_number - 1}"
        yield from _named_attention(layer.self_attention, f"{prefix}.self_attn")
        yield layer.mlp.linear_fc1.weight, (f"{prefix}.mlp.up_proj.weight",), 0, None
        yield layer.mlp.linear_fc2.weight, (f"{prefix}.mlp.down_proj.weight",), 1, None
    if model.post_process:
        yield model.output_layer.weight, ("lm_head.weight",), 0, None


def _named_attention(attention: ValueSourceAttention, prefix: str):
    letters = "qkv"[: len(attention.split)]
    yield attention.linear_qkv.weight, tuple(f"{prefix}.{x}_proj.weight" for x in letters), 0, attention.split
    if attention.value_source.facts.separate_projection:
        yield attention.linear_v.weight, (f"{prefix}.v_proj.weight",), 0, None
    source = attention.value_source
    if source.table is not None:
        yield source.table.weight, (f"{prefix}.value_table.weight",), source.table.partition_dim, None
    if source.gate is not None:
        yield source.gate, (f"{prefix}.value_gate.weight",), 0, None
    for name in ("projection_coefficient", "source_coefficient"):
        if getattr(source, name) is not None:
            yield getattr(source, name), (f"{prefix}.{name}",), -1, None
    yield attention.linear_proj.weight, (f"{prefix}.o_proj.weight",), 1, None


def local_from_full(local: LocalParameter, full: dict[str, Tensor], tp_rank: int, tp_size: int) -> Tensor:
    """This rank's part of canonical tensors, padded, fused and sliced as in Megatron."""
    tensor = local.fuse([full[name] for name in local.names])
    if local.kind in VOCABULARY_KINDS:
        padding = local.full_shape[0] - tensor.size(0)
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding)) if padding else tensor  # which would copy it
    return tensor.chunk(tp_size, local.partition_dim)[tp_rank] if local.partition_dim >= 0 else tensor


def full_from_gathered(local: LocalParameter, gathered: Tensor) -> dict[str, Tensor]:
    """Canonical tensors, unfused and unpadded, from a Megatron parameter with all ranks' parts."""
    full = {}
    for spec, piece in zip(local.specs, local.unfuse(gathered), strict=True):
        full[spec.name] = piece[: spec.shape[0]] if spec.kind in VOCABULARY_KINDS else piece
        if tuple(full[spec.name].shape) != spec.shape:
            raise RuntimeError(f"{spec.name}: expected shape {spec.shape}, found {tuple(full[spec.name].shape)}")
    return full
