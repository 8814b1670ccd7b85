"""Whether a run that has ended is to be started again: by its exit status, and by whether it gets anywhere.

    RUN/restarts.json    how many starts on end brought no new checkpoint

Imports nothing heavy: the launcher asks on a node where the framework need not be installed.
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
    errors.CANNOT_START: "it cannot start, for the reason that its error says",
    errors.NOT_WORTH_GOING_ON: "it ended itself, for the reason that its error says",
}


@dataclass(frozen=True)
class Decision:
    """Whether to start again, and why or why not."""

    again: bool
    reason: str


def decide(run_dir: Path, status: int, limit: int = LIMIT) -> Decision:
    """Call once after each start of the run in `run_dir`, with its exit status.

    A run that was interrupted, crashed or hung is started again, unless `limit` starts on end brought no new
    checkpoint. Whatever is final forgets the count: who submits the job again has seen to the cause.
    """
    counter = run_dir / run_folder.RESTARTS
    if status in _FINAL:
        counter.unlink(missing_ok=True)
        return Decision(False, _FINAL[status])
    step, (before, futile) = newest_step(run_dir), _read(counter)
    futile = 0 if step > before else futile + 1
    if futile >= limit:
        counter.unlink(missing_ok=True)
        return Decision(
            False,
            f"{futile} starts on end brought no new checkpoint (the newest is of step {step}), the last one ended with "
            f"status {status}. See to the cause above, lower checkpoint.interval if starts are short, and submit again",
        )
    run_dir.mkdir(parents=True, exist_ok=True)
    part = counter.with_suffix(".part")
    part.write_text(json.dumps({"step": step, "futile": futile}))
    part.replace(counter)
    what = "it was interrupted, with all steps done saved" if status == errors.INTERRUPTED else "it crashed or hung"
    got = f"the newest checkpoint is of step {step}"
    if futile:
        got += f", no newer than before ({futile} of {limit} such starts on end)"
    return Decision(True, f"{what}; {got}")


def newest_step(run_dir: Path) -> int:
    """Steps done according to the newest complete checkpoint; 0 without one."""
    checkpoints = run_folder.list_checkpoints(run_dir)
    return checkpoints[-1][0] if checkpoints else 0


def _read(counter: Path) -> tuple[int, int]:
    """(step, futile starts) as stored; a file that a full disk has cut off counts as none."""
    try:
        stored = json.loads(counter.read_text())
        return int(stored["step"]), int(stored["futile"])
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return 0, 0
