"""A live view of runs in the terminal: where each stands, how fast it goes, and the course of its loss."""

from __future__ import annotations

import io
import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from bov_megatron.errors import BovError, RunFolderError
from bov_megatron.lifecycle import run_folder
from bov_megatron.plotting.curves import envelope, labels, read_recipe
from bov_megatron.plotting.metrics import Columns, parse
from bov_megatron.recipe.quantities import total_steps

REFRESH_SECONDS = 2.0
WINDOW = 20
"""Steps over which rates are averaged."""
QUIET_SECONDS = 120.0
"""A run that has written nothing for so long is said to be quiet."""
BARS = "▁▂▃▄▅▆▇█"
COLUMNS = {
    **{"run": 0, "step": 0, "loss": 0, "bits/byte": 75, "grad norm": 112, "tokens/s": 0, "MFU": 105, "left": 88},
    **{"state": 0, "loss so far": 130},
}
"""Columns of the view, and how wide a terminal must be to show them."""
KEYS = ("tokens", "loss", "gradient_norm", "validation_bits_per_byte", "tokens_per_second", "mfu", "step_seconds")


class WatchedRun:
    """A run's metrics, of which only new lines are read."""

    def __init__(self, folder: Path, label: str):
        self.folder, self.label = folder, label
        self.path = folder / run_folder.METRICS
        self.recipe = read_recipe(folder)
        self._text = b""
        self._file: tuple[int, int] | None = None
        self._columns: Columns | None = None

    def columns(self) -> Columns | None:
        """What the run has written so far; None before its first step."""
        try:
            status = self.path.stat()
        except OSError:
            return None
        # A run that starts again or rolls back rewrites its file.
        if (status.st_ino, status.st_dev) != self._file or status.st_size < len(self._text):
            self._text, self._file = b"", (status.st_ino, status.st_dev)
        if status.st_size > len(self._text):
            with self.path.open("rb") as file:
                file.seek(len(self._text))
                self._text += file.read()
            self._columns = None
        if self._columns is None and b"\n" in self._text:
            self._columns = parse(io.BytesIO(self._text), KEYS, self.path)
        return self._columns

    def total_steps(self) -> int | None:
        return total_steps(self.recipe) if self.recipe else None

    def state(self) -> str:
        """`training`, `done`, `quiet for 12 min` or `not started`."""
        columns = self.columns()
        if columns is None:
            return "not started"
        step, total = int(columns.numbers["step"][-1]), self.total_steps()
        if total is not None and step >= total:
            return "done"
        silence = time.time() - self.path.stat().st_mtime
        if not (self.folder / run_folder.LEASE).exists():
            return "stopped"
        return f"quiet for {silence / 60:.0f} min" if silence > QUIET_SECONDS else "training"


def watch(folders: Sequence[Path]) -> None:
    """Show the view until Ctrl-C, or once where output is not a terminal. Runs that have not started yet are waited
    for. Raises RunFolderError for a path that is a file."""
    for folder in folders:
        if folder.is_file():
            raise RunFolderError(f"{folder} is a file; give the run's folder, such as runs/780m_bov")
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    runs = [WatchedRun(folder, label) for folder, label in zip(folders, labels(folders), strict=True)]
    if not console.is_terminal:
        console.print(view(runs, console.width))
        return
    with Live(view(runs, console.width), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(REFRESH_SECONDS)
            live.update(view(runs, console.width), refresh=True)


def view(runs: Sequence[WatchedRun], width: int) -> Group:
    """A table of the runs as they stand now."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    hidden = {name for name, least in COLUMNS.items() if width < least}
    for name in COLUMNS:
        if name not in hidden:
            table.add_column(name, justify="left" if name in ("run", "state", "loss so far") else "right", no_wrap=True)
    course = max(10, min(40, width - COLUMNS["loss so far"] + 12))
    for run in runs:
        try:
            row = _row(run, course)
        except BovError as error:
            row = {"run": run.label, "state": Text(str(error), style="red")}
        table.add_row(*(row.get(name, "") for name in COLUMNS if name not in hidden))
    return Group(table, Text(time.strftime("%H:%M:%S"), style="dim"))


def _row(run: WatchedRun, course: int) -> dict[str, str | Text]:
    columns = run.columns()
    if columns is None:
        return {"run": run.label, "state": run.state()}
    step, total = int(columns.numbers["step"][-1]), run.total_steps()
    last = {key: values[np.isfinite(values)] for key, values in columns.numbers.items()}
    speed, seconds = _mean(last["tokens_per_second"]), _mean(last["step_seconds"])
    return {
        "run": run.label,
        "step": f"{step:,}" + (f"/{total:,} {step / total:4.0%}" if total else ""),
        "loss": _number(last["loss"], "{:.4f}"),
        "bits/byte": _number(last["validation_bits_per_byte"], "{:.4f}"),
        "grad norm": _number(last["gradient_norm"], "{:.3g}"),
        "tokens/s": "" if speed is None else f"{speed:,.0f}",
        "MFU": _number(last["mfu"], "{:.1%}"),
        "left": "" if total is None or seconds is None else _clock((total - step) * seconds),
        "state": run.state(),
        "loss so far": sparkline(columns, course),
    }


def sparkline(columns: Columns, width: int) -> Text:
    """The loss in `width` places as bars; red where one is not finite, or far above the mean."""
    loss = columns.numbers["loss"]
    known = np.isfinite(loss)
    if known.sum() < 2:
        return Text()
    x = np.arange(len(loss))
    thin = envelope(x[known], loss[known], width)
    bad = np.isin(_place(thin.x, width), _place(x[columns.is_step & ~known], width, thin.x))
    spread = np.median(thin.high - thin.mean) if thin.is_thinned else math.inf
    bad |= thin.high - thin.mean > 8 * spread
    # The beginning would leave the rest flat: the logarithm above the lowest loss.
    height = np.log(thin.mean - thin.mean.min() + 0.02 * (np.ptp(thin.mean) or 1))
    levels = ((height - height.min()) / (np.ptp(height) or 1) * (len(BARS) - 1)).round().astype(int)
    text = Text()
    for level, is_bad in zip(levels, bad, strict=True):
        text.append(BARS[level], style="bold red" if is_bad else "cyan")
    return text


def _place(x: np.ndarray, width: int, of: np.ndarray | None = None) -> np.ndarray:
    of = x if of is None else of
    return np.round((x - of[0]) / (of[-1] - of[0] or 1) * width).astype(int)


def _mean(values: np.ndarray) -> float | None:
    return float(values[-WINDOW:].mean()) if len(values) else None


def _number(values: np.ndarray, form: str) -> str:
    return form.format(values[-1]) if len(values) else ""


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02}:{int(seconds) % 60:02}"
