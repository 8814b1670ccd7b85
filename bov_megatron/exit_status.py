"""Exit statuses of a training run, by which a launcher knows whether to start it again. Imports nothing heavy."""

import contextlib
import os
from pathlib import Path

DONE = 0
CRASHED = 1
"""Python's own, for an error nobody caught; likewise 137 and 139 for a killed process."""
CANNOT_START = 2
"""Recipe, data, checkpoint or run folder cannot be used: starting again would fail again."""
NOT_WORTH_GOING_ON = 3
"""The run ended itself: numbers that went wrong too often. A person should look first."""
HANG = 4
"""No step for `health.hang_minutes`: stacks were written, starting again may help."""
INTERRUPTED = 143
"""As for SIGTERM: a signal or `train.max_minutes`. All steps done are saved; starting again goes on."""


def report(status: int) -> None:
    """Write the run's status to the file that the variable BOV_STATUS_FILE names, if any; for rank 0, or for the one
    that ends the run.

    A launcher that kills the other ranks as soon as one has ended cannot tell their statuses from the run's.
    """
    if file := os.environ.get("BOV_STATUS_FILE"):
        # A folder that this node doesn't see: the launcher then takes it for a crash.
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{status}\n")
