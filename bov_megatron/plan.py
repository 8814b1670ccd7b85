"""Report of a recipe's costs: parameters, FLOPs, steps, memory and messages per rank, checkpoint size, time. Doesn't
need torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bov_megatron.errors import RecipeError
from bov_megatron.recipe import ModelConfig, Recipe, memory, pipeline, traffic
from bov_megatron.recipe.checks import check_recipe
from bov_megatron.recipe.gpus import DEFAULT_GPU, GPUS, Gpu
from bov_megatron.recipe.layout_checks import data_parallel_size
from bov_megatron.recipe.quantities import effective_rates, flops_per_token, parameter_counts, stage_flops, total_steps
from bov_megatron.recipe.roofline import Roofline, bubble_share, roofline
from bov_megatron.recipe.work import work_of_stage

DEFAULT_PEAK_FLOPS = GPUS[DEFAULT_GPU].peak_flops
DEFAULT_MFU = 0.40
"""Share of the peak for time estimates; an assumption, not a measurement."""


@dataclass
class Plan:
    """Costs of a recipe on `world_size` ranks, in bytes, FLOPs and seconds; counts are of the whole model."""

    name: str
    parameters: int
    """Including tables, without vocabulary padding."""
    table_parameters: int
    parameters_by_kind: dict[str, int]
    padded_vocab_size: int
    target_layers: list[int]
    flops_per_token: float
    flops_total: float
    steps: int
    tokens: int
    batch_tokens: int
    learning_rates: dict[str, dict[str, float]]
    """Per optimizer kind: effective `lr` and `weight_decay`."""
    world_size: int
    data_parallel_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    gradient_accumulation_steps: int
    layers_per_stage: list[int]
    layers_per_chunk: list[list[int]]
    """By stage; a single chunk each unless the pipeline is interleaved."""
    flops_share_by_stage: list[float]
    memory_per_rank_bytes: int
    """Of the fullest rank; `memory_per_rank` has its parts."""
    memory_per_rank: dict[str, int]
    memory_by_stage: list[dict[str, int]]
    host_memory_per_rank_bytes: int
    """For tables in host memory or an offloaded optimizer."""
    checkpoint_bytes: int
    value_cache_bytes_per_token: dict[str, int]
    """Per token of context while decoding, all layers: with `projection` everywhere, and `this_model`."""
    collectives: list[dict[str, Any]]
    """Of one rank of the stage whose step takes longest: `kind`, `group`, `group_size`, `bytes` per step."""
    gpu: str
    step_seconds: float
    """The least that a step takes on `gpu`, by the roofline (recipe/roofline.py); DeepSpeed's messages are not counted.
    """
    roofline: dict[str, float]
    """Its parts, in seconds: `compute`, `memory`, `links` and `bubble`."""
    bottleneck: str
    time_estimate: dict[str, float]
    """`seconds` of the whole run, with the assumed `mfu` and `peak_flops` of each device."""


def plan(
    recipe: Recipe,
    world_size: int | None = None,
    mfu: float = DEFAULT_MFU,
    peak_flops: float | None = None,
    gpu: Gpu = GPUS[DEFAULT_GPU],
) -> Plan:
    """Costs of `recipe` on `world_size` ranks (default: one copy of the model).

    Raises RecipeError, as training would, if the recipe is invalid or doesn't fit `world_size`.
    """
    check_recipe(recipe)
    if not 0 < mfu <= 1:
        raise RecipeError(f"mfu={mfu}: must be between 0 and 1")
    model, parallel = recipe.model, recipe.parallel
    world_size = parallel.model_parallel_size if world_size is None else world_size
    data_parallel = data_parallel_size(recipe, world_size)
    counts = parameter_counts(model)
    steps, flops = total_steps(recipe), flops_per_token(model)
    layers = pipeline.layers_of_chunks(recipe)
    stages = memory.memory_by_stage(recipe, layers, data_parallel)
    worst = max(stages, key=lambda stage: sum(stage.values()))
    peak = peak_flops or recipe.logging.peak_flops or DEFAULT_PEAK_FLOPS
    flops_total = flops * steps * recipe.batch_tokens
    times = [least_time(recipe, layers, data_parallel, stage, gpu) for stage in range(len(layers))]
    messages, least = max(times, key=lambda stage: stage[1].seconds)
    return Plan(
        name=recipe.name,
        parameters=sum(counts.values()),
        table_parameters=counts["table"],
        parameters_by_kind=counts,
        padded_vocab_size=recipe.padded_vocab_size(),
        target_layers=model.layers_from_source(),
        flops_per_token=flops,
        flops_total=flops_total,
        steps=steps,
        tokens=steps * recipe.batch_tokens,
        batch_tokens=recipe.batch_tokens,
        learning_rates=effective_rates(recipe),
        world_size=world_size,
        data_parallel_size=data_parallel,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        gradient_accumulation_steps=recipe.train.global_batch_size // recipe.train.micro_batch_size // data_parallel,
        layers_per_stage=[sum(map(len, chunks)) for chunks in layers],
        layers_per_chunk=[[len(chunk) for chunk in chunks] for chunks in layers],
        flops_share_by_stage=_flops_share(recipe, layers),
        memory_per_rank_bytes=sum(worst.values()),
        memory_per_rank=worst,
        memory_by_stage=stages,
        host_memory_per_rank_bytes=max(memory.host_memory_by_stage(recipe, layers, data_parallel)),
        checkpoint_bytes=memory.checkpoint_bytes(recipe),
        value_cache_bytes_per_token=_value_cache(model),
        collectives=[dataclasses.asdict(message) for message in messages],
        gpu=gpu.name,
        step_seconds=least.seconds,
        roofline={field.name: getattr(least, field.name) for field in dataclasses.fields(Roofline)},
        bottleneck=least.bottleneck,
        time_estimate={
            "seconds": flops_total / (world_size * peak * mfu),
            "mfu": mfu,
            "peak_flops": peak,
        },
    )


def least_time(
    recipe: Recipe, layers: list[list[range]], data_parallel: int, stage: int, gpu: Gpu = GPUS[DEFAULT_GPU]
) -> tuple[list[traffic.Messages], Roofline]:
    """Messages and roofline of a rank of a pipeline stage."""
    parallel, train = recipe.parallel, recipe.train
    bubble = bubble_share(
        parallel.pipeline_model_parallel_size,
        parallel.virtual_pipeline_model_parallel_size,
        train.global_batch_size // train.micro_batch_size // data_parallel,
    )
    messages = traffic.traffic_of_stage(recipe, layers, data_parallel, stage)
    within = [(message.span <= gpu.node_gpus, message.bytes) for message in messages]
    return messages, roofline(gpu, *work_of_stage(recipe, layers[stage], data_parallel, stage), within, bubble)


def _flops_share(recipe: Recipe, layers: list[list[range]]) -> list[float]:
    flops = stage_flops(recipe)
    stages = [sum(flops(chunk.start, chunk.stop) for chunk in chunks) for chunks in layers]
    return [stage / sum(stages) for stage in stages]


def _value_cache(model: ModelConfig) -> dict[str, int]:
    per_layer = 2 * model.kv_dim  # bytes in bf16
    cached = sum(model.facts_of(layer).has_value_matrix for layer in range(model.num_layers))
    return {"projection": model.num_layers * per_layer, "this_model": cached * per_layer}


def format_plan(plan: Plan) -> str:
    """The plan as an aligned table."""
    p = plan
    kinds = [(f"  {kind}", f"{count:,}") for kind, count in p.parameters_by_kind.items() if count]
    rates = [
        (f"  {kind}", f"lr {p.learning_rates[kind]['lr']:.4g}, decay {p.learning_rates[kind]['weight_decay']:.4g}")
        for kind, count in p.parameters_by_kind.items()
        if count
    ]
    memory = [(f"  {part}", format_size(size)) for part, size in p.memory_per_rank.items() if size]
    stages = []
    if len(p.layers_per_stage) > 1:
        stages = [
            ("  FLOPs per stage", ", ".join(f"{share:.1%}" for share in p.flops_share_by_stage)),
            ("  memory per stage", ", ".join(format_size(sum(stage.values())) for stage in p.memory_by_stage)),
        ]
    ranks = "1 rank" if p.world_size == 1 else f"{p.world_size} ranks"
    layout = f"{ranks} = tensor {p.tensor_model_parallel_size} × pipeline {p.pipeline_model_parallel_size}"
    if p.context_parallel_size > 1:
        layout += f" × context {p.context_parallel_size}"
    estimate, on_host = p.time_estimate, p.host_memory_per_rank_bytes
    host_memory: list[tuple[str, str, list]] = [("Host memory per rank", format_size(on_host), [])] if on_host else []
    sent = sum(message["bytes"] for message in p.collectives)
    messages: list[tuple[str, str, list]] = []
    if sent:
        by_kind = [
            (
                f"  {message['kind'].replace('_', '-')}",
                f"{format_size(message['bytes']):<12}over {message['group']} {message['group_size']:,}",
            )
            for message in p.collectives
        ]
        messages.append(("Collectives", f"{format_size(sent)} per step and rank", by_kind))
    sections = [
        ("Parameters", f"{p.parameters:,}", kinds),
        (
            "Compute",
            f"{p.flops_total:.4g} FLOPs",
            [
                ("  FLOPs per token", f"{p.flops_per_token:.6e}"),
                ("  steps", f"{p.steps:,} of {p.batch_tokens:,} tokens"),
                ("  tokens", f"{p.tokens:.4g} ({p.tokens:,})"),
            ],
        ),
        ("Peak rates", "after scaling by batch and width", rates),
        (
            "Layout",
            f"{layout} × data {p.data_parallel_size}",
            [
                ("  layers per stage", ", ".join(" + ".join(map(str, chunks)) for chunks in p.layers_per_chunk)),
                *stages,
                ("  micro-batches per step", str(p.gradient_accumulation_steps)),
                ("  vocabulary rows", f"{p.padded_vocab_size:,} with padding"),
                ("  target layers", _ranges(p.target_layers)),
            ],
        ),
        ("Memory per rank", f"{format_size(p.memory_per_rank_bytes)} (estimate, the fullest rank)", memory),
        *host_memory,
        ("Checkpoint", f"{format_size(p.checkpoint_bytes)} on disk", []),
        (
            "Values cached",
            f"{format_size(p.value_cache_bytes_per_token['this_model'])} a token when decoding in bf16",
            [("  with projection", format_size(p.value_cache_bytes_per_token["projection"]))],
        ),
        (
            "Step",
            f"{1e3 * p.step_seconds:,.1f} ms at the least on {p.gpu}; bottleneck: {p.bottleneck}",
            [(f"  {part}", f"{1e3 * seconds:,.1f} ms") for part, seconds in p.roofline.items() if seconds],
        ),
        *messages,
        (
            "Time",
            f"{format_duration(estimate['seconds'])} (estimate, not a measurement)",
            [
                (
                    "  assumed",
                    f"{estimate['mfu']:.0%} of {estimate['peak_flops']:.3g} FLOP/s on each of {p.world_size}",
                ),
            ],
        ),
    ]
    lines = [f"Plan of {p.name}", ""]
    for title, value, rows in sections:
        lines.append(f"{title:<26}{value}")
        lines += [f"{label:<26}{text}" for label, text in rows]
    return "\n".join(lines)


def format_size(size: float) -> str:
    """Bytes, e.g. `12.72 GiB`."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def format_duration(seconds: float) -> str:
    """E.g. `1 h 43 min`."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _ranges(layers: Sequence[int]) -> str:
    """0-based layers as `8-11` or `1, 3, 5`, or `none`."""
    groups: list[list[int]] = []
    for layer in sorted(layers):
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups) or "none"
