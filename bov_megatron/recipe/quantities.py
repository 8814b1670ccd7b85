"""Parameter counts, FLOPs, steps and learning rates of a recipe."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bov_megatron.errors import RecipeError
from bov_megatron.recipe.fields import ModelConfig, Recipe, ValueConfig
from bov_megatron.recipe.parameters import KINDS, parameter_specs

REFERENCE_WIDTH = 768
"""Hidden size at which the learning rates of embedding, output and tables hold."""


def parameter_counts(model: ModelConfig) -> dict[str, int]:
    """Parameters by optimizer kind (keys: parameters.KINDS), vocabulary padding excluded."""
    counts = dict.fromkeys(KINDS, 0)
    for spec in parameter_specs(model):
        counts[spec.kind] += spec.size
    return counts


def parameters_by_convention(model: ModelConfig) -> dict[str, int]:
    """Parameters as scaling laws count them.

    `all`; `without_embeddings`: without the token embedding; `without_tables`: without value tables; `matrices`: block
    matrices only; `matrices_and_head`: these and the output matrix.
    """
    counts = parameter_counts(model)
    total = sum(counts.values())
    return {
        "all": total,
        "without_embeddings": total - counts["embedding"],
        "without_tables": total - counts["table"],
        "matrices": counts["matrix"],
        "matrices_and_head": counts["matrix"] + counts["output"],
    }


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs of one token, forward and backward.

    6 per parameter of a matrix product (block matrices, gates, output; lookups in embedding and tables count 0), plus
    12 · query_dim · min(window, sequence_length) per layer for attention.
    """
    return float(sum(layer_flops(model)) + 6 * parameter_counts(model)["output"])


def layer_flops(model: ModelConfig) -> list[int]:
    """Training FLOPs of one token in each layer; see `flops_per_token`."""
    flops = [12 * model.query_dim * min(window, model.sequence_length) for window in model.windows()]
    for spec in parameter_specs(model):
        if spec.kind == "matrix" and spec.layer is not None:
            flops[spec.layer] += 6 * spec.size
    return flops


def stage_flops(recipe: Recipe) -> Callable[[int, int], float]:
    """`flops(first, stop)`: FLOPs per token of a pipeline stage with layers `[first, stop)`. The last stage includes
    the output matrix; full recomputation adds a forward pass."""
    parallel, output = recipe.parallel, 6 * parameter_counts(recipe.model)["output"]
    repeated = parallel.recompute == "full" and parallel.recompute_num_layers is None
    flops = [number * 4 / 3 if repeated else float(number) for number in layer_flops(recipe.model)]
    return lambda first, stop: sum(flops[first:stop]) + (output if stop == len(flops) else 0)


def total_steps(recipe: Recipe) -> int:
    """Optimizer steps of the run: `train.steps`, or `train.budget_flops` converted to steps and rounded."""
    if recipe.train.steps is not None:
        return recipe.train.steps
    if recipe.train.budget_flops is None:
        raise RecipeError("train.steps and train.budget_flops are both null; set one, e.g. train.steps=1000")
    return round(recipe.train.budget_flops / flops_per_token(recipe.model) / recipe.batch_tokens)


def reference_scaling(recipe: Recipe) -> tuple[float, float, float]:
    """Factors from the recipe's reference rates to this run's: (lr_scale, width_scale, decay_scale).

    lr_scale: sqrt(batch tokens / reference batch), for every learning rate.
    width_scale: (hidden_size / 768)^-0.5, for embedding, output and tables in addition.
    decay_scale: lr_scale × reference_parameters / N, for the weight decay of block matrices. N counts matrices and
    output of the `projection` model of this shape, so that every value source trains with the same decay.
    """
    o = recipe.optimizer
    lr_scale = 1.0
    if o.reference_batch_tokens is not None:
        lr_scale = (recipe.batch_tokens / o.reference_batch_tokens) ** 0.5
    width_scale = (recipe.model.hidden_size / REFERENCE_WIDTH) ** -0.5
    decay_scale = lr_scale
    if o.reference_parameters is not None:
        counts = parameter_counts(dataclasses.replace(recipe.model, value=ValueConfig()))
        decay_scale *= o.reference_parameters / (counts["matrix"] + counts["output"])
    return lr_scale, width_scale, decay_scale


def effective_rates(recipe: Recipe) -> dict[str, dict[str, float]]:
    """Peak `lr` and `weight_decay` of each optimizer kind (keys: parameters.KINDS) after `reference_scaling`.

    As in the reference, weight decay is scaled for `matrix` only.
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
