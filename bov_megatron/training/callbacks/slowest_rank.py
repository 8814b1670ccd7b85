"""Which rank the others wait for, from two durations that the ranks' agreement carries with it:

- this step's wait for data, on every rank;
- the time from the start of the forward pass until gradients are ready to be reduced, for every model replica, in the
  step before: of this one the host doesn't know it yet. Tensor-, context- and pipeline-parallel ranks wait for each
  other inside it, so all ranks of a replica are as slow as its slowest. It is taken on the replica's first pipeline
  stage, whose backward pass ends last.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron.core import parallel_state

from bov_megatron.training.trainer import Callback


class SlowestRank(Callback):
    """Adds `data_rank` and `data_seconds` to logged lines, and with several replicas `slowest_rank`, its seconds and
    those of the fastest rank."""

    def __init__(self, interval: int):
        self.interval = interval

    def after_step(self, trainer, record):
        if trainer.is_due(self.interval):
            replicas = parallel_state.get_data_parallel_world_size()
            longest, ranks = trainer.longest_durations
            record.update(fields(longest, ranks, replicas))


def fields(extremes: Sequence[float], ranks: Sequence[int], replicas: int) -> dict[str, float | int]:
    """Fields of the step's line of metrics from the maxima of `durations` and whose they are; those of gradients only
    with several replicas."""
    data, slowest, fastest = extremes
    result = {"data_rank": ranks[0], "data_seconds": data}
    if replicas > 1 and math.isfinite(slowest):
        result |= {"slowest_rank": ranks[1], "slowest_rank_seconds": slowest, "fastest_rank_seconds": -fastest}
    return result
