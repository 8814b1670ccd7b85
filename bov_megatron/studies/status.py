"""How far each cell of a study is, from its run folder and from Slurm."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import datetime
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from bov_megatron import errors
from bov_megatron.errors import BovError
from bov_megatron.lifecycle.lease import current_holder
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.studies import folder, slurm
from bov_megatron.studies.study import Cell, Study

STATES = {
    "pending": "not started, or stopped after a checkpoint: submit goes on with it",
    "queued": "waits in Slurm's queue",
    "running": "is being trained",
    "complete": "all steps done, validated and saved",
    "failed": "ended by an error, a crash or a kill; submit starts it again from its newest checkpoint",
    "edited": "its run has another recipe than the study now says",
    "unreadable": "its folder is no run folder, or a file in it is damaged",
}
WATCH_SECONDS = 5.0
STYLES = {"running": "cyan", "complete": "green", "failed": "red", "edited": "magenta", "unreadable": "red"}


@dataclass(frozen=True)
class CellStatus:
    """A cell as it is now. Numbers that are not known yet are None."""

    cell: str
    state: str
    """One of STATES."""
    step: int
    """Steps done."""
    steps: int
    loss: float | None
    """Training loss of the last step (nats per token), or of a complete cell the final validation's."""
    tokens_per_second: float | None
    seconds_left: float | None
    """At the present speed, for a running cell."""
    restarts: int
    note: str
    """Why it failed, waits or is not what the study says; empty in most cases."""


def read_status(study: Study) -> list[CellStatus]:
    """The status of every cell, in the study's order. Raises StudyError where Slurm can't be asked."""
    tasks = slurm.tasks_of(study)
    now = folder.file_system_time(study)
    found = [cell_status(cell, now, tasks.get(cell.name)) for cell in study.cells]
    ended = {s.cell: tasks[s.cell].job for s in found if s.state == "failed" and s.cell in tasks}
    reasons = slurm.ended_states(list(ended.values()))
    return [_with_reason(status, reasons.get(ended.get(status.cell, ""))) for status in found]


def _with_reason(status: CellStatus, reason: str | None) -> CellStatus:
    return dataclasses.replace(status, note=f"{status.note} (Slurm: {reason})") if reason else status


def cell_status(cell: Cell, now: float, task: slurm.Task | None = None) -> CellStatus:
    """The status of one cell.

    Args:
        now: folder.file_system_time.
        task: of Slurm's, if it was submitted there.
    """
    steps = total_steps(cell.recipe)
    try:
        state = folder.read_state(cell)
        line = _last_step(cell) if state.starts.starts else {}
        name, note = _state(cell, state, now, task)
    except BovError as error:
        return CellStatus(cell.name, "unreadable", 0, steps, None, None, None, 0, str(error))
    step, rate = line.get("step", 0), line.get("tokens_per_second")
    loss = line.get("validation_loss", line.get("loss")) if name == "complete" else line.get("loss")
    if line and (loss is None or not math.isfinite(loss)):
        loss, note = None, "; ".join(filter(None, (note, f"the loss of step {step} is not finite")))
    left = (steps - step) * cell.recipe.batch_tokens / rate if name == "running" and rate else None
    return CellStatus(cell.name, name, step, steps, loss, rate, left, state.restarts, note)


def _last_step(cell: Cell) -> dict[str, Any]:
    return next((line for line in folder.last_steps(cell.run_dir) if "loss" in line), {})


def _state(cell: Cell, state: folder.RunState, now: float, task: slurm.Task | None) -> tuple[str, str]:
    """State and note."""
    if state.edits:
        return "edited", folder.describe_edits(state.edits)
    if state.finished:
        return "complete", ""
    holder = current_holder(cell.run_dir, now)
    if holder is not None:
        return "running", ""
    starts, end = state.starts.starts, state.starts.end
    if task is not None and task.state == "queued":
        return "queued", f"job {task.job}: {task.reason}"
    if task is not None and task.state == "running" and not (end and starts and starts[-1]["job"] == task.number):
        return "running", f"job {task.job} is starting it"
    if end is not None and end["status"] == errors.INTERRUPTED:
        return "pending", f"stopped after step {end['end']}"
    if end is not None:
        return "failed", end.get("error") or f"ended with status {end['status']}"
    log = folder.log_in(cell.run_dir)
    printed = log.exists()
    if task is not None and not printed:
        log = folder.job_log(cell.run_dir, task.job)
    if starts:
        return "failed", f"killed or crashed, see {log}"
    if task is not None or printed:
        return "failed", f"ended before training began, see {log}"
    return "pending", ""


def watch(study: Study, console: Console) -> list[CellStatus]:
    """Show the status every WATCH_SECONDS until all cells are complete, or until Ctrl-C; returns the last one.

    A study of more cells than the terminal has lines shows those that are running or need a person.
    """
    statuses = read_status(study)
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False, transient=True) as live:
        while any(status.state != "complete" for status in statuses):
            shown = [s for s in statuses if s.state not in ("complete", "pending", "queued")]
            table = as_table(statuses if len(statuses) < console.height - 3 else shown)
            table.caption = summary(statuses)
            live.update(table, refresh=True)
            time.sleep(WATCH_SECONDS)
            statuses = read_status(study)
    return statuses


def as_table(statuses: Sequence[CellStatus]) -> Table:
    """A table for the terminal, with a line of totals below."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cell", overflow="fold")
    table.add_column("state", no_wrap=True)
    for name in ("step", "loss", "tokens/s", "restarts", "time left"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("note" if any(status.note for status in statuses) else "", overflow="fold")
    for status in statuses:
        table.add_row(
            status.cell,
            f"[{STYLES.get(status.state, 'default')}]{status.state}[/]",
            f"{status.step:,} / {status.steps:,}",
            "" if status.loss is None else f"{status.loss:.4f}",
            "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f}",
            str(status.restarts or ""),
            clock(status.seconds_left),
            escape(status.note),
        )
    table.caption, table.caption_justify = summary(statuses), "left"
    return table


def summary(statuses: Sequence[CellStatus]) -> str:
    """`24 cells: 3 running, 21 complete`"""
    counts = collections.Counter(status.state for status in statuses)
    parts = [f"{counts[state]} {state}" for state in STATES if counts[state]]
    return f"{len(statuses)} cells: {', '.join(parts)}"


def clock(seconds: float | None) -> str:
    """`1:02:03`, with days before it; empty for None."""
    return "" if seconds is None else str(datetime.timedelta(seconds=round(seconds)))
