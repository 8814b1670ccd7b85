"""Which rank the others wait for: each rank's two durations of a step, and their extremes over all ranks.

Two things differ between ranks although all of them end a step together:

- the wait for data, of every rank;
- the time from the start of the forward pass until gradients are ready to be reduced, of model replicas. Tensor-,
  context- and pipeline-parallel ranks wait for each other inside it, so that all ranks of a replica are as slow as its
  slowest one; each replica is represented by the ranks of its first pipeline stage, whose backward pass ends last.

Both travel in the step's one reduction, a maximum of integers (Trainer.agree): a duration in microseconds with the
rank in its low bits.
"""

from __future__ import annotations

RANK_BITS = 20
"""A million ranks, and durations of up to 100 days."""
UNKNOWN = -(1 << 62)
"""Below every packed duration, negated or not."""


def pack(data_seconds: float, gradient_seconds: float | None, rank: int) -> list[int]:
    """This rank's words for a maximum over all ranks.

    Args:
        data_seconds: how long the step's batch was waited for.
        gradient_seconds: until gradients were ready; None on ranks that represent no replica, and with an engine that
            cannot tell.
    """
    data = _packed(data_seconds, rank)
    if gradient_seconds is None:
        return [data, UNKNOWN, UNKNOWN]
    own = _packed(gradient_seconds, rank)
    return [data, own, -own]


def unpack(words: list[int], replicas: int) -> dict[str, float | int]:
    """What the maximum over all ranks says, as fields of the step's line of metrics.

    Args:
        replicas: of the model; one alone is neither slow nor fast.
    """
    data, slowest, fastest = words
    told = dict(zip(("data_rank", "data_seconds"), _unpacked(data), strict=True))
    if replicas > 1 and slowest != UNKNOWN:
        told["slowest_rank"], told["slowest_rank_seconds"] = _unpacked(slowest)
        told["fastest_rank_seconds"] = _unpacked(-fastest)[1]
    return told


def _packed(seconds: float, rank: int) -> int:
    return round(seconds * 1e6) << RANK_BITS | rank


def _unpacked(word: int) -> tuple[int, float]:
    return word & (1 << RANK_BITS) - 1, (word >> RANK_BITS) / 1e6
