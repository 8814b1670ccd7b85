"""A checkpoint to evaluate, on the ranks that were started together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bov_megatron.engines.base import Engine
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.target import Target
from bov_megatron.exchange.convert import open_checkpoint
from bov_megatron.parallel.launch import World, detect_world, export_world
from bov_megatron.recipe import ParallelConfig


@dataclass(frozen=True)
class Layout:
    """This process's world, and how many of its ranks share a model; the rest is data-parallel."""

    world: World
    tensor: int = 1
    pipeline: int = 1

    @property
    def model_ranks(self) -> int:
        return self.tensor * self.pipeline


def detect_layout(tensor: int = 1, pipeline: int = 1) -> Layout:
    """The layout of the processes that were started with this one. Raises LaunchError or EvaluationError."""
    world = detect_world()
    if world.world_size % (tensor * pipeline):
        raise EvaluationError(
            f"--tensor-parallel {tensor} × --pipeline-parallel {pipeline} ranks don't divide the {world.world_size} "
            "that were started: start a multiple of them, e.g. bov torchrun --nproc-per-node "
            f"{tensor * pipeline} evaluate …"
        )
    if world.world_size > 1:
        export_world(world)
    return Layout(world, tensor, pipeline)


@contextlib.contextmanager
def open_engine(target: Target, layout: Layout, dtype: str, bank_device: str | None = None) -> Iterator[Engine]:
    """The checkpoint over all ranks of the world; collective over them.

    `dtype` is as in `Target.load`; a `bank_device` is refused. Raises EvaluationError, CheckpointError, or RecipeError
    for a layout that the model can't have.
    """
    if target.is_export:
        raise EvaluationError(
            f"{target.folder} is an export, which can't be split over ranks, and only --core shares its examples over "
            "several processes: start one, without --tensor-parallel and --pipeline-parallel, or give the run that it "
            "was made from"
        )
    if bank_device is not None:
        raise EvaluationError(
            f"--bank-device {bank_device}: ranks that share a model hold its tables between them; leave it out"
        )
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        pipeline_balance="layers" if layout.pipeline == 1 else "time",  # of any number of layers
    )
    precisions: dict[str, Literal["fp32", "bf16"] | None] = {"auto": None, "float32": "fp32", "bfloat16": "bf16"}
    world = layout.world if layout.world.world_size > 1 else None  # one process needs no address to meet at
    with open_checkpoint(target.folder, parallel, precisions[dtype], world) as engine:
        yield engine
