"""Whether to start a run again after it ended: decided by its exit status and its progress.

    RUN/restarts.json    number of starts in a row that made no new checkpoint

Imports nothing heavy: the launcher runs it where torch may not be installed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bov_megatron import errors
from bov_megatron.lifecycle import run_folder

LIMIT = 3
_FINAL = {
    errors.DONE: "all steps are done",
    errors.CANNOT_START: "it cannot start, see its error",
    errors.NOT_WORTH_GOING_ON: "it ended itself, see its error",
}


@dataclass(frozen=True)
class Decision:
    again: bool
    reason: str


def decide(run_dir: Path, status: int, limit: int = LIMIT) -> Decision:
    """Whether to start again, and why; call once after each start of the run, with its exit status.

    A run that was interrupted, crashed or hung is started again, unless `limit` starts in a row made no new checkpoint.
    """
    counter = run_dir / run_folder.RESTARTS
    if status in _FINAL:
        counter.unlink(missing_ok=True)  # whoever resubmits the job has dealt with the cause
        return Decision(False, _FINAL[status])
    step, (before, futile) = _newest_step(run_dir), _read(counter)
    futile = 0 if step > before else futile + 1
    if futile >= limit:
        counter.unlink(missing_ok=True)
        return Decision(
            False,
            f"{futile} starts in a row made no new checkpoint (the newest is of step {step}), the last one ended with "
            f"status {status}. Fix the cause above, lower checkpoint.interval if starts are short, and submit again",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    part = counter.with_suffix(".part")
    part.write_text(json.dumps({"step": step, "futile": futile}))
    part.replace(counter)
    cause = "it was interrupted and saved all steps done" if status == errors.INTERRUPTED else "it crashed or hung"
    progress = f"the newest checkpoint is of step {step}"
    if futile:
        progress += f", no newer than before ({futile} of at most {limit} such starts in a row)"
    return Decision(True, f"{cause}; {progress}")


def _newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint; 0 without one."""
    checkpoints = run_folder.list_checkpoints(run_dir)
    return checkpoints[-1][0] if checkpoints else 0


def _read(counter: Path) -> tuple[int, int]:
    """Stored (step, futile starts); (0, 0) if the file is missing or damaged, e.g. by a full disk."""
    try:
        stored = json.loads(counter.read_text())
        return int(stored["step"]), int(stored["futile"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, 0
