"""Which rank the others wait for: each rank's two durations of a step, and their extremes over all ranks.

Two things differ between ranks although all of them end a step together:

- the wait for data, of every rank;
- the time from the start of the forward pass until gradients are ready to be reduced, of model replicas. Tensor-,
  context- and pipeline-parallel ranks wait for each other inside it, so that all ranks of a replica are as slow as its
  slowest one; each replica is represented by the ranks of its first pipeline stage, whose backward pass ends last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bov_megatron.parallel.device import device
from bov_megatron.training.trainer import Callback


class SlowestRank(Callback):
    """Adds `data_rank` and `data_seconds`, and with several replicas `slowest_rank`, its seconds and the fastest's, to
    the lines that are logged."""

    def __init__(self, interval: int):
        self.interval = interval

    def after_step(self, trainer, record):
        if not trainer.is_due(self.interval):
            return
        own = durations(trainer.data_seconds, trainer.engine.gradient_seconds)
        extremes = _highest(own)
        ranks = [int(rank) for rank in _highest(ranks_of(own, extremes, dist.get_rank()))]
        record.update(fields(extremes, ranks, parallel_state.get_data_parallel_world_size()))


def durations(data_seconds: float, gradient_seconds: float | None) -> list[float]:
    """This rank's numbers for a maximum over all ranks: of the data, the slowest gradients, the fastest (negated).

    Args:
        gradient_seconds: None on ranks that represent no replica, and with an engine that cannot tell.
    """
    if gradient_seconds is None:
        return [data_seconds, -math.inf, -math.inf]
    return [data_seconds, gradient_seconds, -gradient_seconds]


def ranks_of(own: Sequence[float], extremes: Sequence[float], rank: int) -> list[float]:
    """`rank` where the extreme is this rank's own, else -1: again for a maximum over all ranks."""
    return [rank if mine == extreme else -1 for mine, extreme in zip(own, extremes, strict=True)]


def fields(extremes: Sequence[float], ranks: Sequence[int], replicas: int) -> dict[str, float | int]:
    """What both maxima say, as fields of the step's line of metrics; one replica alone is neither slow nor fast."""
    data, slowest, fastest = extremes
    found = {"data_rank": ranks[0], "data_seconds": data}
    if replicas > 1 and math.isfinite(slowest):
        found |= {"slowest_rank": ranks[1], "slowest_rank_seconds": slowest, "fastest_rank_seconds": -fastest}
    return found


def _highest(numbers: Sequence[float]) -> list[float]:
    highest = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest.tolist()
