"""Which layout a cell runs in: its memory on a GPU, and the smallest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bov_megatron.errors import RecipeError
from bov_megatron.recipe import Recipe, data_parallel_size, memory, pipeline
from bov_megatron.recipe.gpus import Gpu
from bov_megatron.recipe.layout_checks import check_layout
from bov_megatron.recipe.limits import divisors
from bov_megatron.studies.study_file import override

RESERVED_BYTES = 4 * 2**30
"""Of a GPU's memory, for what the estimate leaves out: CUDA, communication, workspaces, fragmentation."""
MOST_RANKS = 64
"""Ranks of the largest model copy that is tried."""
GPUS_PER_NODE = 8
"""Tensor parallelism stays within a node."""


def usable_bytes(gpu: Gpu) -> float:
    return gpu.memory_bytes - RESERVED_BYTES


@dataclass(frozen=True)
class Layout:
    """One way to run a cell."""

    world_size: int
    tensor_model_parallel_size: int
    pipeline_model_parallel_size: int
    context_parallel_size: int
    micro_batch_size: int
    recompute: str
    memory_per_rank_bytes: int
    """Of the fullest rank, estimated (docs/use/plan.md)."""
    overrides: tuple[str, ...] = ()
    """What to add to the cell's size to get it; empty for the layout that the cell has."""

    def fits(self, gpu: Gpu) -> bool:
        return self.memory_per_rank_bytes <= usable_bytes(gpu)

    def __str__(self) -> str:
        names = ("tensor", "pipeline", "context")
        sizes = (self.tensor_model_parallel_size, self.pipeline_model_parallel_size, self.context_parallel_size)
        split = [f"{name} {size}" for name, size in zip(names, sizes, strict=True) if size > 1]
        data = self.world_size
        for size in sizes:
            data //= size
        parts = [*split, *([f"data {data}"] if data > 1 or not split else [])]
        more = f", {self.recompute} recomputation" if self.recompute != "none" else ""
        return f"{' × '.join(parts)}, micro-batch {self.micro_batch_size}{more}"


def layout_of(recipe: Recipe, world_size: int) -> Layout:
    """The layout that `recipe` asks for, with its memory. Raises RecipeError where it doesn't fit `world_size`."""
    parallel = recipe.parallel
    data_parallel = data_parallel_size(recipe, world_size)
    stages = memory.memory_by_stage(recipe, pipeline.layers_of_chunks(recipe), data_parallel)
    return Layout(
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        recipe.train.micro_batch_size,
        parallel.recompute,
        max(sum(stage.values()) for stage in stages),
    )


def smallest_layout(recipe: Recipe, world_size: int, gpu: Gpu) -> Layout | None:
    """The layout with the fewest model-parallel ranks that fits on `gpu`, None where none does.

    At equal ranks tensor parallelism comes before pipelines and a large micro-batch before a small one; full
    recomputation, which costs a third more time, is tried last. It runs on `world_size` ranks, rounded up to whole
    copies of the model.
    """
    for candidate, fields in _candidates(recipe):
        copy = candidate.parallel.model_parallel_size
        try:
            check_layout(candidate)
            layout = layout_of(candidate, -(-world_size // copy) * copy)
        except RecipeError:
            continue  # heads, layers or batch don't divide, or the value source can't be split so
        if layout.fits(gpu):
            return replace(layout, overrides=tuple(override(name, value) for name, value in fields.items()))
    return None


def _candidates(recipe: Recipe) -> Iterator[tuple[Recipe, dict[str, object]]]:
    """Recipes in the order of preference, with the fields that differ from `recipe`'s."""
    context = recipe.parallel.context_parallel_size
    micro_batches = [size for size in divisors(recipe.train.global_batch_size) if size <= recipe.train.micro_batch_size]
    for recompute in dict.fromkeys((recipe.parallel.recompute, "full")):
        for ranks in (2**i for i in range(MOST_RANKS.bit_length())):
            for tensor in (2**i for i in reversed(range(ranks.bit_length())) if 2**i <= GPUS_PER_NODE):
                for balance in ("layers", "memory") if ranks > tensor else ("layers",):
                    for micro_batch in reversed(micro_batches):
                        parallel = replace(
                            recipe.parallel,
                            tensor_model_parallel_size=tensor,
                            pipeline_model_parallel_size=ranks // tensor,
                            virtual_pipeline_model_parallel_size=1,
                            pipeline_balance=balance,
                            pipeline_layers=None,
                            context_parallel_size=context,
                            sequence_parallel=tensor > 1 and recipe.model.sequence_length % (tensor * context) == 0,
                            recompute=recompute,
                        )
                        train = replace(recipe.train, micro_batch_size=micro_batch)
                        yield (
                            replace(recipe, parallel=parallel, train=train),
                            _differences(recipe, parallel, micro_batch),
                        )


def _differences(recipe: Recipe, parallel: object, micro_batch_size: int) -> dict[str, object]:
    fields = {
        f"parallel.{name}": value for name, value in vars(parallel).items() if value != getattr(recipe.parallel, name)
    }
    if micro_batch_size != recipe.train.micro_batch_size:
        fields["train.micro_batch_size"] = micro_batch_size
    return fields
