"""Which layers each pipeline stage holds. Decided here and nowhere else: the plan, the recipe's checks and Megatron's
configuration ask this file. Imports nothing heavy.

A stage holds one model chunk, or several of an interleaved pipeline (`virtual_pipeline_model_parallel_size`). A forward
pass goes through chunk 0 of every stage, then chunk 1 of every stage, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from bov_megatron.recipe.fields import Recipe
from bov_megatron.recipe.memory import stage_bytes
from bov_megatron.recipe.quantities import stage_flops


def chunk_sizes(recipe: Recipe) -> list[int]:
    """Layers of every model chunk, in the order of a forward pass."""
    parallel, layers = recipe.parallel, recipe.model.num_layers
    count = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    if parallel.pipeline_layers is not None:
        return list(parallel.pipeline_layers)
    if count == 1 or parallel.pipeline_balance == "layers":
        return [layers // count] * count
    return balanced_sizes(layers, count, _cost(recipe))


def balanced_sizes(layers: int, count: int, cost: Callable[[int, int, int], float]) -> list[int]:
    """Sizes of `count` consecutive parts, none empty, of `layers` layers: those with the least expensive worst part.

    `cost(part, first, stop)` is what layers `[first, stop)` cost as that part. Of equally good choices an even one.
    """
    # best[stop]: (cost of the worst part, sum of their squares, sizes) of the parts so far, if they end at `stop`.
    best = {stop: (worst := cost(0, 0, stop), worst**2, [stop]) for stop in range(1, layers - count + 2)}
    for part in range(1, count):
        last_stop = layers - (count - 1 - part)
        stops = range(part + 1, last_stop + 1) if part < count - 1 else [layers]
        longer = {}
        for stop in stops:
            choices = []
            for first in (first for first in best if first < stop):
                here = cost(part, first, stop)
                worst, squares, sizes = best[first]
                choices.append((max(worst, here), squares + here**2, [*sizes, stop - first]))
            longer[stop] = min(choices)
        best = longer
    return best[layers][2]


def _cost(recipe: Recipe) -> Callable[[int, int, int], float]:
    if recipe.parallel.pipeline_balance == "time":
        flops = stage_flops(recipe)
        return lambda part, first, stop: flops(first, stop)
    # How many ranks will share the optimizer's state is unknown here, and the layout must not depend on it.
    return stage_bytes(recipe, data_parallel_size=1)


def layers_of_chunks(recipe: Recipe) -> list[list[range]]:
    """0-based layers by pipeline stage and, within it, model chunk."""
    stages, ends = recipe.parallel.pipeline_model_parallel_size, list(itertools.accumulate(chunk_sizes(recipe)))
    chunks = [range(first, stop) for first, stop in zip([0, *ends], ends, strict=False)]
    return [chunks[stage::stages] for stage in range(stages)]


def layers_of_stages(recipe: Recipe) -> list[list[int]]:
    """0-based layers by pipeline stage."""
    return [[layer for chunk in chunks for layer in chunk] for chunks in layers_of_chunks(recipe)]


def megatron_layout(recipe: Recipe) -> list[list[str]] | None:
    """The same as Megatron's `pipeline_model_parallel_layout`; None without a pipeline."""
    if recipe.parallel.pipeline_model_parallel_size == 1:
        return None
    rows = [["decoder"] * size for size in chunk_sizes(recipe)]
    return [["embedding", *rows[0]], *rows[1:-1], [*rows[-1], "loss"]]
