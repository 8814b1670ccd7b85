"""Starting the cells of a study that are missing or have failed, here or on Slurm."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from bov_megatron import errors
from bov_megatron.errors import StudyError
from bov_megatron.lifecycle.lease import current_holder
from bov_megatron.recipe.quantities import flops_per_token, total_steps
from bov_megatron.studies import folder, slurm, task
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


def train_here(study: Study, cells: Sequence[Cell], at_a_time: int, dry_run: bool = False) -> int:
    """Train `cells` on this machine, `at_a_time` at once, and show how they go. With `dry_run`, print the calls.

    Returns 0 if all are complete, 3 if some failed, 143 if a signal ended it: the same call goes on.
    """
    if dry_run:
        for cell in cells:
            print(shlex.join(["python", "-m", "bov_megatron.train", str(cell.base), *cell.overrides]))
        return errors.DONE
    with LocalProgress(study, len(cells), Console(stderr=True)) as progress:
        runner = Runner([Run.of(cell) for cell in cells], at_a_time, progress)
        ends = runner.train()
    failed = [name for name, end in ends.items() if not end.complete and not end.stopped]
    complete = sum(end.complete for end in ends.values())
    rest = f"{len(failed)} failed, " if failed else ""
    progress.say(f"{complete} of {len(cells)} cells complete, {rest}{len(cells) - complete - len(failed)} to do")
    if runner.stop_signals:
        return errors.INTERRUPTED
    return errors.NOT_WORTH_GOING_ON if failed else errors.DONE


SCRIPT = "slurm/study.sh"
LONGEST_ARRAY = 1000
"""Slurm's MaxArraySize is 1001 unless a site sets it."""


@dataclass(frozen=True)
class Nodes:
    """What a node has, and how many may be used; sbatch's own names."""

    ntasks_per_node: int = 8
    """Ranks per node: as many as GPUs."""
    gpus_per_node: int | None = None
    """None: as many as ranks. 0 on a cluster without GPUs."""
    cpus_per_task: int = 6
    """Cores of each rank."""
    max_nodes: int | None = None
    """Nodes in use at once; None: no limit."""

    @property
    def gpus(self) -> int:
        return self.ntasks_per_node if self.gpus_per_node is None else self.gpus_per_node


@dataclass(frozen=True)
class Array:
    """One call of sbatch: tasks that all take the same nodes."""

    kind: str
    """`alone`: a task is one run; `together`: several that share a node."""
    nodes: int
    """Of each task."""
    tasks: tuple[tuple[Cell, ...], ...]

    def lines(self) -> list[str]:
        """Of the file of tasks."""
        return [task.alone(cells[0]) if self.kind == "alone" else task.together(cells) for cells in self.tasks]


def arrays(cells: Iterable[Cell], nodes: Nodes) -> list[Array]:
    """Distribute cells over arrays: several small ones to a node, large ones their nodes.

    Cells that share a node take about as long as each other, as far as their FLOPs say.

    Raises StudyError for cells that can't be placed.
    """
    per_node = nodes.ntasks_per_node
    by_need: dict[tuple[str, int], list[tuple[Cell, ...]]] = {}
    ordered = sorted(cells, key=lambda cell: (cell.world_size, -_flops(cell) / cell.world_size))
    for world_size, same in itertools.groupby(ordered, key=lambda cell: cell.world_size):
        group = list(same)
        if world_size < per_node:
            shared = per_node // world_size
            by_need.setdefault(("together", 1), []).extend(_chunks(group, shared))
            continue
        if world_size % per_node:
            raise StudyError(
                f"cell {group[0].name} needs {world_size} ranks, which is not a multiple of {per_node} "
                "(--ntasks-per-node); change world_size of its size in the study"
            )
        needed = world_size // per_node
        if nodes.max_nodes is not None and needed > nodes.max_nodes:
            raise StudyError(f"cell {group[0].name} needs {needed} nodes; --max-nodes {nodes.max_nodes} is too few")
        by_need.setdefault(("alone", needed), []).extend((cell,) for cell in group)
    return [
        Array(kind, needed, chunk)
        for (kind, needed), tasks in by_need.items()
        for chunk in _chunks(tasks, LONGEST_ARRAY)
    ]


def sbatch_command(study: Study, array: Array, nodes: Nodes, tasks: Path, after: Sequence[str], flags: Sequence[str]):
    """The words of the call.

    Args:
        tasks: file with the array's lines.
        after: jobs that must have ended before it starts.
        flags: further ones for sbatch; they override.
    """
    if array.kind == "together":  # one task looks after all runs of the node
        ranks = max(sum(cell.world_size for cell in cells) for cells in array.tasks)
        layout = ["--ntasks-per-node=1", f"--cpus-per-task={ranks * nodes.cpus_per_task}"]
        gpus = min(ranks, nodes.gpus)
    else:
        layout = [f"--ntasks-per-node={nodes.ntasks_per_node}", f"--cpus-per-task={nodes.cpus_per_task}"]
        gpus = nodes.gpus
    limit = "" if nodes.max_nodes is None else f"%{nodes.max_nodes // array.nodes}"
    output = folder.job_log(study.cells[0].run_dir, "%A_%a")
    return [
        *("sbatch", "--parsable", f"--job-name=study-{study.name}", f"--nodes={array.nodes}", *layout),
        *(f"--gpus-per-node={gpus}", f"--array=0-{len(array.tasks) - 1}{limit}", f"--output={output}"),
        *([f"--dependency=afterany:{':'.join(after)}"] if after else []),
        *(*flags, SCRIPT, array.kind, str(tasks)),
    ]


def submit(
    study: Study, cells: Sequence[Cell], nodes: Nodes, flags: Sequence[str] = (), dry_run: bool = False
) -> Iterator[tuple[Array, list[str], str | None]]:
    """Submit `cells` as arrays, one after the other; yields array, sbatch's call and the job (None with `dry_run`).

    With `max_nodes`, an array waits until those before it and this study's earlier jobs have ended.

    Raises StudyError for cells that can't be placed, away from the repository's root, or where Slurm refuses.
    """
    if not Path(SCRIPT).is_file():
        raise StudyError(f"there is no {SCRIPT} in {Path.cwd()}; submit from the repository's root")
    after = sorted({t.job.split("_")[0] for t in slurm.tasks_of(study).values() if t.state != "ended"})
    number = len(slurm.read_jobs(study))
    for array in arrays(cells, nodes):
        number += 1
        tasks = study.output_dir / folder.SLURM / f"tasks_{number:04}.txt"
        command = sbatch_command(study, array, nodes, tasks, after if nodes.max_nodes else [], flags)
        job = None if dry_run else _submit(study, array, tasks, command)
        after.append(job or f"JOB_{number}")
        yield array, command, job


def describe(array: Array) -> str:
    """E.g. `12 cells in 2 tasks that share a node each`."""
    cells = sum(map(len, array.tasks))
    where = "that share a node each" if array.kind == "together" else f"of {array.nodes} nodes"
    return f"{cells} cells in {len(array.tasks)} tasks {where}"


def _submit(study: Study, array: Array, tasks: Path, command: list[str]) -> str:
    tasks.parent.mkdir(parents=True, exist_ok=True)
    (study.output_dir / folder.LOGS).mkdir(exist_ok=True)  # Slurm drops a job whose log it can't open
    tasks.write_text("".join(f"{line}\n" for line in array.lines()))
    environ = os.environ | {"BOV_PYTHON": os.environ.get("BOV_PYTHON", sys.executable)}
    try:
        run = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=120)
    except FileNotFoundError:
        raise StudyError("there is no sbatch here; submit on a login node, or give --local N") from None
    if run.returncode != 0:
        raise StudyError(f"Slurm refused {shlex.join(command)}: {run.stderr.strip()}")
    job = run.stdout.strip().split(";")[0]
    line = {"job": job, "name": f"study-{study.name}", "tasks": [[cell.name for cell in t] for t in array.tasks]}
    with slurm.jobs_file(study).open("a") as file:
        file.write(json.dumps(line) + "\n")
    return job


def _flops(cell: Cell) -> float:
    return flops_per_token(cell.recipe.model) * total_steps(cell.recipe) * cell.recipe.batch_tokens


def _chunks(items: Sequence, size: int) -> list[tuple]:
    return [tuple(items[i : i + size]) for i in range(0, len(items), size)]
