"""Which layers each pipeline stage holds. Decided here and nowhere else: the plan, the recipe's checks and Megatron's
configuration ask this file. Imports nothing heavy.

A stage holds one model chunk, or several of an interleaved pipeline (`virtual_pipeline_model_parallel_size`). A forward
pass goes through chunk 0 of every stage, then chunk 1 of every stage, and so on.
"""

from __future__ import annotations

import itertools

from bov_megatron.recipe import Recipe


def chunk_sizes(recipe: Recipe) -> list[int]:
    """Layers of every model chunk, in the order of a forward pass."""
    parallel = recipe.parallel
    count = parallel.pipeline_model_parallel_size * parallel.virtual_pipeline_model_parallel_size
    return [recipe.model.num_layers // count] * count


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
