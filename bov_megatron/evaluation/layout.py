"""A checkpoint to evaluate, on the ranks that were started together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from bov_megatron.engines.base import Engine
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.target import Target
from bov_megatron.exchange.convert import open_checkpoint
from bov_megatron.parallel.launch import World
from bov_megatron.recipe import ParallelConfig


@contextlib.contextmanager
def open_engine(target: Target, world: World, tensor: int, pipeline: int, dtype: str) -> Iterator[Engine]:
    """The checkpoint on `tensor` × `pipeline` ranks; what remains of the world is data-parallel; collective over it.

    `dtype` is as in `Target.load`. Raises EvaluationError or CheckpointError.
    """
    if target.is_export:
        raise EvaluationError(
            f"{target.folder} is an export, which can't be split over ranks, and only --core shares its examples over "
            "several processes: start one, without --tensor-parallel and --pipeline-parallel, or give the run that it "
            "was made from"
        )
    if world.world_size % (tensor * pipeline):
        raise EvaluationError(
            f"--tensor-parallel {tensor} × --pipeline-parallel {pipeline} ranks don't divide the {world.world_size} "
            "that were started: start a multiple of them, e.g. torchrun --nproc-per-node "
            f"{tensor * pipeline} tools/evaluate.py …"
        )
    layout = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_balance="layers" if pipeline == 1 else "time",  # of any number of layers
    )
    precision = {"auto": None, "float32": "fp32", "bfloat16": "bf16"}[dtype]
    with open_checkpoint(target.folder, layout, precision, world) as engine:
        yield engine
