"""Why a run ends early: a signal, its own time limit. What each rank knows of it; the trainer makes all ranks agree.

Imports nothing heavy: signals are heard from the first second, while the framework is still being imported.
"""

from __future__ import annotations

import enum
import signal
import time
from typing import Any

from bov_megatron.lifecycle.lease import Lease


class StopReason(enum.IntEnum):
    """Why a run is to end after the current step; of several ranks' reasons the highest counts."""

    NONE = 0
    TIME_LIMIT = 1
    SIGUSR1 = 2
    SIGTERM = 3
    LEASE_LOST = 4
    """Another start has taken the run folder, e.g. while this one was suspended: nothing may be saved."""

    def describe(self) -> str:
        """For a message: `stopped by …`."""
        return "train.max_minutes" if self is StopReason.TIME_LIMIT else self.name


class StopSignals:
    """Notes SIGTERM and SIGUSR1, what schedulers send before a time limit or a preemption, instead of dying of them.

    The same signal a second time kills as usual. A context manager; leaving it restores the former handlers.
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
    """What this rank knows: call it for the reason to stop, if any.

    Args:
        signals: those received so far.
        max_minutes: time this start of the run may take, counted from here; None means no limit.
    """

    def __init__(self, signals: StopSignals, max_minutes: float | None):
        self.signals = signals
        self.lease: Lease | None = None
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes

    def watch(self, lease: Lease) -> None:
        """Stop also when `lease` is lost."""
        self.lease = lease

    def __call__(self) -> StopReason:
        if self.lease is not None and self.lease.lost:
            return StopReason.LEASE_LOST
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return max(self.signals.reason, StopReason.TIME_LIMIT if late else StopReason.NONE)
