"""Which rank the others wait for, from two durations of a step:

- the wait for data, on every rank;
- the time from the start of the forward pass until gradients are ready to be reduced, for every model replica. Tensor-,
  context- and pipeline-parallel ranks wait for each other inside it, so all ranks of a replica are as slow as its
  slowest. It is taken on the replica's first pipeline stage, whose backward pass ends last.
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
    """Adds `data_rank` and `data_seconds` to logged lines, and with several replicas `slowest_rank`, its seconds and
    those of the fastest rank."""

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
    """Numbers to take the maximum of over all ranks: wait for data, slowest gradients, fastest gradients (negated).

    Args:
        gradient_seconds: None on later pipeline stages, and with an engine that doesn't measure it.
    """
    if gradient_seconds is None:
        return [data_seconds, -math.inf, -math.inf]
    return [data_seconds, gradient_seconds, -gradient_seconds]


def ranks_of(own: Sequence[float], extremes: Sequence[float], rank: int) -> list[float]:
    """`rank` where the extreme is this rank's own, else -1; the maximum over ranks gives the rank of each extreme."""
    return [rank if mine == extreme else -1 for mine, extreme in zip(own, extremes, strict=True)]


def fields(extremes: Sequence[float], ranks: Sequence[int], replicas: int) -> dict[str, float | int]:
    """Fields of the step's line of metrics from both maxima; those of gradients only with several replicas."""
    data, slowest, fastest = extremes
    result = {"data_rank": ranks[0], "data_seconds": data}
    if replicas > 1 and math.isfinite(slowest):
        result |= {"slowest_rank": ranks[1], "slowest_rank_seconds": slowest, "fastest_rank_seconds": -fastest}
    return result


def _highest(numbers: Sequence[float]) -> list[float]:
    highest = torch.tensor(numbers, dtype=torch.float64, device=device())
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    return highest.tolist()
