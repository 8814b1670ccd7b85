"""What a recipe must satisfy before anything is built. One function a topic; the first failure stops with a
RecipeError that names the field, the value found and the remedy. Imports nothing heavy.
"""

from __future__ import annotations

import string

from bov_megatron.errors import RecipeError
from bov_megatron.recipe.fields import (
    TARGET_LAYERS,
    DataConfig,
    HealthConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainConfig,
)
from bov_megatron.recipe.layout_checks import check_layout
from bov_megatron.recipe.limits import above_zero, at_least, divides, one_of, within
from bov_megatron.recipe.parameters import SMEAR_CHANNELS
from bov_megatron.recipe.quantities import flops_per_token, total_steps
from bov_megatron.recipe.value_sources import SOURCES_READING_FIRST_LAYER, SOURCES_WITH_TABLE, VALUE_SOURCES

COEFFICIENTS = ("learned", "fixed")
TABLES = ("per_layer", "shared")
TABLE_PARTITIONS = ("vocab", "head")
TABLE_MEMORIES = ("device", "host")
LOOKUPS = ("distinct", "reduce_scatter", "all_reduce", "all_to_all")
CORE_ATTENTIONS = ("auto", "sdpa", "flex", "megatron")
LINEAR_LAYERS = ("megatron", "transformer_engine")
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
    check_layout(recipe)
    _check_train(recipe.train)
    _check_fp8(recipe)
    _check_optimizer(recipe.optimizer)
    _check_data(recipe.data, recipe.train.global_batch_size)
    _check_intervals(recipe)
    _check_health(recipe.health)
    _check_logging(recipe.logging)
    _check_duration(recipe)


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
        at_least(f"model.{name}", getattr(m, name), 1)
    for name in ("rotary_base", "logit_softcap", "qk_scale"):
        above_zero(f"model.{name}", getattr(m, name))
    at_least("model.hidden_size", m.hidden_size, SMEAR_CHANNELS, f"smear reads {SMEAR_CHANNELS} channels of a token")
    if m.head_dim is None:
        divides(
            ("model.hidden_size", m.hidden_size),
            ("model.num_attention_heads", m.num_attention_heads),
            "change one of them, or set model.head_dim",
        )
    if m.kv_channels % 2:
        raise RecipeError(
            f"model.head_dim={m.kv_channels}: must be even, rotary embedding turns pairs of channels; change "
            "model.head_dim, model.hidden_size or model.num_attention_heads"
        )
    divides(
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", m.kv_heads),
        "each group serves equally many heads",
    )
    if not m.window_pattern or set(m.window_pattern) - set("SL"):
        raise RecipeError(
            f"model.window_pattern={m.window_pattern!r}: must be letters S (short window) and L (whole sequence), "
            "e.g. SSSL; L alone means no windows"
        )
    one_of("model.core_attention", m.core_attention, CORE_ATTENTIONS)
    one_of("model.linear_layers", m.linear_layers, LINEAR_LAYERS)


def _check_value(m: ModelConfig) -> None:
    v = m.value
    one_of("model.value.source", v.source, VALUE_SOURCES)
    one_of("model.value.coefficient", v.coefficient, COEFFICIENTS)
    one_of("model.value.table", v.table, TABLES)
    one_of("model.value.table_partition", v.table_partition, TABLE_PARTITIONS)
    one_of("model.value.lookup", v.lookup, LOOKUPS)
    one_of("model.value.table_memory", v.table_memory, TABLE_MEMORIES)
    if v.table_memory == "host":
        _check_host_tables(m)
    if isinstance(v.target_layers, str):
        one_of("model.value.target_layers", v.target_layers, TARGET_LAYERS, "or a list of 0-based layers")
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


def _check_train(t: TrainConfig) -> None:
    at_least("train.micro_batch_size", t.micro_batch_size, 1)
    at_least("train.global_batch_size", t.global_batch_size, 1)
    divides(
        ("train.global_batch_size", t.global_batch_size),
        ("train.micro_batch_size", t.micro_batch_size),
        "a step is a whole number of micro-batches",
    )
    one_of("train.precision", t.precision, PRECISIONS)
    at_least("train.seed", t.seed, 0)
    if t.steps is not None:
        at_least("train.steps", t.steps, 1)
    if t.budget_flops is not None:
        above_zero("train.budget_flops", t.budget_flops)
    if t.max_minutes is not None:
        above_zero("train.max_minutes", t.max_minutes)
    if t.steps is None and t.budget_flops is None:
        raise RecipeError(
            "train.steps and train.budget_flops are both null: the run has no end; set one, e.g. train.steps=1000"
        )


def _check_fp8(recipe: Recipe) -> None:
    fp8 = recipe.train.fp8
    one_of("train.fp8", fp8, FP8_SCALINGS)
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
    one_of("optimizer.name", o.name, OPTIMIZERS)
    for name, value in vars(o).items():
        if name.endswith(("_lr", "weight_decay")) or name in ("warmup_steps", "momentum_warmup_steps", "clip_grad"):
            at_least(f"optimizer.{name}", value, 0)
    above_zero("optimizer.eps", o.eps)
    at_least("optimizer.newton_schulz_steps", o.newton_schulz_steps, 1)
    for name in ("warmdown_ratio", "final_lr_fraction"):
        within(f"optimizer.{name}", getattr(o, name), 1.0)
    for name in ("momentum_start", "momentum_peak", "momentum_final", "muon_beta2"):
        within(f"optimizer.{name}", getattr(o, name), 1.0, open_end=True)
    if len(o.adamw_matrix_betas) != 2:
        raise RecipeError(f"optimizer.adamw_matrix_betas={o.adamw_matrix_betas}: must be two numbers, e.g. [0.9, 0.95]")
    for beta in o.adamw_matrix_betas:
        within("optimizer.adamw_matrix_betas", beta, 1.0, open_end=True)
    for name in ("reference_batch_tokens", "reference_parameters"):
        if getattr(o, name) is not None:
            at_least(f"optimizer.{name}", getattr(o, name), 1, "null turns this scaling off")


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
        above_zero(f"data.streams[{i}].weight", stream.weight)
    at_least("data.shuffle_seed", d.shuffle_seed, 0)
    for name in ("shuffle_block_size", "num_canonical_nodes", "prefetch_factor"):
        at_least(f"data.{name}", getattr(d, name), 1)
    at_least("data.num_workers", d.num_workers, 0)
    divides(
        ("train.global_batch_size", global_batch_size),
        ("data.num_canonical_nodes", d.num_canonical_nodes),
        "each part of the data set gives a batch equally many samples",
    )


def _check_intervals(recipe: Recipe) -> None:
    v = recipe.validation
    at_least("validation.interval", v.interval, 0)
    at_least("validation.tokens", v.tokens, recipe.model.sequence_length, "one sequence is the least to score")
    if v.micro_batch_size is not None:
        at_least("validation.micro_batch_size", v.micro_batch_size, 1)
    at_least("checkpoint.interval", recipe.checkpoint.interval, 0)
    at_least("checkpoint.keep_last", recipe.checkpoint.keep_last, 1)
    at_least("checkpoint.keep_every", recipe.checkpoint.keep_every, 0)


def _check_health(health: HealthConfig) -> None:
    at_least("health.hang_minutes", health.hang_minutes, 0)
    one_of("health.on_spike", health.on_spike, SPIKE_POLICIES)
    at_least("health.spike_deviations", health.spike_deviations, 0)
    at_least("health.spike_window", health.spike_window, 4, "of fewer losses there is no telling what is usual")
    for name in ("max_not_finite_steps", "max_skips_within"):
        at_least(f"health.{name}", getattr(health, name), 1)
    for name in ("max_skips", "max_rollbacks"):
        at_least(f"health.{name}", getattr(health, name), 0)


def _check_logging(log: LoggingConfig) -> None:
    for name in ("interval", "print_interval", "table_interval"):
        at_least(f"logging.{name}", getattr(log, name), 1)
    one_of("logging.wandb", log.wandb, WANDB_MODES)
    if log.peak_flops is not None:
        above_zero("logging.peak_flops", log.peak_flops)


def _check_duration(recipe: Recipe) -> None:
    if total_steps(recipe) < 1:
        step = flops_per_token(recipe.model) * recipe.batch_tokens
        raise RecipeError(
            f"train.budget_flops={recipe.train.budget_flops:.3g} does not pay for one step ({step:.3g} FLOPs); raise "
            "it, lower train.global_batch_size, or set train.steps"
        )
