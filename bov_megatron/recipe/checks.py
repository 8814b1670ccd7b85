"""Checks of a recipe: the limits in its fields' annotations, then conditions on several fields, by topic.

The first failure raises RecipeError with the field, the value found and the remedy.
"""

from __future__ import annotations

import dataclasses
import string
import typing

from bov_megatron.errors import RecipeError
from bov_megatron.recipe.fields import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    Recipe,
    TrainConfig,
)
from bov_megatron.recipe.layout_checks import check_layout
from bov_megatron.recipe.limits import AtLeast, divides, field_limits
from bov_megatron.recipe.quantities import flops_per_token, total_steps
from bov_megatron.recipe.value_sources import PROJECTION


def check_recipe(recipe: Recipe) -> None:
    """Raise RecipeError at the first field that cannot work at any world size."""
    _check_fields(recipe)
    _check_naming(recipe)
    _check_model_sizes(recipe.model)
    _check_value(recipe.model)
    check_layout(recipe)
    _check_train(recipe.train)
    _check_fp8(recipe)
    _check_optimizer(recipe.optimizer)
    _check_data(recipe.data, recipe.train.global_batch_size)
    sequence = AtLeast(recipe.model.sequence_length, "one sequence is the least to score")
    sequence.check("validation.tokens", recipe.validation.tokens)
    sequence.check("evaluation.tokens", recipe.evaluation.tokens)
    _check_evaluation(recipe.evaluation)
    _check_evaluation_jobs(recipe.evaluation, recipe.checkpoint)
    _check_duration(recipe)


def _check_fields(section: typing.Any, where: str = "") -> None:
    """Check every field of `section`, nested sections included, against the limits in its annotation."""
    cls: type = type(section)
    for field, limits in field_limits(cls).items():
        name, value = f"{where}{field}", getattr(section, field)
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items):
            if dataclasses.is_dataclass(item):
                _check_fields(item, f"{name}[{i}]." if items is value else f"{name}.")
            for limit in limits if item is not None else ():
                limit.check(name, item)


def _check_naming(recipe: Recipe) -> None:
    if not recipe.name or recipe.name in (".", "..") or "/" in recipe.name or "\\" in recipe.name:
        raise RecipeError(f"name={recipe.name!r}: must be usable as a folder name, without / or \\")
    try:
        fields = {name for _, name, _, _ in string.Formatter().parse(recipe.output_dir) if name is not None}
    except ValueError as error:
        raise RecipeError(f"output_dir={recipe.output_dir!r}: {error}; only {{name}} may be in braces") from None
    if not recipe.output_dir or fields - {"name"}:
        raise RecipeError(f"output_dir={recipe.output_dir!r}: must be a path in which only {{name}} is in braces")


def _check_model_sizes(m: ModelConfig) -> None:
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


def _check_value(m: ModelConfig) -> None:
    v = m.value
    if v.table_memory == "host":
        _check_host_tables(m)
    if not isinstance(v.target_layers, str):
        _check_explicit_targets(m, v.target_layers)
    if v.source != PROJECTION and not m.layers_from_source():
        raise RecipeError(
            f"model.value.target_layers={v.target_layers!r} selects no layer of {m.num_layers} for source "
            f"'{v.source}'; select at least one, or use model.value.source={PROJECTION}"
        )


def _check_host_tables(m: ModelConfig) -> None:
    v, setting = m.value, "model.value.table_memory=host"
    if not v.facts.has_table:
        raise RecipeError(f"{setting}: model.value.source={v.source} has no table; use model.value.table_memory=device")
    if v.table_partition != "vocab" or v.lookup != "distinct":
        raise RecipeError(
            f"{setting} copies distinct rows, and model.value.table_partition={v.table_partition}, "
            f"model.value.lookup={v.lookup} read whole tables; use vocab and distinct"
        )


def _check_explicit_targets(m: ModelConfig, layers: list[int]) -> None:
    setting = f"model.value.target_layers={layers}"
    for layer in layers:
        if not 0 <= layer < m.num_layers:
            raise RecipeError(f"{setting}: layer {layer} does not exist; layers are 0 to {m.num_layers - 1}")
        if layers.count(layer) > 1:
            raise RecipeError(f"{setting}: layer {layer} is listed twice; list it once")
    if 0 in layers and m.value.facts.reads == "first_layer":
        raise RecipeError(
            f"{setting}: layer 0 cannot be a target of source '{m.value.source}', which reads layer 0's own values; "
            "leave 0 out"
        )


def _check_train(t: TrainConfig) -> None:
    divides(
        ("train.global_batch_size", t.global_batch_size),
        ("train.micro_batch_size", t.micro_batch_size),
        "a step is a whole number of micro-batches",
    )


def _check_fp8(recipe: Recipe) -> None:
    fp8 = recipe.train.fp8
    if fp8 == "none":
        return
    if recipe.model.linear_layers != "transformer_engine":
        raise RecipeError(
            f"train.fp8={fp8} needs model.linear_layers=transformer_engine, found '{recipe.model.linear_layers}': "
            "Megatron's own linear layers would silently ignore FP8; set it, or train.fp8=none"
        )
    if recipe.train.precision != "bf16":
        raise RecipeError(
            f"train.fp8={fp8} needs train.precision=bf16, found '{recipe.train.precision}': everything that is not in "
            "FP8 is in bf16; set it, or train.fp8=none"
        )


def _check_optimizer(o: OptimizerConfig) -> None:
    if len(o.adamw_matrix_betas) != 2:
        raise RecipeError(f"optimizer.adamw_matrix_betas={o.adamw_matrix_betas}: must be two numbers, e.g. [0.9, 0.95]")


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
    divides(
        ("train.global_batch_size", global_batch_size),
        ("data.num_canonical_nodes", d.num_canonical_nodes or 1),
        "each part of the data set gives a batch equally many samples",
    )


def _check_evaluation(e: EvaluationConfig) -> None:
    names = [held_out.name for held_out in e.held_out]
    for i, held_out in enumerate(e.held_out):
        where = f"evaluation.held_out[{i}]"
        if not held_out.path:
            raise RecipeError(f"{where}.path is empty: name a folder written by tools/prepare_data.py")
        if not held_out.name or "/" in held_out.name or names.index(held_out.name) != i:
            raise RecipeError(f"{where}.name={held_out.name!r}: must be a name of its own, without /")
    if e.core_tasks and e.core is None:
        raise RecipeError(f"evaluation.core_tasks={e.core_tasks}: set evaluation.core, the folder of their bundle")
    if e.tasks_dir is not None and not e.tasks:
        raise RecipeError(f"evaluation.tasks_dir={e.tasks_dir!r}: list in evaluation.tasks what to score of it")
    if e.every and not e.lists_anything:
        raise RecipeError(
            f"evaluation.every={e.every}, but there is nothing to evaluate: set evaluation.held_out, evaluation.tasks "
            "or evaluation.core, or leave it out"
        )


def _check_evaluation_jobs(e: EvaluationConfig, c: CheckpointConfig) -> None:
    """A job may wait for hours, so its checkpoint must be one that is kept."""
    if e.where == "training":
        if e.sbatch:
            raise RecipeError(f"evaluation.sbatch={e.sbatch} is of jobs: set evaluation.where=slurm, or leave it out")
        return
    if not e.lists_anything:
        raise RecipeError(
            "evaluation.where=slurm, but there is nothing to evaluate: set evaluation.held_out, evaluation.tasks or "
            "evaluation.core"
        )
    if e.every and (not c.interval or e.every % c.interval):
        raise RecipeError(
            f"evaluation.every={e.every} with evaluation.where=slurm: jobs evaluate checkpoints, which there are every "
            f"checkpoint.interval={c.interval} steps; use a multiple of it"
        )
    if e.every and (not c.keep_every or e.every % c.keep_every):
        raise RecipeError(
            f"evaluation.every={e.every} with evaluation.where=slurm: a checkpoint may be deleted before its job runs; "
            f"keep it with checkpoint.keep_every={e.every} (found {c.keep_every})"
        )


def _check_duration(recipe: Recipe) -> None:
    if total_steps(recipe) < 1:
        step = flops_per_token(recipe.model) * recipe.batch_tokens
        raise RecipeError(
            f"train.budget_flops={recipe.train.budget_flops:.3g} does not pay for one step ({step:.3g} FLOPs); raise "
            "it, lower train.global_batch_size, or set train.steps"
        )
