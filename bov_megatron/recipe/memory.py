"""Memory per rank and size of a checkpoint, estimated from the recipe. docs/use/plan.md has the formulas."""

from __future__ import annotations

from collections.abc import Callable

from bov_megatron.recipe.fields import Recipe
from bov_megatron.recipe.parameters import VOCABULARY_KINDS, ParameterSpec, parameter_specs

MAIN_BYTES = 4
"""fp32: main weights, main gradients, momentum and Adam's moments."""
ZERO_BYTES = 3 * MAIN_BYTES
"""ZeRO's main weights, separate even from fp32 weights, and Adam's moments."""
ZERO3_LIVE_ELEMENTS = 2**28
"""Weight elements that ZeRO 3 holds gathered at a time, unless a single module needs more."""
LOSS_CHUNK_ELEMENTS = 2**24
"""Logits that the loss holds in fp32 at a time on a GPU."""
SPLIT_KINDS = frozenset({"matrix", "embedding", "output", "table"})
"""Kinds that tensor parallelism splits; the others are replicated on every rank."""


def memory_by_stage(recipe: Recipe, layers: list[list[range]], data_parallel_size: int) -> list[dict[str, int]]:
    """Bytes on one rank of each pipeline stage at the peak of a step.

    Keys: `weights`, `gradients`, `optimizer` (tables excluded), `tables` (all three for them; 0 where they are in host
    memory), `activations` (kept for backward, of all micro-batches in flight) and `logits`.

    Args:
        layers: by stage and model chunk, from `pipeline.layers_of_chunks`.
    """
    return [_stage_memory(recipe, stage, chunks, data_parallel_size) for stage, chunks in enumerate(layers)]


def host_memory_by_stage(recipe: Recipe, layers: list[list[range]], data_parallel_size: int) -> list[int]:
    """Bytes of host memory on one rank of each stage: value tables (weights, gradients and optimizer state), or
    ZeRO-Offload's optimizer."""
    if recipe.engine == "deepspeed":
        return [_offloaded(recipe, data_parallel_size)]
    if recipe.model.value.table_memory == "device":
        return [0] * recipe.parallel.pipeline_model_parallel_size
    return [
        sum(
            sum(_state_bytes(recipe, spec, data_parallel_size).values())
            for spec in parameter_specs(recipe.model)
            if spec.kind == "table" and _is_on_stage(spec, stage, chunks, recipe)
        )
        for stage, chunks in enumerate(layers)
    ]


def stage_bytes(recipe: Recipe, data_parallel_size: int) -> Callable[[int, int, int], int]:
    """`bytes(stage, first, stop)`: the sum of `memory_by_stage` for a stage with layers `[first, stop)`, fast enough
    to call for every split. Not for interleaved pipelines."""
    states, first_stage, last_stage = [0] * recipe.model.num_layers, 0, _logits(recipe)
    for spec in parameter_specs(recipe.model):
        size = 0 if _is_on_host(recipe, spec) else sum(_state_bytes(recipe, spec, data_parallel_size).values())
        if spec.layer is not None:
            states[spec.layer] += size
        elif spec.kind == "output":
            last_stage += size
        else:
            first_stage += size
    kept = [_kept_by_layer(recipe, layer) for layer in range(recipe.model.num_layers)]

    def count(stage: int, first: int, stop: int) -> int:
        ends = (first_stage if first == 0 else 0) + (last_stage if stop == len(states) else 0)
        return ends + sum(states[first:stop]) + _activations(recipe, stage, [kept[first:stop]])

    return count


def checkpoint_bytes(recipe: Recipe) -> int:
    """Bytes of one checkpoint: weights and optimizer state. The layout changes only the number of padding rows."""
    total = 0
    for spec in parameter_specs(recipe.model):
        size = _stored_size(recipe, spec)
        total += size * weight_bytes(recipe) + optimizer_bytes(recipe, spec, size)
    return total


def _offloaded(recipe: Recipe, data_parallel_size: int) -> int:
    """Bytes of ZeRO-Offload on one rank's host: optimizer state, gradients, and a copy of gradients or weights."""
    if recipe.deepspeed.offload_optimizer == "none":
        return 0
    copy = MAIN_BYTES if recipe.deepspeed.zero_stage == 3 else weight_bytes(recipe)  # of gradients, or of weights
    sizes = sum(_rank_size(recipe, spec) for spec in parameter_specs(recipe.model))
    return -(-sizes // data_parallel_size) * (ZERO_BYTES + MAIN_BYTES + copy)


def weight_bytes(recipe: Recipe) -> int:
    """Bytes per element of weights and activations."""
    return 2 if recipe.train.precision == "bf16" else 4


def optimizer_bytes(recipe: Recipe, spec: ParameterSpec, size: int) -> int:
    """Optimizer bytes of `size` elements of a parameter: main weights (bf16 only), then under Muon momentum and one
    variance per row (or column, if there are more), under AdamW two moments."""
    main = MAIN_BYTES if recipe.train.precision == "bf16" else 0
    if spec.kind == "matrix" and recipe.optimizer.name == "muon":
        return size * (main + MAIN_BYTES) + max(spec.shape) * MAIN_BYTES
    return size * (main + 2 * MAIN_BYTES)


def _stored_size(recipe: Recipe, spec: ParameterSpec) -> int:
    """Elements as stored, padding rows included."""
    rows_added = recipe.padded_vocab_size() - recipe.model.vocab_size if spec.kind in VOCABULARY_KINDS else 0
    return spec.size + rows_added * spec.shape[-1]


def _stage_memory(recipe: Recipe, stage: int, chunks: list[range], data_parallel_size: int) -> dict[str, int]:
    memory = dict.fromkeys(("weights", "gradients", "optimizer", "tables", "activations", "logits"), 0)
    for spec in parameter_specs(recipe.model):
        if not _is_on_stage(spec, stage, chunks, recipe) or _is_on_host(recipe, spec):
            continue
        for part, count in _state_bytes(recipe, spec, data_parallel_size).items():
            memory["tables" if spec.kind == "table" else part] += count
    memory["weights"] += _gathered_weights(recipe)
    kept = [[_kept_by_layer(recipe, layer) for layer in layers] for layers in chunks]
    memory["activations"] = _activations(recipe, stage, kept)
    if stage == recipe.parallel.pipeline_model_parallel_size - 1:
        memory["logits"] = _logits(recipe)
    return memory


def _state_bytes(recipe: Recipe, spec: ParameterSpec, data_parallel_size: int) -> dict[str, int]:
    """Bytes of one parameter's `weights`, `gradients` and `optimizer` state on a rank that holds part of it."""
    size, shards = _rank_size(recipe, spec), 1
    if recipe.engine == "deepspeed":
        return _zero_bytes(recipe, size, data_parallel_size)
    if recipe.parallel.use_distributed_optimizer:
        shards = data_parallel_size * recipe.parallel.context_parallel_size
    arriving = recipe.parallel.overlap_param_gather and shards > 1 and not _is_on_host(recipe, spec)
    return {
        "weights": size * weight_bytes(recipe) * (2 if arriving else 1),
        "gradients": size * MAIN_BYTES,
        "optimizer": -(-optimizer_bytes(recipe, spec, size) // shards),
    }


def _zero_bytes(recipe: Recipe, size: int, data_parallel_size: int) -> dict[str, int]:
    """The same under ZeRO, whose stages 1 to 3 shard optimizer state, gradients and weights in turn."""
    zero, share = recipe.deepspeed, -(-size // data_parallel_size)
    offload = zero.offload_optimizer == "cpu"
    gradients = size if zero.zero_stage == 1 else share
    return {
        "weights": (share if zero.zero_stage == 3 else size) * weight_bytes(recipe),
        "gradients": 0 if zero.zero_stage == 3 and offload else gradients * MAIN_BYTES,
        "optimizer": 0 if offload else share * ZERO_BYTES,
    }


def _gathered_weights(recipe: Recipe) -> int:
    """Bytes of the weights that ZeRO 3 holds gathered during computation."""
    if recipe.engine != "deepspeed" or recipe.deepspeed.zero_stage != 3:
        return 0
    whole = sum(_rank_size(recipe, spec) for spec in parameter_specs(recipe.model))
    return min(ZERO3_LIVE_ELEMENTS, whole) * weight_bytes(recipe)


def _rank_size(recipe: Recipe, spec: ParameterSpec) -> int:
    """Elements of a parameter on a tensor-parallel rank, padding rows included."""
    ranks = recipe.parallel.tensor_model_parallel_size if spec.kind in SPLIT_KINDS else 1
    return _stored_size(recipe, spec) // ranks


def _is_on_stage(spec: ParameterSpec, stage: int, chunks: list[range], recipe: Recipe) -> bool:
    if spec.layer is not None:
        return any(spec.layer in layers for layers in chunks)
    if spec.kind == "output":
        return stage == recipe.parallel.pipeline_model_parallel_size - 1
    return stage == 0  # embedding, smear, and a shared table, which needs a single stage


def _is_on_host(recipe: Recipe, spec: ParameterSpec) -> bool:
    return spec.kind == "table" and recipe.model.value.table_memory == "host"


def _activations(recipe: Recipe, stage: int, chunks: list[list[tuple[int, int]]]) -> int:
    """Bytes kept for backward by all micro-batches that a 1F1B schedule, interleaved or not, has in flight.

    `chunks`: `_kept_by_layer` of each layer of each model chunk.
    """
    kept = [_chunk_activations(recipe, stage == 0 and number == 0, layers) for number, layers in enumerate(chunks)]
    in_flight = _chunks_in_flight(recipe, stage)
    last = in_flight[-1]
    while_recomputing = max(0, kept[last][1] - kept[last][0])
    return sum(kept[chunk][0] for chunk in in_flight) + while_recomputing


def _chunks_in_flight(recipe: Recipe, stage: int) -> list[int]:
    """Model chunk of each forward pass that Megatron's schedule starts on this stage before the first backward pass."""
    parallel, train = recipe.parallel, recipe.train
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    ahead = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    total = train.global_batch_size // train.micro_batch_size * virtual
    return [number // stages % virtual for number in range(min(ahead + 1, total))]


def _chunk_activations(recipe: Recipe, embeds: bool, layers: list[tuple[int, int]]) -> tuple[int, int]:
    """Bytes of one micro-batch in one model chunk: kept after forward, and at the peak of recomputing a layer."""
    parallel = recipe.parallel
    recomputed = 0
    if parallel.recompute == "full":
        recomputed = len(layers) if parallel.recompute_num_layers is None else parallel.recompute_num_layers
    inputs = sum(before for _, before in layers[:recomputed]) + _carried(recipe)
    if embeds:
        inputs += 3 * _tokens(recipe) * recipe.model.hidden_size * weight_bytes(recipe)  # embedded, normalised, smeared
    inside = [activations for activations, _ in layers]
    # Backward has freed what later layers keep by the time earlier layers are recomputed.
    return inputs + sum(inside[recomputed:]), inputs + max(inside[:recomputed], default=0)


def _kept_by_layer(recipe: Recipe, layer: int) -> tuple[int, int]:
    """Bytes of one micro-batch that a layer keeps for the backward pass: without, and with recomputation."""
    m, before = recipe.model, _residual(recipe)
    if (
        m.value.rows_sent_ahead(recipe.parallel.tensor_model_parallel_size)
        and layer in m.layers_from_source()
        and m.value.table == "per_layer"
    ):
        rows = min(_tokens(recipe), recipe.padded_vocab_size())  # upper bound of the distinct ids
        before += rows * _kv_width(recipe) // recipe.parallel.tensor_model_parallel_size * weight_bytes(recipe)
    return layer_activations(recipe, layer), before


def layer_activations(recipe: Recipe, layer: int) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch, without recomputation of the layer.

    Method of arXiv 2205.05198, for this decoder and attention that stores no score matrix.
    """
    m, tensor = recipe.model, recipe.parallel.tensor_model_parallel_size
    query, kv = m.query_dim, _kv_width(recipe)
    split = 2 * (query + kv)  # q and k: before the norm, and as attention's inputs
    split += kv + query  # v; attention's output, which its projection keeps
    split += 2 * m.ffn_size  # relu(W_1 x) and its square
    split += _source_activations(recipe, layer)
    context = recipe.parallel.context_parallel_size
    if context > 1:
        split += query  # attention's output once more: its two chunks are concatenated
        if recipe.parallel.recompute != "selective":
            split += 2 * kv * (context - 1)  # keys and values gathered from the other ranks
    logsumexp = 0 if recipe.parallel.recompute == "selective" else 4 * m.num_attention_heads // tensor
    per_token = split // tensor * weight_bytes(recipe) + logsumexp
    inputs = 4  # two residuals, two normalised inputs
    if m.facts_of(layer).reads == "embedding":
        inputs += 1  # the normalised embedding that is projected
    return inputs * _residual(recipe) + _tokens(recipe) * per_token


def _source_activations(recipe: Recipe, layer: int) -> int:
    """Elements per token that a value source keeps besides the values it returns, over all tensor-parallel ranks."""
    facts = recipe.model.facts_of(layer)
    kept = int(facts.gated)  # the looked-up row that the gate multiplies
    if recipe.model.value.coefficient == "learned":  # multiplying by a constant and adding keep nothing
        kept += facts.coefficients  # the factor of each coefficient
        kept -= facts.reads == "first_layer"  # layer 0 keeps it already
    return kept * _kv_width(recipe)


def _kv_width(recipe: Recipe) -> int:
    """Value elements per token over all tensor-parallel ranks; ranks that share a query group count it each."""
    m = recipe.model
    return max(m.kv_heads, recipe.parallel.tensor_model_parallel_size) * m.kv_channels


def _logits(recipe: Recipe) -> int:
    """Bytes of the logits, and of four fp32 tensors of a chunk of them."""
    logits = _tokens(recipe) * recipe.padded_vocab_size() // recipe.parallel.tensor_model_parallel_size
    return logits * weight_bytes(recipe) + 4 * MAIN_BYTES * min(logits, LOSS_CHUNK_ELEMENTS)


def _carried(recipe: Recipe) -> int:
    """Bytes per micro-batch of the tensor passed from layer to layer with the hidden states: x0, token ids or a shared
    table's values; with a ticket, of each token's index among the distinct ids."""
    m = recipe.model
    if m.value.facts.reads == "embedding":
        return _residual(recipe)
    if not m.value.facts.has_table:
        return 0
    if m.value.table == "per_layer" or m.value.rows_sent_ahead(recipe.parallel.tensor_model_parallel_size):
        return _tokens(recipe) * 8
    return _tokens(recipe) * _kv_width(recipe) // recipe.parallel.tensor_model_parallel_size * weight_bytes(recipe)


def _residual(recipe: Recipe) -> int:
    """Bytes of one `[s, b, d]` tensor outside the tensor-parallel regions."""
    split = recipe.parallel.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1
    return _tokens(recipe) * recipe.model.hidden_size * weight_bytes(recipe) // split


def _tokens(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.model.sequence_length // recipe.parallel.context_parallel_size
