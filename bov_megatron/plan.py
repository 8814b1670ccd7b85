"""What a recipe costs: parameters, FLOPs, steps, memory per rank, checkpoint size, time. Computed here and
nowhere else; the trainer, the optimizer and the tests ask this file. Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bov_megatron import pipeline_layout, plan_memory
from bov_megatron.parameters import KINDS, parameter_specs
from bov_megatron.recipe import ModelConfig, Recipe, ValueConfig
from bov_megatron.recipe_loading import RecipeError

DEFAULT_PEAK_FLOPS = 989e12
"""Dense bf16 FLOP/s of one NVIDIA H100 SXM, from its data sheet."""
DEFAULT_MFU = 0.40
"""Share of the peak that a time estimate assumes: an assumption, not a measurement."""
REFERENCE_WIDTH = 768
"""Hidden size at which the embedding, output and table rates hold."""


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by optimizer kind (keys: parameters.KINDS), vocabulary padding excluded."""
    counts = dict.fromkeys(KINDS, 0)
    for spec in parameter_specs(model):
        counts[spec.kind] += spec.size
    return counts


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs of one token, forward and backward.

    6 per parameter that is multiplied (block matrices, gates, output; embedding and tables are looked up and count
    nothing) + 12 · query_dim · min(window, sequence_length) per layer for attention scores and weighted sums.
    """
    return float(sum(layer_flops(model)) + 6 * parameter_counts(model)["output"])


def layer_flops(model: ModelConfig) -> list[int]:
    """Training FLOPs of one token in each layer, as `flops_per_token` counts them."""
    flops = [12 * model.query_dim * min(window, model.sequence_length) for window in model.windows()]
    for spec in parameter_specs(model):
        if spec.kind == "matrix":
            flops[spec.layer] += 6 * spec.size
    return flops


def stage_flops(recipe: Recipe) -> Callable[[int, int], float]:
    """`flops(first, stop)`: FLOPs per token of a pipeline stage that holds layers `[first, stop)`, with the output
    matrix on the last one, and the repeated forward pass where all layers are recomputed."""
    parallel, output = recipe.parallel, 6 * parameter_counts(recipe.model)["output"]
    repeated = parallel.recompute == "full" and parallel.recompute_num_layers is None
    flops = [number * 4 / 3 if repeated else float(number) for number in layer_flops(recipe.model)]
    return lambda first, stop: sum(flops[first:stop]) + (output if stop == len(flops) else 0)


def _flops_share(recipe: Recipe) -> list[float]:
    flops = stage_flops(recipe)
    stages = [sum(flops(c.start, c.stop) for c in chunks) for chunks in pipeline_layout.layers_of_chunks(recipe)]
    return [stage / sum(stages) for stage in stages]


def total_steps(recipe: Recipe) -> int:
    """Optimizer steps of the run: `train.steps`, else what `train.budget_flops` pays for, rounded."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.budget_flops is None:
        raise RecipeError("train.steps and train.budget_flops are both null; set one, e.g. train.steps=1000")
    return round(recipe.train.budget_flops / flops_per_token(recipe.model) / recipe.batch_tokens)


def reference_scaling(recipe: Recipe) -> tuple[float, float, float]:
    """Factors from the recipe's reference rates to this run's: (lr_scale, width_scale, decay_scale).

    lr_scale: sqrt(batch tokens / reference batch), on every learning rate.
    width_scale: (hidden_size / 768)^-0.5, on those of embedding, output and tables besides.
    decay_scale: lr_scale × reference_parameters / N, on the block matrices' weight decay. N counts matrices and output
    of the `projection` model of this shape, so that every value source trains with the same decay.
    """
    o = recipe.optimizer
    lr_scale = 1.0
    if o.reference_batch_tokens is not None:
        lr_scale = (recipe.batch_tokens / o.reference_batch_tokens) ** 0.5
    width_scale = (recipe.model.hidden_size / REFERENCE_WIDTH) ** -0.5
    decay_scale = lr_scale
    if o.reference_parameters is not None:
        counts = parameter_counts(dataclasses.replace(recipe.model, value=ValueConfig(source="projection")))
        decay_scale *= o.reference_parameters / (counts["matrix"] + counts["output"])
    return lr_scale, width_scale, decay_scale


def effective_rates(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Peak `lr` and `weight_decay` of each optimizer kind (keys: parameters.KINDS) after reference_scaling.

    The small decays of the kinds other than `matrix` are taken as they stand, as the reference does.
    """
    o = recipe.optimizer
    lr_scale, width_scale, decay_scale = reference_scaling(recipe)
    muon = o.name == "muon"
    matrix_decay = o.weight_decay if muon else o.adamw_matrix_weight_decay
    rates = {
        "matrix": (o.matrix_lr if muon else o.adamw_matrix_lr, matrix_decay * decay_scale),
        "embedding": (o.embedding_lr * width_scale, o.embedding_weight_decay),
        "output": (o.output_lr * width_scale, o.output_weight_decay),
        "table": (o.table_lr * width_scale, o.table_weight_decay),
        "coefficient": (o.coefficient_lr, 0.0),
        "projection_coefficient": (o.projection_coefficient_lr, o.projection_coefficient_weight_decay),
        "smear": (o.smear_lr, 0.0),
    }
    return {kind: {"lr": lr * lr_scale, "weight_decay": decay} for kind, (lr, decay) in rates.items()}


@dataclass
class Plan:
    """Costs of one recipe on one world. Bytes, FLOPs, seconds; all counts are of the whole model."""

    name: str
    parameters: int
    """Everything, tables included, vocabulary padding excluded."""
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
    """By stage; one entry each unless the pipeline is interleaved."""
    flops_share_by_stage: list[float]
    memory_per_rank_bytes: int
    """Of the rank that needs most; parts in `memory_per_rank`."""
    memory_per_rank: dict[str, int]
    memory_by_stage: list[dict[str, int]]
    host_memory_per_rank_bytes: int
    """Of tables in host memory, or of an optimizer that is offloaded there; else 0."""
    checkpoint_bytes: int
    value_cache_bytes_per_token: dict[str, int]
    """Per token of context while decoding: what `projection` would cache for the target layers, and this model."""
    time_estimate: dict[str, float]
    """`seconds` on world_size devices, with the assumed `mfu` and `peak_flops` of one device."""


def plan(
    recipe: Recipe, world_size: int | None = None, mfu: float = DEFAULT_MFU, peak_flops: float | None = None
) -> Plan:
    """Cost of `recipe` on `world_size` ranks (default: one copy of the model).

    Raises RecipeError where the recipe does not fit the world, as training would.
    """
    recipe.validate()
    if not 0 < mfu <= 1:
        raise RecipeError(f"mfu={mfu}: must lie between 0 and 1")
    model, parallel = recipe.model, recipe.parallel
    world_size = parallel.model_parallel_size if world_size is None else world_size
    data_parallel = recipe.data_parallel_size(world_size)
    counts = parameter_counts(model)
    steps, flops = total_steps(recipe), flops_per_token(model)
    stages = plan_memory.memory_by_stage(recipe, data_parallel)
    worst = max(stages, key=lambda stage: sum(stage.values()))
    peak = peak_flops or recipe.logging.peak_flops or DEFAULT_PEAK_FLOPS
    flops_total = flops * steps * recipe.batch_tokens
    return Plan(
        name=recipe.name,
        parameters=sum(counts.values()),
        table_parameters=counts["table"],
        parameters_by_kind=counts,
        padded_vocab_size=recipe.padded_vocab_size(),
        target_layers=model.target_layers(),
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
        layers_per_stage=[len(layers) for layers in pipeline_layout.layers_of_stages(recipe)],
        layers_per_chunk=[[len(layers) for layers in chunks] for chunks in pipeline_layout.layers_of_chunks(recipe)],
        flops_share_by_stage=_flops_share(recipe),
        memory_per_rank_bytes=sum(worst.values()),
        memory_per_rank=worst,
        memory_by_stage=stages,
        host_memory_per_rank_bytes=max(plan_memory.host_memory_by_stage(recipe, data_parallel)),
        checkpoint_bytes=plan_memory.checkpoint_bytes(recipe),
        value_cache_bytes_per_token=_value_cache(model),
        time_estimate={
            "seconds": flops_total / (world_size * peak * mfu),
            "mfu": mfu,
            "peak_flops": peak,
        },
    )


def _value_cache(model: ModelConfig) -> dict[str, int]:
    """bf16 bytes of cached values per token of context, all layers: with projections alone, and with this source."""
    per_layer = 2 * model.kv_dim
    cached = sum(model.has_value_projection(layer) for layer in range(model.num_layers))
    return {"projection": model.num_layers * per_layer, "this_model": cached * per_layer}


def format_plan(plan: Plan) -> str:
    """The plan as an aligned table for a terminal."""
    p = plan
    kinds = [(f"  {kind}", f"{count:,}") for kind, count in p.parameters_by_kind.items() if count]
    rates = [
        (f"  {kind}", f"lr {p.learning_rates[kind]['lr']:.4g}, decay {p.learning_rates[kind]['weight_decay']:.4g}")
        for kind, count in p.parameters_by_kind.items()
        if count
    ]
    memory = [(f"  {part}", _size(size)) for part, size in p.memory_per_rank.items() if size]
    stages = []
    if len(p.layers_per_stage) > 1:
        stages = [
            ("  FLOPs per stage", ", ".join(f"{share:.1%}" for share in p.flops_share_by_stage)),
            ("  memory per stage", ", ".join(_size(sum(stage.values())) for stage in p.memory_by_stage)),
        ]
    ranks = "1 rank" if p.world_size == 1 else f"{p.world_size} ranks"
    layout = f"{ranks} = tensor {p.tensor_model_parallel_size} × pipeline {p.pipeline_model_parallel_size}"
    if p.context_parallel_size > 1:
        layout += f" × context {p.context_parallel_size}"
    estimate = p.time_estimate
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
        ("Memory per rank", f"{_size(p.memory_per_rank_bytes)} (estimate, the fullest rank)", memory),
        *([("Host memory per rank", _size(p.host_memory_per_rank_bytes), [])] if p.host_memory_per_rank_bytes else []),
        ("Checkpoint", f"{_size(p.checkpoint_bytes)} on disk", []),
        (
            "Values cached",
            f"{_size(p.value_cache_bytes_per_token['this_model'])} a token when decoding in bf16",
            [("  with projection", _size(p.value_cache_bytes_per_token["projection"]))],
        ),
        (
            "Time",
            f"{_duration(estimate['seconds'])} (estimate, not a measurement)",
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


def _size(size: float) -> str:
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.2f} {units[0]}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 else "less than 1 s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [(days, "d"), (hours, "h"), (minutes, "min")]
    return " ".join(f"{number} {unit}" for number, unit in parts if number)


def _ranges(layers: Sequence[int]) -> str:
    """0-based layers as `8-11` or `1, 3, 5`; `none` where there are none."""
    groups: list[list[int]] = []
    for layer in sorted(layers):
        if groups and layer == groups[-1][-1] + 1:
            groups[-1].append(layer)
        else:
            groups.append([layer])
    return ", ".join(f"{g[0]}-{g[-1]}" if len(g) > 1 else str(g[0]) for g in groups) or "none"
