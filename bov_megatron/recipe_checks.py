"""What a recipe must satisfy before anything is built. One function a topic; the first failure stops with a
RecipeError that names the field, the value found and the remedy. Imports nothing heavy.
"""

from __future__ import annotations

import string
import typing

from bov_megatron.parameters import SMEAR_CHANNELS
from bov_megatron.recipe import (
    SOURCES_READING_EMBEDDING,
    SOURCES_READING_FIRST_LAYER,
    SOURCES_WITH_TABLE,
    TARGET_LAYERS,
    VALUE_SOURCES,
    DataConfig,
    HealthConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    TrainConfig,
)
from bov_megatron.recipe_loading import RecipeError, nearest

COEFFICIENTS = ("learned", "fixed")
TABLES = ("per_layer", "shared")
TABLE_PARTITIONS = ("vocab", "head")
TABLE_MEMORIES = ("device", "host")
LOOKUPS = ("distinct", "reduce_scatter", "all_reduce", "all_to_all")
CORE_ATTENTIONS = ("auto", "sdpa", "flex", "megatron")
LINEAR_LAYERS = ("megatron", "transformer_engine")
PIPELINE_BALANCES = ("layers", "time", "memory")
RECOMPUTES = ("none", "selective", "full")
ENGINES = ("megatron", "deepspeed")
ZERO_STAGES = (1, 2, 3)
OFFLOADS = ("none", "cpu")
PRECISIONS = ("bf16", "fp32")
FP8_SCALINGS = ("none", "tensorwise", "blockwise", "mxfp8")
OPTIMIZERS = ("muon", "adamw")
SPIKE_POLICIES = ("warn", "skip", "rollback")
WANDB_MODES = ("offline", "online", "disabled")


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError at the first field that cannot work, whatever the world size."""
    _check_naming(recipe)
    _check_model_sizes(recipe.model)
    _check_value(recipe.model)
    _check_parallel_sizes(recipe.parallel)
    _check_tensor_parallel(recipe.model, recipe.parallel)
    _check_pipeline(recipe.model, recipe.parallel)
    _check_sequence_split(recipe.model, recipe.parallel)
    _check_recomputation(recipe)
    _check_engine(recipe)
    _check_train(recipe.train)
    _check_fp8(recipe)
    _check_optimizer(recipe.optimizer)
    _check_data(recipe.data, recipe.train.global_batch_size)
    _check_intervals(recipe)
    _check_health(recipe.health)
    _check_logging(recipe.logging)
    _check_duration(recipe)


def check_world_size(recipe: Recipe, world_size: int) -> int:
    """Data-parallel ranks when the recipe runs on `world_size` ranks.

    Raises RecipeError where the world cannot hold whole model copies or the batch does not divide.
    """
    p, train = recipe.parallel, recipe.train
    model_parallel = p.model_parallel_size
    if world_size < 1 or world_size % model_parallel:
        raise RecipeError(
            f"world size {world_size} is not a multiple of {model_parallel} (tensor {p.tensor_model_parallel_size} × "
            f"pipeline {p.pipeline_model_parallel_size} × context {p.context_parallel_size}); start a multiple of "
            f"{model_parallel} ranks, or change parallel.tensor_model_parallel_size or "
            "parallel.pipeline_model_parallel_size"
        )
    data_parallel = world_size // model_parallel
    per_pass = train.micro_batch_size * data_parallel
    if train.global_batch_size % per_pass:
        fitting = [m for m in _divisors(train.global_batch_size) if train.global_batch_size % (m * data_parallel) == 0]
        remedy = (
            f"train.micro_batch_size can be {', '.join(map(str, fitting))}"
            if fitting
            else f"train.global_batch_size must be a multiple of {data_parallel}"
        )
        raise RecipeError(
            f"train.global_batch_size={train.global_batch_size} is not a multiple of train.micro_batch_size="
            f"{train.micro_batch_size} × {data_parallel} data-parallel ranks = {per_pass}; {remedy}"
        )
    micro_batches = train.global_batch_size // per_pass
    if p.virtual_pipeline_model_parallel_size > 1 and micro_batches % p.pipeline_model_parallel_size:
        raise RecipeError(
            f"an interleaved pipeline (parallel.virtual_pipeline_model_parallel_size="
            f"{p.virtual_pipeline_model_parallel_size}) takes micro-batches in groups of "
            f"parallel.pipeline_model_parallel_size={p.pipeline_model_parallel_size}, but a step has {micro_batches} "
            "on each data-parallel rank; change train.micro_batch_size or train.global_batch_size, or don't interleave"
        )
    return data_parallel


def _check_naming(recipe: Recipe) -> None:
    if not recipe.name or recipe.name in (".", "..") or "/" in recipe.name or "\\" in recipe.name:
        raise RecipeError(f"name={recipe.name!r}: must be usable as a folder name, without / or \\")
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(recipe.output_dir) if name is not None}
    except ValueError as error:
        raise RecipeError(f"output_dir={recipe.output_dir!r}: {error}; only {{name}} may stand in braces") from None
    if not recipe.output_dir or fields - {"name"}:
        raise RecipeError(f"output_dir={recipe.output_dir!r}: must be a path in which only {{name}} stands in braces")


def _check_model_sizes(m: ModelConfig) -> None:
    sizes = ("num_layers", "hidden_size", "num_attention_heads", "vocab_size", "sequence_length")
    optional = ("num_query_groups", "head_dim", "ffn_hidden_size")
    for name in sizes + tuple(n for n in optional if getattr(m, n) is not None):
        _at_least(f"model.{name}", getattr(m, name), 1)
    for name in ("rotary_base", "logit_softcap", "qk_scale"):
        _above_zero(f"model.{name}", getattr(m, name))
    _at_least("model.hidden_size", m.hidden_size, SMEAR_CHANNELS, f"smear reads {SMEAR_CHANNELS} channels of a token")
    if m.head_dim is None:
        _divides(
            ("model.hidden_size", m.hidden_size),
            ("model.num_attention_heads", m.num_attention_heads),
            "change one of them, or set model.head_dim",
        )
    if m.kv_channels % 2:
        raise RecipeError(
            f"model.head_dim={m.kv_channels}: must be even, rotary embedding turns pairs of channels; change "
            "model.head_dim, model.hidden_size or model.num_attention_heads"
        )
    _divides(
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", m.kv_heads),
        "each group serves equally many heads",
    )
    if not m.window_pattern or set(m.window_pattern) - set("SL"):
        raise RecipeError(
            f"model.window_pattern={m.window_pattern!r}: must be letters S (short window) and L (whole sequence), "
            "e.g. SSSL; L alone means no windows"
        )
    _one_of("model.core_attention", m.core_attention, CORE_ATTENTIONS)
    _one_of("model.linear_layers", m.linear_layers, LINEAR_LAYERS)


def _check_value(m: ModelConfig) -> None:
    v = m.value
    _one_of("model.value.source", v.source, VALUE_SOURCES)
    _one_of("model.value.coefficient", v.coefficient, COEFFICIENTS)
    _one_of("model.value.table", v.table, TABLES)
    _one_of("model.value.table_partition", v.table_partition, TABLE_PARTITIONS)
    _one_of("model.value.lookup", v.lookup, LOOKUPS)
    _one_of("model.value.table_memory", v.table_memory, TABLE_MEMORIES)
    if v.table_memory == "host":
        _check_host_tables(m)
    if isinstance(v.target_layers, str):
        _one_of("model.value.target_layers", v.target_layers, TARGET_LAYERS, "or a list of 0-based layers")
    else:
        _check_explicit_targets(m)
    if v.source != "projection" and not m.target_layers():
        raise RecipeError(
            f"model.value.target_layers={v.target_layers!r} selects no layer of {m.num_layers} for source "
            f"'{v.source}'; select at least one, or use model.value.source=projection"
        )


def _check_host_tables(m: ModelConfig) -> None:
    v, found = m.value, "model.value.table_memory=host"
    if v.source not in SOURCES_WITH_TABLE:
        raise RecipeError(f"{found}: model.value.source={v.source} has no table; use model.value.table_memory=device")
    if v.table_partition != "vocab" or v.lookup != "distinct":
        raise RecipeError(
            f"{found} copies distinct rows, and model.value.table_partition={v.table_partition}, "
            f"model.value.lookup={v.lookup} read whole tables; use vocab and distinct"
        )


def _check_explicit_targets(m: ModelConfig) -> None:
    layers = m.value.target_layers
    found = f"model.value.target_layers={layers}"
    for layer in layers:
        if not 0 <= layer < m.num_layers:
            raise RecipeError(f"{found}: layer {layer} does not exist; layers are 0 to {m.num_layers - 1}")
        if layers.count(layer) > 1:
            raise RecipeError(f"{found}: layer {layer} is listed twice; list it once")
    if 0 in layers and m.value.source in SOURCES_READING_FIRST_LAYER:
        raise RecipeError(
            f"{found}: layer 0 cannot be a target of source '{m.value.source}', which reads layer 0's own values; "
            "leave 0 out"
        )


def _check_parallel_sizes(p: ParallelConfig) -> None:
    for name in (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "make_vocab_size_divisible_by",
    ):
        _at_least(f"parallel.{name}", getattr(p, name), 1)
    _one_of("parallel.recompute", p.recompute, RECOMPUTES)
    if p.overlap_param_gather and not p.use_distributed_optimizer:
        raise RecipeError(
            "parallel.overlap_param_gather=true needs parallel.use_distributed_optimizer=true: replicated weights are "
            "not gathered; set one or the other"
        )


def _check_tensor_parallel(m: ModelConfig, p: ParallelConfig) -> None:
    tp = ("parallel.tensor_model_parallel_size", p.tensor_model_parallel_size)
    _divides(("model.num_attention_heads", m.num_attention_heads), tp, "each rank takes equally many heads")
    if m.kv_heads < p.tensor_model_parallel_size:
        _check_shared_groups(m, p)
    else:
        _divides(("model.num_query_groups", m.kv_heads), tp, "each rank takes equally many key/value heads")
    _divides(("model.ffn_hidden_size", m.ffn_size), tp, "each rank takes an equal share of the feed-forward width")


def _check_shared_groups(m: ModelConfig, p: ParallelConfig) -> None:
    """Fewer query groups than tensor-parallel ranks: consecutive ranks share one."""
    tp = ("parallel.tensor_model_parallel_size", p.tensor_model_parallel_size)
    _divides(tp, ("model.num_query_groups", m.kv_heads), "equally many ranks share each key/value head")
    _divides(("model.num_query_groups × model.head_dim", m.kv_dim), tp, "ranks store equal shares of key/value heads")
    less = f"model.num_query_groups={m.kv_heads} is less than {tp[0]}={tp[1]}"
    if m.value.source in SOURCES_WITH_TABLE and m.value.table_partition == "head":
        raise RecipeError(f"{less}: a rank's table would be less than a head; use model.value.table_partition=vocab")
    if m.value.source == "gated_value_embedding":
        raise RecipeError(f"{less}: gated_value_embedding's gates, one a group, do not divide; use fewer ranks")


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
    _one_of("parallel.pipeline_balance", p.pipeline_balance, PIPELINE_BALANCES)
    if p.pipeline_layers is not None:
        _check_pipeline_layers(m, p)
    elif p.pipeline_balance == "layers":
        why = f"each {part} takes equally many layers, unless parallel.pipeline_balance=time or memory"
        _divides(("model.num_layers", m.num_layers), (name, stages * virtual), why)
    else:
        _check_balance(m, p)
    if stages == 1:
        return
    use_one = f"parallel.pipeline_model_parallel_size={stages}: use 1"
    source = m.value.source
    if source in SOURCES_READING_FIRST_LAYER or source in SOURCES_READING_EMBEDDING:
        what = "layer 0's values" if source in SOURCES_READING_FIRST_LAYER else "the token embedding"
        raise RecipeError(
            f"model.value.source={source} reads {what}, which only the first pipeline stage has, and {use_one} (or a "
            "source that needs token ids only, such as bank)"
        )
    if m.value.table == "shared" and source in SOURCES_WITH_TABLE:
        raise RecipeError(
            f"model.value.table=shared would put copies of one table on several stages whose gradients nobody sums, "
            f"and {use_one} (or model.value.table=per_layer)"
        )


def _check_pipeline_layers(m: ModelConfig, p: ParallelConfig) -> None:
    found, chunks = f"parallel.pipeline_layers={p.pipeline_layers}", p.pipeline_model_parallel_size
    chunks *= p.virtual_pipeline_model_parallel_size
    if p.pipeline_balance != "layers":
        raise RecipeError(f"{found} and parallel.pipeline_balance={p.pipeline_balance} are both set; set one of them")
    if len(p.pipeline_layers) != chunks:
        raise RecipeError(
            f"{found}: needs {chunks} numbers, found {len(p.pipeline_layers)} (parallel.pipeline_model_parallel_size="
            f"{p.pipeline_model_parallel_size} × parallel.virtual_pipeline_model_parallel_size="
            f"{p.virtual_pipeline_model_parallel_size})"
        )
    if min(p.pipeline_layers) < 1 or sum(p.pipeline_layers) != m.num_layers:
        raise RecipeError(
            f"{found}: must be at least 1 each and add up to model.num_layers={m.num_layers}, found "
            f"{sum(p.pipeline_layers)}"
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
        _divides(length, ("parallel.tensor_model_parallel_size", tp), "parallel.sequence_parallel splits the sequence")
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
    if m.core_attention in ("flex", "megatron"):
        raise RecipeError(
            f"model.core_attention={m.core_attention} attends to one rank's keys only and cannot be used with "
            f"parallel.context_parallel_size={cp}; use model.core_attention=auto"
        )


def _check_recomputation(recipe: Recipe) -> None:
    from bov_megatron.pipeline_layout import chunk_sizes

    p = recipe.parallel
    if p.recompute_num_layers is None:
        return
    found = f"parallel.recompute_num_layers={p.recompute_num_layers}"
    if p.recompute != "full":
        raise RecipeError(
            f"{found} needs parallel.recompute=full, found {p.recompute!r}: it says how many layers to recompute; set "
            "parallel.recompute=full, or leave it null"
        )
    largest = max(chunk_sizes(recipe))
    if not 1 <= p.recompute_num_layers <= largest:
        raise RecipeError(
            f"{found}: must be between 1 and {largest}, the layers of a pipeline stage (interleaved: "
            "of a model chunk); null recomputes all of them"
        )


def _check_engine(recipe: Recipe) -> None:
    _one_of("engine", recipe.engine, ENGINES)
    stage = recipe.deepspeed.zero_stage
    if stage not in ZERO_STAGES:
        raise RecipeError(f"deepspeed.zero_stage={stage}: must be 1, 2 or 3")
    _one_of("deepspeed.offload_optimizer", recipe.deepspeed.offload_optimizer, OFFLOADS)
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
    if stage == 3 and p.tensor_model_parallel_size > 1:
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
    for name in ("overlap_grad_reduce", "overlap_param_gather"):
        if getattr(p, name):
            raise RecipeError(
                f"engine=deepspeed orders its own traffic, found parallel.{name}=true; set it to false, or use "
                "engine=megatron"
            )
    if not p.use_distributed_optimizer:
        raise RecipeError(
            "engine=deepspeed always shards the optimizer's state, found parallel.use_distributed_optimizer=false; "
            "leave it true, or use engine=megatron"
        )


def _check_train(t: TrainConfig) -> None:
    _at_least("train.micro_batch_size", t.micro_batch_size, 1)
    _at_least("train.global_batch_size", t.global_batch_size, 1)
    _divides(
        ("train.global_batch_size", t.global_batch_size),
        ("train.micro_batch_size", t.micro_batch_size),
        "a step is a whole number of micro-batches",
    )
    _one_of("train.precision", t.precision, PRECISIONS)
    _at_least("train.seed", t.seed, 0)
    if t.steps is not None:
        _at_least("train.steps", t.steps, 1)
    if t.budget_flops is not None:
        _above_zero("train.budget_flops", t.budget_flops)
    if t.max_minutes is not None:
        _above_zero("train.max_minutes", t.max_minutes)
    if t.steps is None and t.budget_flops is None:
        raise RecipeError(
            "train.steps and train.budget_flops are both null: the run has no end; set one, e.g. train.steps=1000"
        )


def _check_fp8(recipe: Recipe) -> None:
    fp8 = recipe.train.fp8
    _one_of("train.fp8", fp8, FP8_SCALINGS)
    if fp8 == "none":
        return
    if recipe.model.linear_layers != "transformer_engine":
        raise RecipeError(
            f"train.fp8={fp8} needs model.linear_layers=transformer_engine, found '{recipe.model.linear_layers}': "
            "Megatron's own linear layers would leave FP8 out without a word; set it, or train.fp8=none"
        )
    if recipe.train.precision != "bf16":
        raise RecipeError(
            f"train.fp8={fp8} needs train.precision=bf16, found '{recipe.train.precision}': what is not in FP8 "
            "is in bf16; set it, or train.fp8=none"
        )


def _check_optimizer(o: OptimizerConfig) -> None:
    _one_of("optimizer.name", o.name, OPTIMIZERS)
    for name, value in vars(o).items():
        if name.endswith(("_lr", "weight_decay")) or name in ("warmup_steps", "momentum_warmup_steps", "clip_grad"):
            _at_least(f"optimizer.{name}", value, 0)
    _above_zero("optimizer.eps", o.eps)
    _at_least("optimizer.newton_schulz_steps", o.newton_schulz_steps, 1)
    for name in ("warmdown_ratio", "final_lr_fraction"):
        _within(f"optimizer.{name}", getattr(o, name), 1.0)
    for name in ("momentum_start", "momentum_peak", "momentum_final", "muon_beta2"):
        _within(f"optimizer.{name}", getattr(o, name), 1.0, open_end=True)
    if len(o.adamw_matrix_betas) != 2:
        raise RecipeError(f"optimizer.adamw_matrix_betas={o.adamw_matrix_betas}: must be two numbers, e.g. [0.9, 0.95]")
    for beta in o.adamw_matrix_betas:
        _within("optimizer.adamw_matrix_betas", beta, 1.0, open_end=True)
    for name in ("reference_batch_tokens", "reference_parameters"):
        if getattr(o, name) is not None:
            _at_least(f"optimizer.{name}", getattr(o, name), 1, "null turns this scaling off")


def _check_data(d: DataConfig, global_batch_size: int) -> None:
    if d.path is not None and d.streams:
        raise RecipeError(
            f"data.path={d.path!r} and data.streams ({len(d.streams)}) are both set: data.path is short for a single "
            "stream; set one of them to null or []"
        )
    if d.path == "":
        raise RecipeError("data.path='': must name a folder; null means not set")
    if d.remote is not None and d.path is None:
        raise RecipeError(f"data.remote={d.remote!r} needs data.path, the local cache it is copied to")
    paths = [stream.path for stream in d.streams]
    for i, stream in enumerate(d.streams):
        if not stream.path:
            raise RecipeError(f"data.streams[{i}].path is empty: name a folder written by tools/prepare_data.py")
        if paths.index(stream.path) != i:
            raise RecipeError(f"data.streams[{i}].path={stream.path!r} is listed twice; give it one, larger weight")
        _above_zero(f"data.streams[{i}].weight", stream.weight)
    _at_least("data.shuffle_seed", d.shuffle_seed, 0)
    for name in ("shuffle_block_size", "num_canonical_nodes", "prefetch_factor"):
        _at_least(f"data.{name}", getattr(d, name), 1)
    _at_least("data.num_workers", d.num_workers, 0)
    _divides(
        ("train.global_batch_size", global_batch_size),
        ("data.num_canonical_nodes", d.num_canonical_nodes),
        "each part of the data set gives a batch equally many samples",
    )


def _check_intervals(recipe: Recipe) -> None:
    v = recipe.validation
    _at_least("validation.interval", v.interval, 0)
    _at_least("validation.tokens", v.tokens, recipe.model.sequence_length, "one sequence is the least to score")
    if v.micro_batch_size is not None:
        _at_least("validation.micro_batch_size", v.micro_batch_size, 1)
    _at_least("checkpoint.interval", recipe.checkpoint.interval, 0)
    _at_least("checkpoint.keep_last", recipe.checkpoint.keep_last, 1)
    _at_least("checkpoint.keep_every", recipe.checkpoint.keep_every, 0)


def _check_health(health: HealthConfig) -> None:
    _at_least("health.hang_minutes", health.hang_minutes, 0)
    _one_of("health.on_spike", health.on_spike, SPIKE_POLICIES)
    _at_least("health.spike_deviations", health.spike_deviations, 0)
    _at_least("health.spike_window", health.spike_window, 4, "of fewer losses there is no telling what is usual")
    for name in ("max_not_finite_steps", "max_skips_within"):
        _at_least(f"health.{name}", getattr(health, name), 1)
    for name in ("max_skips", "max_rollbacks"):
        _at_least(f"health.{name}", getattr(health, name), 0)


def _check_logging(log: LoggingConfig) -> None:
    for name in ("interval", "print_interval", "table_interval"):
        _at_least(f"logging.{name}", getattr(log, name), 1)
    _one_of("logging.wandb", log.wandb, WANDB_MODES)
    if log.peak_flops is not None:
        _above_zero("logging.peak_flops", log.peak_flops)


def _check_duration(recipe: Recipe) -> None:
    from bov_megatron.plan import flops_per_token, total_steps

    if total_steps(recipe) < 1:
        step = flops_per_token(recipe.model) * recipe.batch_tokens
        raise RecipeError(
            f"train.budget_flops={recipe.train.budget_flops:.3g} does not pay for one step ({step:.3g} FLOPs); raise "
            "it, lower train.global_batch_size, or set train.steps"
        )


def _at_least(name: str, value: float, least: float, why: str = "") -> None:
    if value < least:
        raise RecipeError(f"{name}={value}: must be at least {least}" + (f" ({why})" if why else ""))


def _above_zero(name: str, value: float) -> None:
    if not value > 0:
        raise RecipeError(f"{name}={value}: must be greater than 0")


def _within(name: str, value: float, end: float, open_end: bool = False) -> None:
    if not (0 <= value < end or (value == end and not open_end)):
        raise RecipeError(f"{name}={value}: must lie between 0 and {end}" + (" (exclusive)" if open_end else ""))


def _one_of(name: str, value: str, known: typing.Sequence[str], more: str = "") -> None:
    if value not in known:
        raise RecipeError(f"{name}={value!r} is unknown{nearest(value, known)}" + (f" {more}" if more else ""))


def _divides(whole: tuple[str, int], part: tuple[str, int], why: str) -> None:
    """Raise unless part's value divides whole's; the message offers the values of `part` that would."""
    (name, size), (divisor_name, divisor) = whole, part
    if size % divisor:
        fitting = ", ".join(map(str, _divisors(size)[:12]))
        raise RecipeError(
            f"{name}={size} is not divisible by {divisor_name}={divisor}: {why}. {divisor_name} can be {fitting}"
        )


def _divisors(number: int) -> list[int]:
    return [i for i in range(1, number + 1) if number % i == 0]
