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
MUON_ELEMENTS = 2**25
"""Most elements of the matrices that Muon updates together, unless it is one."""
SPLIT_KINDS = frozenset({"matrix", "embedding", "output", "table"})
"""Kinds that tensor parallelism splits; the others are replicated on every rank."""


def memory_by_stage(recipe: Recipe, layers: list[list[range]], data_parallel_size: int) -> list[dict[str, int]]:
    """Bytes on one rank of each pipeline stage at the peak of a step.

    Keys: `weights`, `gradients`, `optimizer` (tables excluded), `tables` (all three for them; 0 where they are in host
    memory), `activations` (of all micro-batches in flight), `logits` (and what the loss needs beside them) and
    `buffers` (of the update). The last three are those of the fullest moment: see `_fullest_moment`.

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
            if spec.kind == "table" and is_on_stage(spec, stage, chunks, recipe)
        )
        for stage, chunks in enumerate(layers)
    ]


def stage_bytes(recipe: Recipe, data_parallel_size: int) -> Callable[[int, int, int], int]:
    """`bytes(stage, first, stop)`: the sum of `memory_by_stage` for a stage with layers `[first, stop)`, fast enough
    to call for every split. Not for interleaved pipelines."""
    states, first_stage, last_stage = [0] * recipe.model.num_layers, 0, 0
    for spec in parameter_specs(recipe.model):
        size = 0 if is_on_host(recipe, spec) else sum(_state_bytes(recipe, spec, data_parallel_size).values())
        if spec.layer is not None:
            states[spec.layer] += size
        elif spec.kind == "output":
            last_stage += size
        else:
            first_stage += size
    kept = [_kept_by_layer(recipe, layer) for layer in range(recipe.model.num_layers)]

    buffers = _update_buffers(recipe, data_parallel_size)

    def count(stage: int, first: int, stop: int) -> int:
        is_last = stop == len(states)
        ends = (first_stage if first == 0 else 0) + (last_stage if is_last else 0)
        moment = _fullest_moment(recipe, stage, [kept[first:stop]], is_last, buffers)
        return ends + sum(states[first:stop]) + sum(moment.values())

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
    sizes = sum(rank_size(recipe, spec) for spec in parameter_specs(recipe.model))
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
    memory = dict.fromkeys(("weights", "gradients", "optimizer", "tables"), 0)
    for spec in parameter_specs(recipe.model):
        if not is_on_stage(spec, stage, chunks, recipe) or is_on_host(recipe, spec):
            continue
        for part, count in _state_bytes(recipe, spec, data_parallel_size).items():
            memory["tables" if spec.kind == "table" else part] += count
    memory["weights"] += _gathered_weights(recipe)
    kept = [[_kept_by_layer(recipe, layer) for layer in layers] for layers in chunks]
    is_last = stage == recipe.parallel.pipeline_model_parallel_size - 1
    return memory | _fullest_moment(recipe, stage, kept, is_last, _update_buffers(recipe, data_parallel_size))


def _state_bytes(recipe: Recipe, spec: ParameterSpec, data_parallel_size: int) -> dict[str, int]:
    """Bytes of one parameter's `weights`, `gradients` and `optimizer` state on a rank that holds part of it."""
    size, shards = rank_size(recipe, spec), 1
    if recipe.engine == "deepspeed":
        return _zero_bytes(recipe, size, data_parallel_size)
    if recipe.parallel.use_distributed_optimizer:
        shards = data_parallel_size * recipe.parallel.context_parallel_size
    return {
        "weights": size * weight_bytes(recipe),
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
    whole = sum(rank_size(recipe, spec) for spec in parameter_specs(recipe.model))
    return min(ZERO3_LIVE_ELEMENTS, whole) * weight_bytes(recipe)


def rank_size(recipe: Recipe, spec: ParameterSpec) -> int:
    """Elements of a parameter on a tensor-parallel rank, padding rows included."""
    ranks = recipe.parallel.tensor_model_parallel_size if spec.kind in SPLIT_KINDS else 1
    return _stored_size(recipe, spec) // ranks


def is_on_stage(spec: ParameterSpec, stage: int, chunks: list[range], recipe: Recipe) -> bool:
    if spec.layer is not None:
        return any(spec.layer in layers for layers in chunks)
    if spec.kind == "output":
        return stage == recipe.parallel.pipeline_model_parallel_size - 1
    return stage == 0  # embedding, smear, and a shared table, which needs a single stage


def is_on_host(recipe: Recipe, spec: ParameterSpec) -> bool:
    return spec.kind == "table" and recipe.model.value.table_memory == "host"


def _fullest_moment(
    recipe: Recipe, stage: int, chunks: list[list[tuple[int, int]]], is_last: bool, buffers: int
) -> dict[str, int]:
    """`activations`, `logits` and `buffers` at the moment of a step at which they are largest together: when the last
    micro-batch that a 1F1B schedule, interleaved or not, has in flight has its loss; when its backward pass begins
    or recomputes a layer; or during the update, when there are no activations.

    Args:
        chunks: `_kept_by_layer` of each layer of each model chunk.
        buffers: `_update_buffers`.
    """
    kept = [
        _chunk_activations(recipe, stage == 0 and number == 0, not is_last or number < len(chunks) - 1, layers)
        for number, layers in enumerate(chunks)
    ]
    in_flight = _chunks_in_flight(recipe, stage)
    last = in_flight[-1]
    activations = sum(kept[chunk][0] for chunk in in_flight)
    while_recomputing = max(0, kept[last][1] - kept[last][0])
    moments = [
        (activations, _logits(recipe) if is_last else 0, 0),
        (activations + while_recomputing + _layer_gradients(recipe), 0, 0),
        (0, 0, buffers),
    ]
    return dict(zip(("activations", "logits", "buffers"), max(moments, key=sum), strict=True))


def _layer_gradients(recipe: Recipe) -> int:
    """Bytes of the gradients with respect to a residual, a block's output and the feed-forward layer's inside."""
    inside = tokens(recipe) * recipe.model.ffn_size * weight_bytes(recipe)
    return 2 * residual(recipe) + inside // recipe.parallel.tensor_model_parallel_size


def _update_buffers(recipe: Recipe, data_parallel_size: int) -> int:
    """Bytes of Muon's directions and updates of one bucket, and of weights that arrive in the background."""
    if recipe.engine == "deepspeed":
        return 0
    parallel, specs = recipe.parallel, parameter_specs(recipe.model)
    ranks = data_parallel_size * parallel.context_parallel_size if parallel.use_distributed_optimizer else 1
    matrices = [rank_size(recipe, spec) for spec in specs if spec.kind == "matrix"]
    owned = min(max(sum(matrices) // ranks, max(matrices)), MUON_ELEMENTS)
    buffers = 10 * owned if recipe.optimizer.name == "muon" else 0  # the direction in fp32 and bf16, the update in fp32
    if parallel.overlap_param_gather and ranks > 1:
        stages = parallel.pipeline_model_parallel_size
        on_device = sum(rank_size(recipe, spec) for spec in specs if not is_on_host(recipe, spec))
        buffers = max(buffers, on_device // stages * weight_bytes(recipe))
    return buffers


def _chunks_in_flight(recipe: Recipe, stage: int) -> list[int]:
    """Model chunk of each forward pass that Megatron's schedule starts on this stage before the first backward pass."""
    parallel, train = recipe.parallel, recipe.train
    stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
    ahead = stages - stage - 1 if virtual == 1 else 2 * (stages - stage - 1) + (virtual - 1) * stages
    total = train.global_batch_size // train.micro_batch_size * virtual
    return [number // stages % virtual for number in range(min(ahead + 1, total))]


def _chunk_activations(recipe: Recipe, embeds: bool, sends: bool, layers: list[tuple[int, int]]) -> tuple[int, int]:
    """Bytes of one micro-batch in one model chunk: kept after forward, and at the peak of recomputing a layer."""
    recomputed = recomputed_layers(recipe, len(layers))
    inputs = sum(before for _, before in layers[:recomputed]) + _carried(recipe)
    if sends:
        inputs += residual(recipe)  # Megatron keeps what it has sent to the next stage
    if embeds:
        inputs += 3 * tokens(recipe) * recipe.model.hidden_size * weight_bytes(recipe)  # embedded, normalised, smeared
    inside = [activations for activations, _ in layers]
    # Backward has freed what later layers keep by the time earlier layers are recomputed.
    return inputs + sum(inside[recomputed:]), inputs + max(inside[:recomputed], default=0)


def recomputed_layers(recipe: Recipe, layers: int) -> int:
    """How many of a model chunk's layers, its first ones, are recomputed as a whole."""
    parallel = recipe.parallel
    if parallel.recompute != "full":
        return 0
    return layers if parallel.recompute_num_layers is None else min(parallel.recompute_num_layers, layers)


def _kept_by_layer(recipe: Recipe, layer: int) -> tuple[int, int]:
    """Bytes of one micro-batch that a layer keeps for the backward pass: without, and with recomputation."""
    m, before = recipe.model, residual(recipe)
    if (
        m.value.rows_sent_ahead(recipe.parallel.tensor_model_parallel_size)
        and layer in m.layers_from_source()
        and m.value.table == "per_layer"
    ):
        rows = min(tokens(recipe), recipe.padded_vocab_size())  # upper bound of the distinct ids
        before += rows * kv_width(recipe) // recipe.parallel.tensor_model_parallel_size * weight_bytes(recipe)
    return layer_activations(recipe, layer), before


def layer_activations(recipe: Recipe, layer: int) -> int:
    """Bytes that one layer keeps for the backward pass of one micro-batch, without recomputation of the layer.

    Method of arXiv 2205.05198, for this decoder and attention that stores no score matrix.
    """
    m, tensor = recipe.model, recipe.parallel.tensor_model_parallel_size
    query, kv = m.query_dim, kv_width(recipe)
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
    return inputs * residual(recipe) + tokens(recipe) * per_token


def _source_activations(recipe: Recipe, layer: int) -> int:
    """Elements per token that a value source keeps besides the values it returns, over all tensor-parallel ranks."""
    facts = recipe.model.facts_of(layer)
    learned = recipe.model.value.coefficient == "learned"
    kept = int(facts.gated)  # the looked-up row that the gate multiplies
    if learned:  # multiplying by a constant and adding keep nothing
        kept += facts.coefficients  # the factor of each coefficient
        kept -= facts.reads == "first_layer"  # layer 0 keeps it already
    if facts.fused_projection and recipe.train.compile is not False:
        # The compiled rotation keeps q and k as they are in the fused projection, and so the projected values beside
        # them, unless those are kept anyway: as attention's values, or as a coefficient's factor.
        are_values = facts.reads is None and not facts.coefficients and recipe.parallel.context_parallel_size == 1
        kept += not (are_values or (learned and facts.coefficients))
    return kept * kv_width(recipe)


def kv_width(recipe: Recipe) -> int:
    """Value elements per token over all tensor-parallel ranks; ranks that share a query group count it each."""
    m = recipe.model
    return max(m.kv_heads, recipe.parallel.tensor_model_parallel_size) * m.kv_channels


def _logits(recipe: Recipe) -> int:
    """Bytes of the logits, over which their gradient is written, of what the backward pass makes of it, and of the last
    norm's input and output; uncompiled, of four fp32 tensors of a chunk of logits too."""
    rows = recipe.padded_vocab_size() // recipe.parallel.tensor_model_parallel_size
    logits, width = tokens(recipe) * rows, recipe.model.hidden_size
    hidden = tokens(recipe) * width * (2 if recipe.parallel.sequence_parallel else 1)  # with its gathered input
    chunk = min(logits, LOSS_CHUNK_ELEMENTS) if recipe.train.compile is False else 0
    return (logits + hidden + rows * width) * weight_bytes(recipe) + 2 * residual(recipe) + 4 * MAIN_BYTES * chunk


def _carried(recipe: Recipe) -> int:
    """Bytes per micro-batch of the tensor passed from layer to layer with the hidden states: x0, token ids or a shared
    table's values; with a ticket, of each token's index among the distinct ids."""
    m = recipe.model
    if m.value.facts.reads == "embedding":
        return residual(recipe)
    if not m.value.facts.has_table:
        return 0
    if m.value.table == "per_layer" or m.value.rows_sent_ahead(recipe.parallel.tensor_model_parallel_size):
        return tokens(recipe) * 8
    return tokens(recipe) * kv_width(recipe) // recipe.parallel.tensor_model_parallel_size * weight_bytes(recipe)


def residual(recipe: Recipe) -> int:
    """Bytes of one `[s, b, d]` tensor outside the tensor-parallel regions."""
    split = recipe.parallel.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1
    return tokens(recipe) * recipe.model.hidden_size * weight_bytes(recipe) // split


def tokens(recipe: Recipe) -> int:
    return recipe.train.micro_batch_size * recipe.model.sequence_length // recipe.parallel.context_parallel_size
