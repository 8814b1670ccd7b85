"""Comparing variants on a machine that isn't idle.

Variants take turns (A B, B A, A B, …), so that other load affects them alike; reported are median and range of the
ratio within each turn. On a CPU this process's CPU time is measured too, which other programs hardly affect.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from scipy.stats import quantile_test

from bov_megatron.parallel.device import has_gpu


@dataclass(frozen=True)
class Spread:
    """A measured quantity over turns."""

    median: float
    minimum: float
    maximum: float
    low: float | None = None
    high: float | None = None
    """Bounds of the median's 95% confidence interval, by order statistics; None below six turns."""

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        spread = Spread(statistics.median(values), min(values), max(values))
        if len(values) < 6:
            return spread
        interval = quantile_test(values, q=spread.median, p=0.5).confidence_interval(0.95)
        return replace(spread, low=float(interval.low), high=float(interval.high))


@dataclass
class Timings:
    """Seconds of one variant in each turn."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    """Summed over this process's threads."""


def take_turns(variants: Mapping[str, Callable[[int], object]], turns: int, discard: int = 1) -> dict[str, Timings]:
    """Time each variant in each turn; every second turn runs in reverse order.

    Args:
        variants: by name; called with the number of the turn, so that all of them can do the same work.
        turns: how often to time each.
        discard: number of first turns not to count (allocation, caches, compilation).
    """
    timings = {name: Timings() for name in variants}
    for turn in range(discard + turns):
        for name in list(variants)[:: -1 if turn % 2 else 1]:
            _synchronize()
            wall, processor = time.perf_counter(), time.process_time()
            variants[name](turn)
            _synchronize()
            if turn >= discard:
                timings[name].wall.append(time.perf_counter() - wall)
                timings[name].processor.append(time.process_time() - processor)
    return timings


def speed_ratio(timings: Mapping[str, Timings], name: str, reference: str) -> dict[str, Spread]:
    """How many times as fast as `reference` is `name`, turn by turn; above 1 is faster.

    Keys: `wall`, and on a CPU `processor`.
    """
    clocks = ["wall"] if has_gpu() else ["wall", "processor"]
    return {
        clock: Spread.of(
            [
                theirs / ours
                for ours, theirs in zip(getattr(timings[name], clock), getattr(timings[reference], clock), strict=True)
            ]
        )
        for clock in clocks
    }


def _synchronize() -> None:
    """Wait for the GPU, if there is one: kernels run behind Python's back."""
    if has_gpu():
        torch.cuda.synchronize()
