"""Losses far above what the last steps led to expect."""

from __future__ import annotations

import math
import statistics
from collections import deque

NORMAL_DEVIATION = 1.4826
"""Standard deviation of a normal distribution in units of its median absolute deviation."""
LEAST_DEVIATION = 1e-3
"""Of the median: losses that hardly vary at all must not make a spike of nothing."""


class SpikeDetector:
    """Robust deviations of a loss from the losses before it.

    Median and median absolute deviation of the window, which a few outliers in it don't move. Nothing is judged before
    the window is full: in a run's first steps the loss moves more than it varies.

    Args:
        window: losses to compare with.
        losses: those seen already, as `losses()` gave them.
    """

    def __init__(self, window: int, losses: list[float] | None = None):
        self._losses: deque[float] = deque(losses or [], maxlen=window)

    def deviations(self, loss: float) -> float:
        """How many standard deviations `loss` lies above the window's median; 0 before the window is full."""
        if len(self._losses) < self._losses.maxlen or not math.isfinite(loss):
            return 0.0
        median = statistics.median(self._losses)
        spread = statistics.median(abs(one - median) for one in self._losses)
        return (loss - median) / max(NORMAL_DEVIATION * spread, LEAST_DEVIATION * abs(median))

    def add(self, loss: float) -> None:
        """A loss that later ones are compared with."""
        if math.isfinite(loss):
            self._losses.append(loss)

    def losses(self) -> list[float]:
        """The window, oldest first."""
        return list(self._losses)
