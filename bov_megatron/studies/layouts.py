"""Which layout a cell runs in: its memory on a GPU, and the smallest layout that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from bov_megatron.errors import RecipeError
from bov_megatron.recipe import ParallelConfig, Recipe, data_parallel_size, memory, pipeline
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
    return Layout(
        world_size,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.context_parallel_size,
        recipe.train.micro_batch_size,
        parallel.recompute,
        _memory(recipe, data_parallel),
    )


def _memory(recipe: Recipe, data_parallel: int) -> int:
    """Bytes of the fullest rank."""
    stages = memory.memory_by_stage(recipe, pipeline.layers_of_chunks(recipe), data_parallel)
    return max(sum(stage.values()) for stage in stages)


def smallest_layout(recipe: Recipe, world_size: int, gpu: Gpu) -> Layout | None:
    """The layout with the fewest model-parallel ranks that fits on `gpu`, None where none does.

    At equal ranks tensor parallelism comes before pipelines; the micro-batch is the largest that fits, at most the
    recipe's. Full recomputation, which costs a third more time, is tried last. It runs on `world_size` ranks, rounded
    up to whole copies of the model.
    """
    sizes = [size for size in divisors(recipe.train.global_batch_size) if size <= recipe.train.micro_batch_size]
    for parallel in _splits(recipe, world_size, gpu):
        found = None
        for micro_batch in sizes:
            layout = _try(recipe, parallel, micro_batch, _whole_copies(world_size, parallel.model_parallel_size))
            if layout is not None and not layout.fits(gpu):
                break  # nor does a larger one
            found = layout or found
        if found is not None:
            return found
    return None


def _whole_copies(world_size: int, ranks: int) -> int:
    return -(-world_size // ranks) * ranks


def _splits(recipe: Recipe, world_size: int, gpu: Gpu) -> Iterator[ParallelConfig]:
    """Ways to split the model, in the order of preference."""
    own = recipe.parallel
    length = recipe.model.sequence_length // own.context_parallel_size
    for recompute in dict.fromkeys((own.recompute, "full")):
        for ranks in (2**i for i in range(MOST_RANKS.bit_length())):
            for tensor in (2**i for i in reversed(range(ranks.bit_length())) if 2**i <= GPUS_PER_NODE):
                one_stage = replace(
                    own,
                    tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=1,
                    virtual_pipeline_model_parallel_size=1,
                    pipeline_balance="layers",
                    pipeline_layers=None,
                    sequence_parallel=tensor > 1 and length % tensor == 0,
                    recompute=recompute,
                )
                stages = ranks // tensor
                copy = ranks * own.context_parallel_size
                share = _memory(_with(recipe, one_stage, 1), _whole_copies(world_size, copy) // copy) / stages
                # Balancing by memory takes long to compute: not where even equal shares would be too large.
                if share <= usable_bytes(gpu):
                    yield replace(one_stage, pipeline_model_parallel_size=stages)
                    if stages > 1:
                        yield replace(one_stage, pipeline_model_parallel_size=stages, pipeline_balance="memory")


def _with(recipe: Recipe, parallel: ParallelConfig, micro_batch_size: int) -> Recipe:
    return replace(recipe, parallel=parallel, train=replace(recipe.train, micro_batch_size=micro_batch_size))


def _try(recipe: Recipe, parallel: ParallelConfig, micro_batch_size: int, world_size: int) -> Layout | None:
    """The layout of `recipe` split like this; None where heads, layers or batch don't divide, or the value source can't
    be split so."""
    candidate = _with(recipe, parallel, micro_batch_size)
    try:
        check_layout(candidate)
        layout = layout_of(candidate, world_size)
    except RecipeError:
        return None
    changed = {f"parallel.{name}": value for name, value in vars(parallel).items()}
    changed = {name: value for name, value in changed.items() if value != vars(recipe.parallel)[name[9:]]}
    if micro_batch_size != recipe.train.micro_batch_size:
        changed["train.micro_batch_size"] = micro_batch_size
    return replace(layout, overrides=tuple(override(name, value) for name, value in changed.items()))
