"""Telling the launcher how a run ended; what the statuses mean is in bov_megatron.errors. Imports nothing heavy."""

import contextlib
import os
from pathlib import Path


def report(status: int) -> None:
    """Write the run's status to the file that the variable BOV_STATUS_FILE names, if any; for rank 0, or for the one
    that ends the run.

    A launcher that kills the other ranks as soon as one has ended cannot tell their statuses from the run's.
    """
    if file := os.environ.get("BOV_STATUS_FILE"):
        # A folder that this node doesn't see: the launcher then takes it for a crash.
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{status}\n")
