"""From what is evaluated to a scorer, on one process or on all that were started together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.core.evaluation import Place
from bov_megatron.evaluation.core.scorers import EngineScorer, Scorer, TransformersScorer
from bov_megatron.evaluation.target import Target
from bov_megatron.parallel.device import has_gpu
from bov_megatron.parallel.launch import World
from bov_megatron.recipe import ParallelConfig


@contextlib.contextmanager
def open_scorer(
    target: Target, world: World, tensor: int = 1, pipeline: int = 1, device: str | None = None, dtype: str = "auto"
) -> Iterator[tuple[Scorer, int, Place]]:
    """A scorer, the longest sequence it takes, and this process's place; collective over the world's processes.

    With `tensor` or `pipeline` above 1, the checkpoint is loaded in that layout, and what remains of the world is
    data-parallel; else every process has a whole model of its own. Raises EvaluationError or CheckpointError.
    """
    if tensor * pipeline > 1:
        with _engine(target, world, tensor, pipeline, dtype) as opened:
            yield opened
        return
    several = world.world_size > 1
    if several and device is None and has_gpu():
        device = f"cuda:{world.local_rank}"
    model = target.load(device, dtype)  # before the group: a checkpoint is read in a group of its own
    if several:
        dist.init_process_group("gloo")  # only to wait for each other
    try:
        place = Place(world.rank, world.world_size, wait=dist.barrier if several else lambda: None)
        yield TransformersScorer(model), model.config.max_position_embeddings, place
    finally:
        if several:
            dist.destroy_process_group()


@contextlib.contextmanager
def _engine(
    target: Target, world: World, tensor: int, pipeline: int, dtype: str
) -> Iterator[tuple[Scorer, int, Place]]:
    if target.is_export:
        raise EvaluationError(
            f"{target.folder} is an export, which every process loads whole: leave out --tensor-parallel and "
            "--pipeline-parallel, or give the run that it was made from"
        )
    if world.world_size % (tensor * pipeline):
        raise EvaluationError(
            f"--tensor-parallel {tensor} × --pipeline-parallel {pipeline} ranks don't divide the {world.world_size} "
            "that were started: start a multiple of them, e.g. torchrun --nproc-per-node "
            f"{tensor * pipeline} tools/evaluate.py …"
        )
    from megatron.core import parallel_state

    from bov_megatron.exchange.convert import open_checkpoint

    layout = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    precision = {"auto": None, "float32": "fp32", "bfloat16": "bf16"}[dtype]
    with open_checkpoint(target.folder, layout, precision, world) as engine:
        is_first = (
            parallel_state.get_tensor_model_parallel_rank() == 0 == parallel_state.get_pipeline_model_parallel_rank()
        )
        place = Place(
            parallel_state.get_data_parallel_rank(),
            parallel_state.get_data_parallel_world_size(),
            is_first,
            dist.barrier,
        )
        yield EngineScorer(engine), engine.recipe.model.sequence_length, place
