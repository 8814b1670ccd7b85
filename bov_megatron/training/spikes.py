"""Detection of loss spikes."""

from __future__ import annotations

import math
import statistics
from collections import deque

NORMAL_DEVIATION = 1.4826
"""Standard deviation of a normal distribution, in median absolute deviations."""
LEAST_DEVIATION = 1e-3
"""Lower bound of the deviation relative to the median, for losses that hardly vary."""


class SpikeDetector:
    """Compares a loss with the median of the losses before it, in units of their median absolute deviation.

    Both are robust to outliers in the window.

    Args:
        window: number of losses to compare with.
        losses: `losses()` of an earlier detector, to continue from.
    """

    def __init__(self, window: int, losses: list[float] | None = None):
        self._window = window
        self._losses: deque[float] = deque(losses or [], maxlen=window)

    def deviations(self, loss: float) -> float:
        """Standard deviations by which `loss` exceeds the window's median; 0 before the window is full."""
        # At the start of a run the loss falls faster than it fluctuates, so a partial window is not used.
        if len(self._losses) < self._window or not math.isfinite(loss):
            return 0.0
        median = statistics.median(self._losses)
        spread = statistics.median(abs(previous - median) for previous in self._losses)
        return (loss - median) / max(NORMAL_DEVIATION * spread, LEAST_DEVIATION * abs(median))

    def add(self, loss: float) -> None:
        if math.isfinite(loss):
            self._losses.append(loss)

    def losses(self) -> list[float]:
        """The window, oldest first."""
        return list(self._losses)
