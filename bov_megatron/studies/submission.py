"""Starting the cells of a study that are missing or have failed, here or on Slurm."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from bov_megatron import errors
from bov_megatron.errors import StudyError
from bov_megatron.lifecycle.lease import current_holder
from bov_megatron.studies import folder
from bov_megatron.studies.progress import LocalProgress
from bov_megatron.studies.runner import Run, Runner
from bov_megatron.studies.status import CellStatus, read_status
from bov_megatron.studies.study import Cell, Study

STARTED = ("pending", "failed")
"""States of cells that are submitted."""


def cells_to_start(study: Study, set_aside: bool = False) -> tuple[list[Cell], list[CellStatus]]:
    """Cells that are neither complete nor under way, in the study's order, and the status of all.

    Args:
        set_aside: move runs that were made with another recipe out of the way, and start their cells anew.

    Raises StudyError for runs that were made with another recipe (unless `set_aside`), and for unreadable folders.
    """
    statuses = read_status(study)
    for status in statuses:
        if status.state == "unreadable":
            raise StudyError(status.note)
    edited = [status for status in statuses if status.state == "edited"]
    if edited and not set_aside:
        first = "; ".join(f"{status.cell} ({status.note})" for status in edited[:3])
        more = f" and {len(edited) - 3} more" if len(edited) > 3 else ""
        raise StudyError(
            f"{len(edited)} cells were run with another recipe than {study.path} now says: {first}{more}. Undo the "
            "change, or give --set-aside, which moves their runs to "
            f"{study.output_dir / folder.SET_ASIDE} and starts them anew"
        )
    cells = {cell.name: cell for cell in study.cells}
    for status in edited:
        if current_holder(cells[status.cell].run_dir, folder.file_system_time(study)):
            raise StudyError(f"cell {status.cell} is being trained with another recipe; wait for its end, or end it")
        folder.set_aside(study, cells[status.cell])
    start = [cells[status.cell] for status in statuses if status.state in (*STARTED, "edited")]
    return start, statuses


def train_here(study: Study, cells: Sequence[Cell], at_a_time: int, console: Console | None = None) -> int:
    """Train `cells` on this machine, `at_a_time` at once, and show how they go.

    Returns 0 if all are complete, 3 if some failed, 143 if a signal ended it: the same call goes on.
    """
    console = console or Console(stderr=True)
    with LocalProgress(study, len(cells), console) as progress:
        runner = Runner([Run.of(cell) for cell in cells], at_a_time, progress)
        ends = runner.train()
    failed = [name for name, end in ends.items() if not end.complete and not end.reason.startswith("stopped")]
    complete = sum(end.complete for end in ends.values())
    rest = f"{len(failed)} failed, " if failed else ""
    progress.say(f"{complete} of {len(cells)} cells complete, {rest}{len(cells) - complete - len(failed)} to do")
    if runner.stop_signals:
        return errors.INTERRUPTED
    return errors.NOT_WORTH_GOING_ON if failed else errors.DONE
