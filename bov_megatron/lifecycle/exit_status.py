"""Reporting a run's exit status (see bov_megatron.errors) to the launcher."""

import contextlib
import os
from pathlib import Path


def report(status: int) -> None:
    """Write the run's status to the file BOV_STATUS_FILE, if set; for rank 0, or the rank that ends the run."""
    # srun kills the other ranks once one has ended, and its own status is then that of the killed ones.
    if file := os.environ.get("BOV_STATUS_FILE"):
        # If this node doesn't see the folder, the launcher assumes a crash.
        with contextlib.suppress(OSError):
            Path(file).write_text(f"{status}\n")
