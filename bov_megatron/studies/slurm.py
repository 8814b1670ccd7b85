"""What Slurm knows about a study's cells: which are in the queue, and how the jobs of others ended.

OUTPUT_DIR/slurm/jobs.jsonl    a line per sbatch call: `job`, `name` (the job's) and `tasks`, the names of the cells
                               of each task of the array
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bov_megatron.errors import StudyError
from bov_megatron.studies.folder import SLURM
from bov_megatron.studies.study import Study

_WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "REQUEUE_FED")
"""States in which no part of the job runs; every other state that squeue shows is called running."""


@dataclass(frozen=True)
class Task:
    """The task of an array that a cell was submitted in last."""

    job: str
    """`4711_3`"""
    state: str
    """`queued`, `running`, or `ended`."""
    reason: str = ""
    """Why it waits."""
    number: str = ""
    """The task's own job number, $SLURM_JOB_ID, while it is in the queue."""


def tasks_of(study: Study) -> dict[str, Task]:
    """Cell -> its last task; cells that were never submitted to Slurm are missing.

    Raises StudyError where there are jobs, but Slurm can't be asked.
    """
    jobs = read_jobs(study)
    if not jobs:
        return {}
    found = {}
    for job in jobs:
        for index, cells in enumerate(job["tasks"]):
            for cell in cells:
                found[cell] = f"{job['job']}_{index}"
    queue = _queue(sorted({job["name"] for job in jobs}))
    tasks = {}
    for cell, task in found.items():
        state, reason, number = queue.get(task, ("", "", ""))
        tasks[cell] = Task(task, "ended" if not state else "queued" if state in _WAITING else "running", reason, number)
    return tasks


def ended_states(tasks: list[str]) -> dict[str, str]:
    """Task -> state in which it ended (`TIMEOUT`, `NODE_FAIL`, …); empty where Slurm keeps no accounts."""
    jobs = sorted({task.split("_")[0] for task in tasks})
    if not jobs or not shutil.which("sacct"):
        return {}
    what = ["--allocations", "--noheader", "--parsable2", "--format=JobID,State", f"--jobs={','.join(jobs)}"]
    run = subprocess.run(["sacct", *what], capture_output=True, text=True, timeout=60)
    fields = [line.split("|") for line in run.stdout.splitlines() if run.returncode == 0]
    return {job: state.split()[0] for job, state in fields if job in tasks}  # CANCELLED by 1000


def read_jobs(study: Study) -> list[dict[str, Any]]:
    """The lines of jobs.jsonl, oldest first."""
    path = jobs_file(study)
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError:
        raise StudyError(f"{path} has a line that is not JSON; remove it") from None


def jobs_file(study: Study) -> Path:
    return study.output_dir / SLURM / "jobs.jsonl"


def _queue(names: list[str]) -> dict[str, tuple[str, str, str]]:
    """`job_index` -> state, reason and own number of every task in the queue whose job has one of these names."""
    command = ["squeue", "--noheader", "--array", f"--name={','.join(names)}", "--format=%F_%K|%T|%r|%A"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        raise StudyError("cells were submitted to Slurm, but there is no squeue here: use a login node") from None
    except subprocess.TimeoutExpired:
        raise StudyError("squeue does not answer; try again later") from None
    if run.returncode != 0:
        raise StudyError(f"squeue failed: {run.stderr.strip()}; try again later")
    rows = [line.split("|") for line in run.stdout.splitlines()]
    return {task: (state, reason, number) for task, state, reason, number in rows}
