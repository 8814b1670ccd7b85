"""The tasks of a study's Slurm arrays: writing them for submit, and one of them on its node (slurm/launch.sh).

A file of tasks has a line per task, quoted for a shell. `alone`: RECIPE OVERRIDES…, a run that has its nodes to itself.
`together`: RANKS RECIPE OVERRIDES… of several runs that share a node, with `--` between them.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from bov_megatron import errors
from bov_megatron.errors import StudyError
from bov_megatron.lifecycle.restarts import decide
from bov_megatron.lifecycle.starts import read_starts
from bov_megatron.recipe import load_recipe
from bov_megatron.studies import folder
from bov_megatron.studies.progress import Lines
from bov_megatron.studies.runner import Run, Runner
from bov_megatron.studies.study import Cell


def alone(cell: Cell) -> str:
    """The line of a cell that has its nodes to itself."""
    return shlex.join([str(cell.base), *cell.overrides])


def together(cells: Sequence[Cell]) -> str:
    """The line of cells that share a node."""
    return " -- ".join(f"{cell.world_size} {alone(cell)}" for cell in cells)


def read_task(path: Path, line: int) -> list[Run]:
    """The runs of a `together` line, counted from 0. Raises StudyError."""
    try:
        words = shlex.split(path.read_text().splitlines()[line])
    except (OSError, IndexError, ValueError) as error:
        raise StudyError(f"{path} has no task {line} ({error}); submit the study again") from None
    runs = []
    while words:
        end = words.index("--") if "--" in words else len(words)
        world_size, base, *overrides = words[:end]
        recipe = load_recipe(base, overrides)
        log = folder.log_in(recipe.run_dir)
        runs.append(Run(recipe.name, base, tuple(overrides), int(world_size), recipe.run_dir, log))
        words = words[end + 1 :]
    return runs


def train_task(runs: Sequence[Run]) -> int:
    """Train those of `runs` that aren't finished beside each other on this node.

    Returns the exit status: 0 if all are finished, 143 if some were interrupted and are to go on, else 3.
    """
    missing = [run for run in runs if not read_starts(run.run_dir).finished]
    cores = int(os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)))
    threads = max(1, cores // sum(run.world_size for run in runs))
    ends = Runner(missing, max(1, len(missing)), Lines(), threads).train()
    unfinished = [run for run in missing if run.name not in ends or not ends[run.name].complete]
    stopped = [run for run in unfinished if run.name not in ends or ends[run.name].stopped]
    # Every one is asked: a start of each is counted.
    again = [decide(run.run_dir, ends[run.name].status if run.name in ends else 143).again for run in stopped]
    if any(again):
        return errors.INTERRUPTED
    return errors.NOT_WORTH_GOING_ON if unfinished else errors.DONE


def may_start_again(runs: Sequence[Run], status: int) -> tuple[bool, str]:
    """Whether the job of a task that ended with `status` should be requeued, and why."""
    if status == errors.INTERRUPTED:
        return True, "runs were interrupted and saved"
    if status in (errors.DONE, errors.CANNOT_START, errors.NOT_WORTH_GOING_ON):
        return False, "all runs are finished" if status == errors.DONE else "runs have failed, see their logs"
    # The process that looks after the runs was killed, and with it they.
    decisions = {run.name: decide(run.run_dir, status) for run in runs if not read_starts(run.run_dir).finished}
    reasons = "; ".join(f"{name}: {decision.reason}" for name, decision in decisions.items())
    return any(decision.again for decision in decisions.values()), reasons or "all runs are finished"
