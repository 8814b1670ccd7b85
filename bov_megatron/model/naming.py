"""Between Megatron's parameters and canonical ones (bov_megatron.parameters), in one place.

Megatron fuses query, key and value into one matrix, interleaved by query group; it splits matrices over
tensor-parallel ranks and pads the vocabulary. Initialisation, import, export and the optimizer all read the
mapping from here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bov_megatron.model.attention import ValueSourceAttention
from bov_megatron.recipe.parameters import ParameterSpec, parameter_specs, table_name

if TYPE_CHECKING:
    from bov_megatron.model.decoder import BovModel

VOCABULARY_KINDS = ("embedding", "output", "table")


@dataclass
class LocalParameter:
    """A parameter held by this rank.

    `names`: the canonical parameters in it: one, or query, key (and value) of a fused matrix.
    `specs`: their full shapes and kinds.
    `partition_dim`: dimension split over tensor-parallel ranks; -1 if every rank holds all of it.
    `fused_split`: rows per query group of each canonical parameter in a fused matrix, else None.
    """

    parameter: torch.nn.Parameter
    specs: tuple[ParameterSpec, ...]
    partition_dim: int
    fused_split: tuple[int, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)


def local_parameters(model: BovModel) -> list[LocalParameter]:
    """Every parameter of this rank's model chunk, each exactly once."""
    specs = {spec.name: spec for spec in parameter_specs(model.recipe.model)}
    parallel = model.pg_collection.tp.size() > 1
    found = [
        LocalParameter(parameter, tuple(specs[name] for name in names), dim if parallel else -1, fused_split)
        for parameter, names, dim, fused_split in _named(model)
    ]
    unnamed = {id(p) for p in model.parameters()} ^ {id(f.parameter) for f in found}
    if unnamed:
        raise RuntimeError(f"{len(unnamed)} parameters of the model have no canonical name: extend model/naming.py")
    return found


def tag_parameters(model: BovModel) -> None:
    """Write kind, canonical name, partition and fusion onto the parameters, where optimizers read them.

    Megatron's linear layers set their partition only when they initialise themselves, which they don't here.
    """
    read_ahead = {id(table.weight) for table in model.tables_ahead}
    for local in local_parameters(model):
        parameter = local.parameter
        parameter.kind = local.specs[0].kind
        parameter.canonical_name = local.names if local.fused_split else local.names[0]
        parameter.fused_split = local.fused_split
        last = model.recipe.model.num_layers + 1
        parameter.forward_position = 0 if id(parameter) in read_ahead else _forward_position(local.specs[0], last)
        parameter.tensor_model_parallel = local.partition_dim >= 0
        parameter.partition_dim, parameter.partition_stride = local.partition_dim, 1
        # Megatron's optimizers would otherwise take a table for a matrix, and orthogonalise it.
        parameter.is_embedding_or_output_parameter = parameter.kind in VOCABULARY_KINDS


def _forward_position(spec: ParameterSpec, last: int) -> int:
    """0 for what the decoder's input is made of, then the layers from 1, then the output matrix."""
    if spec.layer is not None:
        return spec.layer + 1
    return last if spec.kind == "output" else 0


def _named(model: BovModel) -> Iterator[tuple[torch.nn.Parameter, tuple[str, ...], int, tuple[int, ...] | None]]:
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
    if getattr(source, "table", None) is not None:
        yield source.table.weight, (f"{prefix}.value_table.weight",), source.table.partition_dim, None
    if getattr(source, "gate", None) is not None:
        yield source.gate, (f"{prefix}.value_gate.weight",), 0, None
    for name in ("projection_coefficient", "source_coefficient"):
        if getattr(source, name, None) is not None:
            yield getattr(source, name), (f"{prefix}.{name}",), -1, None
    yield attention.linear_proj.weight, (f"{prefix}.o_proj.weight",), 1, None


def local_from_full(local: LocalParameter, full: dict[str, Tensor], tp_rank: int, tp_size: int) -> Tensor:
    """This rank's part of canonical tensors: padded, fused and sliced as Megatron holds it."""
    pieces = [full[name] for name in local.names]
    tensor = fuse(pieces, local.fused_split) if local.fused_split else pieces[0]
    if local.specs[0].kind in VOCABULARY_KINDS:
        split_rows = tp_size if local.partition_dim == 0 else 1
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, local.parameter.size(0) * split_rows - tensor.size(0)))
    return tensor.chunk(tp_size, local.partition_dim)[tp_rank] if local.partition_dim >= 0 else tensor


def full_from_gathered(local: LocalParameter, gathered: Tensor) -> dict[str, Tensor]:
    """Canonical tensors from a whole (all ranks' parts concatenated) Megatron parameter: unfused, unpadded."""
    pieces = unfuse(gathered, local.fused_split) if local.fused_split else [gathered]
    full = {}
    for spec, piece in zip(local.specs, pieces, strict=True):
        full[spec.name] = piece[: spec.shape[0]] if spec.kind in VOCABULARY_KINDS else piece
        if tuple(full[spec.name].shape) != spec.shape:
            raise RuntimeError(f"{spec.name}: expected shape {spec.shape}, found {tuple(full[spec.name].shape)}")
    return full


def fuse(pieces: list[Tensor], split: tuple[int, ...]) -> Tensor:
    """Query, key (and value) `[rows, H]` interleaved by query group, as Megatron's linear_qkv."""
    grouped = [piece.unflatten(0, (-1, rows)) for piece, rows in zip(pieces, split, strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def unfuse(fused: Tensor, split: tuple[int, ...]) -> list[Tensor]:
    """The inverse of `fuse`."""
    return [piece.flatten(0, 1) for piece in fused.unflatten(0, (-1, sum(split))).split(split, dim=1)]
