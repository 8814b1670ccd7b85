"""From what is evaluated to a scorer, on one process or on all that were started together."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

import torch.distributed as dist

from bov_megatron.evaluation.core.evaluation import Place
from bov_megatron.evaluation.core.scorers import EngineScorer, Scorer, TransformersScorer
from bov_megatron.evaluation.layout import Layout, open_engine
from bov_megatron.evaluation.target import Target
from bov_megatron.parallel.device import has_gpu

PATIENCE = datetime.timedelta(days=1)
"""For a process that has less to score than the others."""


@contextlib.contextmanager
def open_scorer(
    target: Target, layout: Layout, device: str | None = None, dtype: str = "auto", bank_device: str | None = None
) -> Iterator[tuple[Scorer, int, Place]]:
    """A scorer, the longest sequence it takes, and this process's place; collective over the world's processes.

    A model that the layout doesn't split is loaded whole by every process. Raises EvaluationError or CheckpointError.
    """
    if layout.model_ranks > 1:
        from megatron.core import parallel_state

        with open_engine(target, layout, dtype, bank_device) as engine:
            model_ranks = parallel_state.get_model_parallel_group()
            data_ranks = parallel_state.get_data_parallel_group()
            place = Place(data_ranks.rank(), data_ranks.size(), model_ranks.rank() == 0, dist.barrier)
            yield EngineScorer(engine), engine.recipe.model.sequence_length, place
        return
    world = layout.world
    several = world.world_size > 1
    if several and device is None and has_gpu():
        device = f"cuda:{world.local_rank}"
    model = target.load(device, dtype, bank_device)  # before the group: a checkpoint is read in a group of its own
    if several:
        dist.init_process_group("gloo", timeout=PATIENCE)  # only to wait for each other
    try:
        place = Place(world.rank, world.world_size, wait=dist.barrier if several else lambda: None)
        yield TransformersScorer(model), model.config.max_position_embeddings, place
    finally:
        if several:
            dist.destroy_process_group()
