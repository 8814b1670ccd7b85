"""Which layers each pipeline stage holds.

A stage holds one model chunk, or several in an interleaved pipeline (`virtual_pipeline_model_parallel_size`). A forward
pass goes through chunk 0 of every stage, then chunk 1 of every stage, and so on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from bov_megatron.recipe.fields import Recipe
from bov_megatron.recipe.memory import stage_bytes
from bov_megatron.recipe.quantities import stage_flops


def chunk_sizes(recipe: Recipe) -> list[int]:
    """Number of layers of every model chunk, in the order of a forward pass."""
    parallel, layers = recipe.parallel, recipe.model.num_layers
    count = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    if parallel.pipeline_layers is not None:
        return list(parallel.pipeline_layers)
    if count == 1 or parallel.pipeline_balance == "layers":
        return [layers // count] * count
    return balanced_sizes(layers, count, _cost(recipe))


def balanced_sizes(layers: int, count: int, cost: Callable[[int, int, int], float]) -> list[int]:
    """Split `layers` into `count` consecutive parts, none empty, such that the most expensive part costs the least.

    `cost(part, first, stop)` is the cost of layers `[first, stop)` as part number `part`. Ties go to the most even
    split. Returns the sizes.
    """
    # best[stop]: (largest cost, sum of squared costs, sizes) of the best split of layers [0, stop) so far.
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
    # The number of data-parallel ranks is unknown here, and the split must not depend on it.
    return stage_bytes(recipe, data_parallel_size=1)


def layers_of_chunks(recipe: Recipe) -> list[list[range]]:
    """0-based layers by pipeline stage and, within it, model chunk."""
    stages, ends = recipe.parallel.pipeline_model_parallel_size, list(itertools.accumulate(chunk_sizes(recipe)))
    chunks = [range(first, stop) for first, stop in zip([0, *ends], ends, strict=False)]
    return [chunks[stage::stages] for stage in range(stages)]


def megatron_layout(recipe: Recipe) -> list[list[str]] | None:
    """Megatron's `pipeline_model_parallel_layout` of the chunks; None without a pipeline."""
    if recipe.parallel.pipeline_model_parallel_size == 1:
        return None
    rows = [["decoder"] * size for size in chunk_sizes(recipe)]
    return [["embedding", *rows[0]], *rows[1:-1], [*rows[-1], "loss"]]
