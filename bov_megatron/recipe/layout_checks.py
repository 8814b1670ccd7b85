"""Checks of a recipe's layout over ranks and of its engine; the others are in checks.py."""

from __future__ import annotations

import math

from bov_megatron.errors import RecipeError
from bov_megatron.recipe.fields import ModelConfig, ParallelConfig, Recipe
from bov_megatron.recipe.limits import divides, divisors
from bov_megatron.recipe.pipeline import chunk_sizes


def check_layout(recipe: Recipe) -> None:
    """Raise RecipeError at the first field that cannot work at any world size."""
    _check_overlap(recipe.parallel)
    _check_tensor_parallel(recipe.model, recipe.parallel)
    _check_pipeline(recipe.model, recipe.parallel)
    _check_sequence_split(recipe.model, recipe.parallel)
    _check_recomputation(recipe)
    _check_engine(recipe)


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Number of data-parallel ranks when the recipe runs on `world_size` ranks.

    Raises RecipeError where `world_size` is no multiple of a model copy's ranks or the batch does not divide.
    """
    p, train = recipe.parallel, recipe.train
    model_parallel = p.model_parallel_size
    if world_size < 1 or world_size % model_parallel:
        raise RecipeError(
            f"world size {world_size} is not a multiple of {model_parallel} (tensor {p.tensor_model_parallel_size} × "
            f"pipeline {p.pipeline_model_parallel_size} × context {p.context_parallel_size}); start a multiple of "
            f"{model_parallel} ranks, or change parallel.tensor_model_parallel_size, pipeline_model_parallel_size or "
            "context_parallel_size"
        )
    data_parallel = world_size // model_parallel
    micro_batches = micro_batches_per_rank(train.global_batch_size, train.micro_batch_size, data_parallel)
    if p.virtual_pipeline_model_parallel_size > 1 and micro_batches % p.pipeline_model_parallel_size:
        raise RecipeError(
            f"an interleaved pipeline (parallel.virtual_pipeline_model_parallel_size="
            f"{p.virtual_pipeline_model_parallel_size}) takes micro-batches in groups of "
            f"parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size}, but a step has {micro_batches} "
            "on each data-parallel rank; change train.micro_batch_size or train.global_batch_size, or don't interleave"
        )
    return data_parallel


def micro_batches_per_rank(global_batch_size: int, micro_batch_size: int, data_parallel_size: int) -> int:
    """Micro-batches per step on each data-parallel rank. Raises RecipeError where the batch does not divide."""
    per_pass = micro_batch_size * data_parallel_size
    if global_batch_size % per_pass:
        fitting = [m for m in divisors(global_batch_size) if global_batch_size % (m * data_parallel_size) == 0]
        remedy = (
            f"train.micro_batch_size can be {', '.join(map(str, fitting))}"
            if fitting
            else f"train.global_batch_size must be a multiple of {data_parallel_size}"
        )
        raise RecipeError(
            f"train.global_batch_size={global_batch_size} is not a multiple of train.micro_batch_size="
            f"{micro_batch_size} × {data_parallel_size} data-parallel ranks = {per_pass}; {remedy}"
        )
    return global_batch_size // per_pass


def parts_of_data(recipe: Recipe, world_size: int, ranks_per_node: int) -> int:
    """`data.num_canonical_nodes` with which a node's data-parallel ranks read one part of the data alone; fewer where
    the batch is no multiple of the nodes."""
    p = recipe.parallel
    ranks_per_copy = p.tensor_model_parallel_size * p.context_parallel_size  # of a stage; stages come last
    data_ranks_per_node = max(1, ranks_per_node // ranks_per_copy)
    nodes = -(-data_parallel_size(recipe, world_size) // data_ranks_per_node)
    return math.gcd(nodes, recipe.train.global_batch_size)


def _check_overlap(p: ParallelConfig) -> None:
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        raise RecipeError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true: replicated weights are "
            "not gathered; set one or the other"
        )


def _check_tensor_parallel(m: ModelConfig, p: ParallelConfig) -> None:
    tp = ("parallel.tensor_model_parallel_size", p.tensor_model_parallel_size)
    divides(("model.num_attention_heads", m.num_attention_heads), tp, "each rank takes equally many heads")
    if m.kv_heads < p.tensor_model_parallel_size:
        _check_shared_groups(m, p)
    else:
        divides(("model.num_query_groups", m.kv_heads), tp, "each rank takes equally many key/value heads")
    divides(("model.ffn_hidden_size", m.ffn_size), tp, "each rank takes an equal share of the feed-forward width")


def _check_shared_groups(m: ModelConfig, p: ParallelConfig) -> None:
    """With fewer query groups than tensor-parallel ranks, consecutive ranks share a group."""
    tp = ("parallel.tensor_model_parallel_size", p.tensor_model_parallel_size)
    divides(tp, ("model.num_query_groups", m.kv_heads), "equally many ranks share each key/value head")
    divides(("model.num_query_groups × model.head_dim", m.kv_dim), tp, "ranks store equal shares of key/value heads")
    less = f"model.num_query_groups={m.kv_heads} is less than {tp[0]}={tp[1]}"
    if m.value.facts.has_table and m.value.table_partition == "head":
        raise RecipeError(f"{less}: a rank's table would be less than a head; use model.value.table_partition=vocab")
    if m.value.facts.has_table and m.value.lookup == "reduce_scatter":
        raise RecipeError(
            f"{less}: model.value.lookup=reduce_scatter gives a rank less than a head; use model.value.lookup=distinct"
        )
    if m.value.facts.gated:
        raise RecipeError(f"{less}: {m.value.source}'s gates, one a group, do not divide; use fewer ranks")


def _check_pipeline(m: ModelConfig, p: ParallelConfig) -> None:
    stages, virtual = p.pipeline_model_parallel_size, p.virtual_pipeline_model_parallel_size
    if virtual > 1 and stages == 1:
        raise RecipeError(
            f"parallel.virtual_pipeline_model_parallel_size={virtual} needs parallel.pipeline_model_parallel_size > 1, "
            "found 1: it splits each pipeline stage; set it to 1"
        )
    name, part = "parallel.pipeline_model_parallel_size", "stage"
    if virtual > 1:
        name, part = f"{name} × parallel.virtual_pipeline_model_parallel_size", "model chunk"
    if p.pipeline_layers is not None:
        _check_pipeline_layers(m, p, p.pipeline_layers)
    elif p.pipeline_balance == "layers":
        why = f"each {part} takes equally many layers, unless parallel.pipeline_balance=time or memory"
        divides(("model.num_layers", m.num_layers), (name, stages * virtual), why)
    else:
        _check_balance(m, p)
    if stages == 1:
        return
    use_one = f"parallel.pipeline_model_parallel_size={stages}: use 1"
    if m.value.facts.reads in ("first_layer", "embedding"):
        what = "layer 0's values" if m.value.facts.reads == "first_layer" else "the token embedding"
        raise RecipeError(
            f"model.value.source={m.value.source} reads {what}, which only the first pipeline stage has, and {use_one} "
            "(or a source that needs token ids only, such as bank)"
        )
    if m.value.table == "shared" and m.value.facts.has_table:
        raise RecipeError(
            f"model.value.table=shared would put copies of one table on several stages whose gradients nobody sums, "
            f"and {use_one} (or model.value.table=per_layer)"
        )


def _check_pipeline_layers(m: ModelConfig, p: ParallelConfig, layers: list[int]) -> None:
    setting, chunks = f"parallel.pipeline_layers={layers}", p.pipeline_model_parallel_size
    chunks *= p.virtual_pipeline_model_parallel_size
    if p.pipeline_balance != "layers":
        raise RecipeError(f"{setting} and parallel.pipeline_balance={p.pipeline_balance} are both set; set one of them")
    if len(layers) != chunks:
        raise RecipeError(
            f"{setting}: needs {chunks} numbers, found {len(layers)} (parallel.pipeline_model_parallel_size="
            f"{p.pipeline_model_parallel_size} × parallel.virtual_pipeline_model_parallel_size="
            f"{p.virtual_pipeline_model_parallel_size})"
        )
    if min(layers) < 1 or sum(layers) != m.num_layers:
        raise RecipeError(
            f"{setting}: must be at least 1 each and add up to model.num_layers={m.num_layers}, found {sum(layers)}"
        )


def _check_balance(m: ModelConfig, p: ParallelConfig) -> None:
    chunks = p.pipeline_model_parallel_size * p.virtual_pipeline_model_parallel_size
    if m.num_layers < chunks:
        raise RecipeError(
            f"model.num_layers={m.num_layers} is less than {chunks} pipeline stages × model chunks; each needs one: "
            "lower parallel.pipeline_model_parallel_size or parallel.virtual_pipeline_model_parallel_size"
        )
    if p.pipeline_balance == "memory" and p.virtual_pipeline_model_parallel_size > 1:
        raise RecipeError(
            "parallel.pipeline_balance=memory cannot be used with parallel.virtual_pipeline_model_parallel_size="
            f"{p.virtual_pipeline_model_parallel_size}: model chunks of a stage add up; give parallel.pipeline_layers"
        )


def _check_sequence_split(m: ModelConfig, p: ParallelConfig) -> None:
    tp, cp = p.tensor_model_parallel_size, p.context_parallel_size
    length = ("model.sequence_length", m.sequence_length)
    if p.sequence_parallel:
        if tp == 1:
            raise RecipeError(
                "parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1, found 1: it splits "
                "the sequence among tensor-parallel ranks; set parallel.sequence_parallel=false"
            )
        divides(length, ("parallel.tensor_model_parallel_size", tp), "parallel.sequence_parallel splits the sequence")
    if cp == 1:
        return
    if m.sequence_length % (2 * cp):
        raise RecipeError(
            f"model.sequence_length={m.sequence_length} is not a multiple of 2 × parallel.context_parallel_size="
            f"{cp}; each rank takes two chunks. Use parallel.context_parallel_size=1"
        )
    if p.sequence_parallel and m.sequence_length // cp % tp:
        raise RecipeError(
            f"model.sequence_length={m.sequence_length} / parallel.context_parallel_size={cp} is not divisible by "
            f"parallel.tensor_model_parallel_size={tp}: parallel.sequence_parallel splits each rank's part again; set "
            "parallel.sequence_parallel=false, or use fewer ranks"
        )


def _check_recomputation(recipe: Recipe) -> None:
    p = recipe.parallel
    if p.recompute_num_layers is None:
        return
    setting = f"parallel.recompute_num_layers={p.recompute_num_layers}"
    if p.recompute != "full":
        raise RecipeError(
            f"{setting} needs parallel.recompute=full, found {p.recompute!r}: it says how many layers to recompute; "
            "set parallel.recompute=full, or leave it null"
        )
    largest = max(chunk_sizes(recipe))
    if not 1 <= p.recompute_num_layers <= largest:
        raise RecipeError(
            f"{setting}: must be between 1 and {largest}, the layers of a pipeline stage (interleaved: "
            "of a model chunk); null recomputes all of them"
        )


def _check_engine(recipe: Recipe) -> None:
    if recipe.engine != "deepspeed":
        return
    p = recipe.parallel
    if recipe.optimizer.name == "muon":
        raise RecipeError(
            "engine=deepspeed runs AdamW only, found optimizer.name=muon: DeepSpeed's Muon is another algorithm than "
            "this one, which needs whole matrices; use optimizer.name=adamw, or engine=megatron"
        )
    for name in ("pipeline_model_parallel_size", "context_parallel_size"):
        if getattr(p, name) > 1:
            raise RecipeError(
                f"engine=deepspeed has data and tensor parallelism only, found parallel.{name}={getattr(p, name)}; "
                "set it to 1, or use engine=megatron"
            )
    if recipe.deepspeed.zero_stage == 3 and p.tensor_model_parallel_size > 1:
        raise RecipeError(
            f"deepspeed.zero_stage=3 shards weights over data-parallel ranks alone, found "
            f"parallel.tensor_model_parallel_size={p.tensor_model_parallel_size}; set it to 1, or use "
            "deepspeed.zero_stage=2"
        )
    if recipe.model.value.table_memory == "host":
        raise RecipeError(
            "engine=deepspeed keeps tables where it keeps all weights, found model.value.table_memory=host; use "
            "deepspeed.offload_optimizer=cpu for their optimizer state, or engine=megatron"
        )
    if p.overlap_param_gather:
        raise RecipeError(
            "engine=deepspeed orders its own traffic, found parallel.overlap_param_gather=true; set it to false, or "
            "use engine=megatron"
        )
    if not p.use_distributed_optimizer:
        raise RecipeError(
            "engine=deepspeed always shards the optimizer's state, found parallel.use_distributed_optimizer=false; "
            "leave it true, or use engine=megatron"
        )
