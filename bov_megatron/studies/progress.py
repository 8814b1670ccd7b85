"""What `submit --local` shows: on a terminal the running cells with a bar each, elsewhere a line per event."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from bov_megatron.lifecycle.starts import read_starts
from bov_megatron.studies import folder
from bov_megatron.studies.runner import Ended, Observer, Run
from bov_megatron.studies.status import cell_status, clock
from bov_megatron.studies.study import Study

REFRESH_SECONDS = 1.0


class LocalProgress(Observer):
    """Context manager that shows how the cells of a study go.

    Args:
        to_do: number of cells that are started in this call.
    """

    def __init__(self, study: Study, to_do: int, console: Console):
        self.study, self.to_do, self.console = study, to_do, console
        self.cells = {cell.name: cell for cell in study.cells}
        self.done = self.failed = 0
        self.begun = self.drawn = time.monotonic()
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> LocalProgress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def started(self, run: Run) -> None:
        if not self.live:
            self.say(f"{run.name}: started")

    def restarted(self, run: Run, reason: str) -> None:
        self.say(f"{run.name}: started again, {escape(reason)}")

    def ended(self, run: Run, end: Ended) -> None:
        place = f"[{self.done + self.failed + 1}/{self.to_do}]"
        if end.complete:
            self.done += 1
            step = next(folder.last_steps(run.run_dir), {})
            loss = step.get("validation_loss")
            result = "" if loss is None else f", validation loss {loss:.4f}"
            self.say(f"{escape(place)} {run.name}: complete{result}, {clock(end.seconds)}")
        elif end.stopped:
            self.say(f"{run.name}: {end.reason}")
        else:
            self.failed += 1
            self.say(f"{escape(place)} [red]{run.name}: failed[/], {escape(why_it_failed(run, end))}")

    def stopping(self, running: Sequence[Run]) -> None:
        self.say(f"stopping: {len(running)} cells finish their step and save; press Ctrl-C again to kill them")

    def tick(self, running: Sequence[Run]) -> None:
        if self.live and time.monotonic() - self.drawn >= REFRESH_SECONDS:
            self.drawn = time.monotonic()
            self.live.update(self._table(running), refresh=True)

    def _table(self, running: Sequence[Run]) -> Group:
        now = folder.file_system_time(self.study)
        table = Table(box=None, pad_edge=False, show_header=False)
        for _ in range(6):
            table.add_column(no_wrap=True)
        for run in running:
            status = cell_status(self.cells[run.name], now)
            table.add_row(
                run.name,
                ProgressBar(status.steps, status.step, width=24),
                f"{status.step:,}/{status.steps:,}",
                "starting" if status.loss is None else f"loss {status.loss:.4f}",
                "" if status.tokens_per_second is None else f"{status.tokens_per_second:,.0f} tok/s",
                "" if status.seconds_left is None else f"{clock(status.seconds_left)} left",
            )
        elapsed = clock(time.monotonic() - self.begun)
        failed = f", {self.failed} failed" if self.failed else ""
        waiting = self.to_do - self.done - self.failed - len(running)
        return Group(table, f"{self.done} of {self.to_do} cells complete{failed}, {waiting} waiting · {elapsed}")


class Lines(Observer):
    """A line per event, for the log of a job."""

    def started(self, run: Run) -> None:
        print(f"{run.name}: started, prints to {run.log}", flush=True)

    def restarted(self, run: Run, reason: str) -> None:
        print(f"{run.name}: started again, {reason}", flush=True)

    def ended(self, run: Run, end: Ended) -> None:
        failed = f"status {end.status}: {why_it_failed(run, end)}"
        print(f"{run.name}: {'complete' if end.complete else failed}", flush=True)


def why_it_failed(run: Run, end: Ended) -> str:
    """The run's own error where it has one, else the last line that it printed."""
    last = read_starts(run.run_dir).end
    if last and last["status"] == end.status and "error" in last:
        return str(last["error"])
    lines = [line for line in run.log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else end.reason} (see {run.log})"
