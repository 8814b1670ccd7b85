"""What a rank sends and receives in a step, counted from the recipe. docs/use/plan.md has the formulas.

Bytes are what passes through the rank's link in the busier direction, as `simulate` counts them, mean over the ranks of
a pipeline stage. Left out is what no link notices: losses, norms, and gradients of scalars.

Shapes: N tokens of a micro-batch on this rank, t tensor-parallel, c context-parallel ranks, D data × context, w bytes
per element.
"""

from __future__ import annotations

from dataclasses import dataclass

from bov_megatron.recipe import memory
from bov_megatron.recipe.fields import Recipe
from bov_megatron.recipe.parameters import parameter_specs


@dataclass(frozen=True)
class Messages:
    """All collectives of a kind in a group during a step."""

    kind: str
    """`all_reduce`, `all_gather`, `reduce_scatter`, `all_to_all`, `send` or `recv`."""
    group: str
    """`tensor`, `context`, `data` (with context) or `pipeline`."""
    group_size: int
    span: int
    """Consecutive ranks within which the group lies."""
    bytes: int


def traffic_of_stage(recipe: Recipe, layers: list[list[range]], data_parallel_size: int, stage: int) -> list[Messages]:
    """Messages of one rank of pipeline stage `stage`, DeepSpeed's excepted.

    Args:
        layers: by stage and model chunk, from `pipeline.layers_of_chunks`.
    """
    if recipe.engine == "deepspeed":
        return []
    p, train = recipe.parallel, recipe.train
    t, c = p.tensor_model_parallel_size, p.context_parallel_size
    sizes = {"tensor": (t, t), "context": (c, t * c), "data": (data_parallel_size * c, t * c * data_parallel_size)}
    sizes["pipeline"] = p.pipeline_model_parallel_size, sizes["data"][1] * p.pipeline_model_parallel_size
    micro_batches = train.global_batch_size // train.micro_batch_size // data_parallel_size
    found: dict[tuple[str, str], float] = {}

    def add(kind: str, group: str, size: float) -> None:
        if sizes[group][0] > 1:
            found[kind, group] = found.get((kind, group), 0) + size

    for chunk in layers[stage]:
        for kind, group, size in _of_chunk(recipe, chunk):
            add(kind, group, micro_batches * size)
    for kind, size in _of_pipeline(recipe, stage):
        add(kind, "pipeline", micro_batches * size)
    for kind, group, size in _of_update(recipe, layers[stage], data_parallel_size, stage):
        add(kind, group, size)
    return [Messages(kind, group, *sizes[group], round(size)) for (kind, group), size in found.items() if size]


def _of_chunk(recipe: Recipe, chunk: range):
    """(kind, group, bytes) of a micro-batch's messages within a model chunk."""
    m, p, w = recipe.model, recipe.parallel, memory.weight_bytes(recipe)
    t, c = p.tensor_model_parallel_size, p.context_parallel_size
    tokens, kv = memory.tokens(recipe), memory.kv_width(recipe) // t
    part = tokens * m.hidden_size * w * (t - 1) / t  # of a residual stream, what other tensor-parallel ranks have
    recomputed = memory.recomputed_layers(recipe, len(chunk))
    for number, layer in enumerate(chunk):
        facts, again = m.facts_of(layer), number < recomputed
        if p.sequence_parallel:  # four products: gathered before, reduce-scattered behind; and backward
            projections = (1 + facts.projects) if facts.separate_projection else 0
            yield "all_gather", "tensor", part * (6 + 2 * again + projections * (2 + again))
            yield "reduce_scatter", "tensor", part * (4 + 2 * again + projections)
        else:
            projections = (1 + facts.projects) if facts.separate_projection else 0
            yield "all_reduce", "tensor", 2 * part * (4 + 2 * again + projections)
        passes = 2 if again or p.recompute == "selective" else 1
        yield "all_gather", "context", passes * 2 * kv * tokens * w * (c - 1)
        yield "reduce_scatter", "context", 2 * kv * tokens * w * (c - 1)
        shared = m.value.table == "shared"
        if facts.has_table and (not shared or layer == m.layers_from_source()[0]):
            for kind, elements in _of_lookup(recipe, again and not shared):
                yield kind, "tensor", elements * w
    if 0 in chunk:
        yield "all_reduce", "tensor", 2 * part  # the embedding's rows
        if p.sequence_parallel:
            yield "all_gather", "tensor", part  # the gradient of its chunks
    if m.num_layers - 1 in chunk:
        yield "all_gather", "tensor", 2 * 4 * tokens * (t - 1)  # two numbers per token
        if p.sequence_parallel:
            yield "all_gather", "tensor", 2 * part
            yield "reduce_scatter", "tensor", part
        else:
            yield "all_reduce", "tensor", 2 * part


def _of_lookup(recipe: Recipe, again: bool):
    """(kind, elements) of a micro-batch's lookups in one table, and of their gradients."""
    value, t = recipe.model.value, recipe.parallel.tensor_model_parallel_size
    tokens, width = memory.tokens(recipe), memory.kv_width(recipe)
    if value.rows_sent_ahead(t):
        rows = min(tokens, recipe.model.vocab_size)
        yield "all_to_all", 2 * rows * width / t * (t - 1) / t
    elif value.table_partition == "vocab":
        yield "reduce_scatter", (1 + again) * tokens * width * (t - 1) / t
        yield "all_gather", tokens * width * (t - 1) / t


def _of_pipeline(recipe: Recipe, stage: int):
    """(kind, bytes) of a micro-batch's messages to and from other stages."""
    p = recipe.parallel
    virtual, last = p.virtual_pipeline_model_parallel_size, p.pipeline_model_parallel_size - 1
    before, behind = virtual - (stage == 0), virtual - (stage == last)  # chunks that have a neighbour there
    size = memory.residual(recipe)
    yield "send", (before + behind) * size
    yield "recv", (before + behind) * size


def _of_update(recipe: Recipe, chunks: list[range], data_parallel_size: int, stage: int):
    """(kind, group, bytes) of reducing gradients, orthogonalising and gathering weights."""
    p, w = recipe.parallel, memory.weight_bytes(recipe)
    t, ranks = p.tensor_model_parallel_size, data_parallel_size * p.context_parallel_size
    others = (ranks - 1) / ranks
    muon = recipe.optimizer.name == "muon"
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size // data_parallel_size
    tokens_of_step = micro_batches * memory.tokens(recipe)
    for spec in parameter_specs(recipe.model):
        if not memory.is_on_stage(spec, stage, chunks, recipe):
            continue
        size, whole = memory.rank_size(recipe, spec), spec.kind == "matrix" and muon
        sharded = p.use_distributed_optimizer
        if memory.is_on_host(recipe, spec):  # rows to whom read them, and their gradients back
            read = min(tokens_of_step / recipe.model.vocab_size, 1)
            yield "all_to_all", "data", (w * sharded + memory.MAIN_BYTES) * size * read * others
            continue
        if sharded:
            yield "reduce_scatter", "data", memory.MAIN_BYTES * size * others
            yield "all_to_all", "data", (memory.MAIN_BYTES + w * whole) * size / ranks * others  # to owners, and back
            yield "all_gather", "data", w * size * others
        else:
            yield "all_reduce", "data", 2 * memory.MAIN_BYTES * size * others
        if whole:  # the direction in bf16 to the tensor-parallel rank that orthogonalises, the update in fp32 back
            yield "all_to_all", "tensor", 6 * size / (ranks if sharded else 1) * (t - 1) / t
