"""Ctrl-C and other reasons to end early, of training and of the tools. The trainer makes all ranks agree.

Imports nothing heavy, so that signals are heard while everything else is still being imported.
"""

from __future__ import annotations

import contextlib
import enum
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from bov_megatron import errors
from bov_megatron.lifecycle import exit_status
from bov_megatron.lifecycle.signals import Listener, end, speaks, tell

if TYPE_CHECKING:
    from bov_megatron.lifecycle.lease import Lease


class StopReason(enum.IntEnum):
    """Why to end the run after the current step; the highest reason of all ranks counts."""

    NONE = 0
    TIME_LIMIT = 1
    JOB_END = 2
    """Slurm's time limit, less what saving takes."""
    SIGUSR1 = 3
    SIGINT = 4
    """Ctrl-C."""
    SIGTERM = 5
    LEASE_LOST = 6
    """Another start has taken the run folder, e.g. while this one was suspended: save nothing."""

    def describe(self) -> str:
        """To follow "stopped by" in a message."""
        return {
            StopReason.TIME_LIMIT: "train.max_minutes",
            StopReason.JOB_END: "the job's time limit",
            StopReason.SIGINT: "Ctrl-C",
        }.get(self, self.name)


class StopSignals(Listener):
    """Records Ctrl-C, and SIGTERM and SIGUSR1, which schedulers send before a time limit or a preemption.

    The second signal of a kind ends the process at once. So does, after a first one, the end of torchrun: its ranks are
    not in the terminal's foreground, and it passes on only the first Ctrl-C.
    """

    REASONS = {
        signal.SIGINT: StopReason.SIGINT,
        signal.SIGTERM: StopReason.SIGTERM,
        signal.SIGUSR1: StopReason.SIGUSR1,
    }

    def __init__(self):
        super().__init__(tuple(self.REASONS))
        self.reason = StopReason.NONE
        self._nothing_begun = False
        self._torchrun = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    @contextlib.contextmanager
    def nothing_begun(self) -> Iterator[None]:
        """Within it a signal ends the process at once; for a start with nothing done that nobody else waits for."""
        self._nothing_begun = True
        if self.reason:  # heard before
            self._end_before_the_first_step(self.reason)
        yield
        self._nothing_begun = False

    def handle(self, number: signal.Signals) -> None:
        self.reason = max(self.reason, self.REASONS[number])

    def first(self, number: signal.Signals) -> None:
        if self._nothing_begun:
            self._end_before_the_first_step(self.REASONS[number])
        if speaks():
            name = self.REASONS[number].describe()
            tell(f"{name}: the run ends after the current step and saves all steps done; once more ends it at once")

    def _end_before_the_first_step(self, reason: StopReason) -> None:
        tell(f"stopped by {reason.describe()} before the first step")
        exit_status.report(errors.INTERRUPTED)
        end(errors.INTERRUPTED)

    def waiting(self, since: float) -> None:
        if self._torchrun is not None and os.getppid() != self._torchrun:
            end(errors.CTRL_C)


_SLACK_SECONDS = 15.0
"""For leaving, and since schedulers end jobs some seconds earlier or later than they say."""


class StopRequest:
    """Call it after every step for this rank's reason to stop.

    Args:
        signals: recorded signals.
        max_minutes: time limit, counted from now; None means no limit.
        job_end: Unix time at which the scheduler ends the job; None where it is not known.
    """

    def __init__(self, signals: StopSignals, max_minutes: float | None, job_end: float | None = None):
        self.signals = signals
        self.lease: Lease | None = None
        self.deadline = None if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.job_end = None if job_end is None else time.monotonic() + job_end - time.time()
        self.save_seconds = 0.0
        """Of the longest save so far."""
        self._steps, self._called = [0.0, 0.0], time.monotonic()

    def note_save(self, seconds: float) -> None:
        """How long a save took. Scripts ask for SIGUSR1 a fixed time before the job's end, which may not be enough."""
        self.save_seconds = max(self.save_seconds, seconds)

    def watch(self, lease: Lease) -> None:
        """Also stop when `lease` is lost."""
        self.lease = lease

    def __call__(self) -> StopReason:
        if self.lease is not None and self.lease.lost:
            return StopReason.LEASE_LOST
        if self._job_ends():
            return max(self.signals.reason, StopReason.JOB_END)
        late = self.deadline is not None and time.monotonic() >= self.deadline
        return max(self.signals.reason, StopReason.TIME_LIMIT if late else StopReason.NONE)

    def _job_ends(self) -> bool:
        """Whether another step would leave less than two saves' time. A step takes as long as the shorter one of the
        last two: the other may have begun with the start of the run, or have had a save in it."""
        now = time.monotonic()
        self._steps, self._called = [self._steps[1], now - self._called], now
        needed = min(self._steps) + 2 * self.save_seconds + _SLACK_SECONDS
        return self.job_end is not None and self.job_end - now < needed


CALLED_BY = "BOV_CALLED_BY"
"""Environment variable: a program that runs this one and hears the same Ctrl-C. It says so, for both."""


class CtrlC(Listener):
    """Ends a tool on Ctrl-C: with one line, and KeyboardInterrupt in the main thread, so that it removes what it has
    half done. Where that takes long, because a library computes or has swallowed the exception, the process ends
    without it.

    Args:
        advice: follows "interrupted" in the line.
    """

    PATIENCE_SECONDS = 1.5
    """For the main thread to hear of it."""
    REMOVAL_SECONDS = 20.0
    """For it to end then: removing a large file from a busy file system takes a while."""

    def __init__(self, advice: str = ""):
        super().__init__((signal.SIGINT,))
        self.advice = advice
        self.interrupted = False
        self._saying, self._said = threading.Lock(), False

    def say(self) -> None:
        """Print the line, unless it is printed, or another process prints it."""
        with self._saying:
            if not self._said and speaks() and CALLED_BY not in os.environ:
                tell(f"interrupted{self.advice}")
            self._said = True

    def handle(self, number: signal.Signals) -> None:
        if self._final_status is not None or self.interrupted:
            return
        self.interrupted = True
        # Raised in a destructor or a thread's start, the exception would be printed there, with a traceback.
        sys.unraisablehook = _say_nothing
        threading.excepthook = _say_nothing
        raise KeyboardInterrupt

    def first(self, number: signal.Signals) -> None:
        if self._in_charge():
            self.say()

    def waiting(self, since: float) -> None:
        patience = self.REMOVAL_SECONDS if self.interrupted else self.PATIENCE_SECONDS
        if self._in_charge() and time.monotonic() - since > patience:
            end(errors.CTRL_C)

    def _in_charge(self) -> bool:
        """Whether no library handles the signal instead, as torchrun does while it has ranks."""
        return signal.getsignal(signal.SIGINT) == self._handle


def _say_nothing(unraisable: object) -> None:
    pass
