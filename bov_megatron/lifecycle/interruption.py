"""Reasons for a rank to end a run early: signals, its time limit, a lost lease. The trainer makes all ranks agree.

Imports nothing heavy, so that signals are handled while the framework is still being imported.
"""

from __future__ import annotations

import enum
import signal
import time
from typing import Any

from bov_megatron.lifecycle.lease import Lease


class StopReason(enum.IntEnum):
    """Why to end the run after the current step; the highest reason of all ranks counts."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3
    LEASE_LOST = 4
    """Another start has taken the run folder, e.g. while this one was suspended: save nothing."""

    def describe(self) -> str:
        """To follow "stopped by" in a message."""
        return "train.max_minutes" if self is StopReason.TIME_LIMIT else self.name


class StopSignals:
    """Context manager that records SIGTERM and SIGUSR1, which schedulers send before a time limit or a preemption.

    The second signal of a kind kills the process as usual.
    """

    REASONS = {signal.SIGTERM: StopReason.SIGTERM, signal.SIGUSR1: StopReason.SIGUSR1}

    def __init__(self):
        self.reason = StopReason.NONE
        self._former: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._former = {number: signal.signal(number, self._receive) for number in self.REASONS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        self.reason = max(self.reason, self.REASONS[signal.Signals(number)])
        signal.signal(number, self._former[number])


class StopRequest:
    """Call it for this rank's reason to stop.

    Args:
        signals: recorded signals.
        max_minutes: time limit, counted from now; None means no limit.
    """

    def __init__(self, signals: StopSignals, max_minutes: float | None):
        self.signals = signals
        self.lease: Lease | None = None
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def watch(self, lease: Lease) -> None:
        """Also stop when `lease` is lost."""
        self.lease = lease

    def __call__(self) -> StopReason:
        if self.lease is not None and self.lease.lost:
            return StopReason.LEASE_LOST
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return max(self.signals.reason, StopReason.TIME_LIMIT if late else StopReason.NONE)
