"""What the run folder of a cell says: its starts, whether it has the cell's recipe, its last metrics, who trains it.

A study's folder:

    OUTPUT_DIR/cells/CELL/       the run folder (lifecycle/run_folder.py)
    OUTPUT_DIR/logs/CELL.log     what the run printed; only people read it
    OUTPUT_DIR/set_aside/        run folders of cells whose recipe has changed since
    OUTPUT_DIR/slurm/            what was submitted (submission.py)
    OUTPUT_DIR/results.json      results that were read already (results.py)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.errors import RunFolderError, StudyError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.starts import Starts, read_starts
from bov_megatron.recipe.identity import deciding_differences, recipe_digest
from bov_megatron.studies.study import Cell, Study

CELLS, LOGS, SET_ASIDE, SLURM, RESULTS = "cells", "logs", "set_aside", "slurm", "results.json"
_TAIL = 16 * 1024
"""Bytes read from the end of a metrics file at first; a line has some 600, one with statistics of tables thousands."""
_YAML = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class RunState:
    """A cell's run folder as it is now."""

    starts: Starts
    digest: str
    """Of the cell's recipe."""
    edits: dict[str, tuple[Any, Any]]
    """Fields in which the run's recipe differs from the cell's: name -> (the run's, the cell's)."""

    @property
    def finished(self) -> bool:
        return self.starts.finished and not self.edits

    @property
    def restarts(self) -> int:
        """Starts after the first one that had steps left to do."""
        last = self.starts.end or {}
        begun = [line["start"] for line in self.starts.starts]
        return max(0, len([step for step in begun if step == 0 or step != last.get("end")]) - 1)


def read_state(cell: Cell) -> RunState:
    """Starts and recipe of a cell's run. Raises StudyError for a folder that is no run folder, or is damaged."""
    run_dir = cell.run_dir
    try:
        starts = read_starts(run_dir)
    except NotADirectoryError:
        raise StudyError(f"{run_dir} is not a folder; move it away, cell {cell.name} writes there") from None
    except (RunFolderError, OSError) as error:
        raise StudyError(f"cell {cell.name}: {error}") from None
    digest = recipe_digest(cell.recipe)
    return RunState(starts, digest, _edits(cell, starts, digest))


def _edits(cell: Cell, starts: Starts, digest: str) -> dict[str, tuple[Any, Any]]:
    used = _digests_with_progress(starts)
    if used == {digest}:  # the usual case, in which the recipe need not be read
        return {}
    path = cell.run_dir / run_folder.RECIPE
    try:
        stored = yaml.load(path.read_text(encoding="utf-8"), _YAML)
    except FileNotFoundError:
        _refuse_other_folder(cell)
        return {"recipe (digest)": (", ".join(sorted(used)), digest)} if used else {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} cannot be read ({error}); move the run folder away") from None
    if not isinstance(stored, dict):
        raise StudyError(f"{path} is not a recipe; move the run folder away")
    edits = deciding_differences(stored, cell.recipe)
    if not edits and len(used) > 1:
        # The stored recipe is the last start's. Steps before it were made with another one.
        first = next(line["digest"] for line in starts.starts if line["digest"] in used)
        return {"recipe of the first start (digest)": (first, digest)}
    return edits


def _digests_with_progress(starts: Starts) -> set[str]:
    """Digests of the last start, and of those before it from whose steps a later one went on."""
    digests, later = set(), None
    for line in reversed(starts.starts):
        if later is None or line["start"] < later:
            digests.add(line["digest"])
            later = line["start"]
    return digests


def _refuse_other_folder(cell: Cell) -> None:
    """A folder without a recipe has to be empty, but for what a run writes before its recipe."""
    if not cell.run_dir.is_dir():
        return
    known = (run_folder.LEASE, run_folder.TOKENIZER, run_folder.RESTARTS, run_folder.STARTS, run_folder.STACKS)
    others = [path.name for path in cell.run_dir.iterdir() if not path.name.startswith(known)]
    if others:
        raise StudyError(
            f"{cell.run_dir} is no run folder: it has no {run_folder.RECIPE}, but {', '.join(sorted(others)[:3])}; "
            f"move it away, cell {cell.name} writes there"
        )


def log_in(run_dir: Path) -> Path:
    """Where a cell's run prints to if it shares a machine with others."""
    return run_dir.parents[1] / LOGS / f"{run_dir.name}.log"


def job_log(run_dir: Path, job: str) -> Path:
    """Where the task `4711_3` of a Slurm array prints to; `%A_%a` for sbatch."""
    return run_dir.parents[1] / LOGS / f"slurm-{job}.out"


def describe_edits(edits: dict[str, tuple[Any, Any]]) -> str:
    """`field: old -> new, …`"""
    return ", ".join(f"{name}: {old!r} -> {new!r}" for name, (old, new) in edits.items())


def set_aside(study: Study, cell: Cell) -> Path:
    """Move the run folder of a cell out of the way of a new run; where it lies now."""
    target = study.output_dir / SET_ASIDE / cell.name
    number = 1
    while target.exists():
        number += 1
        target = target.with_name(f"{cell.name}.{number}")
    target.parent.mkdir(parents=True, exist_ok=True)
    return cell.run_dir.rename(target)


def file_system_time(study: Study) -> float:
    """The present by the clock of the file system that the study lies on; see lease.current_holder."""
    study.output_dir.mkdir(parents=True, exist_ok=True)
    probe = study.output_dir / ".clock"
    probe.write_text("")
    return probe.stat().st_mtime


def last_steps(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Lines of a run's metrics from the last one backwards, reading from the end of the file only as far as needed.

    A last line without its end is being written, or was cut off by a crash, and is left out. Raises StudyError for any
    other line that is not JSON.
    """
    path = run_dir / run_folder.METRICS
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        size = file.seek(0, os.SEEK_END)
        length, seen = min(_TAIL, size), 0
        while True:
            file.seek(size - length)
            lines = file.read(length).split(b"\n")[:-1]
            if length < size:
                del lines[:1]  # begins before what was read
            for line in reversed(lines[: len(lines) - seen]):
                yield parse_line(path, line)
            if length == size:
                return
            length, seen = min(8 * length, size), len(lines)


def parse_line(path: Path, line: bytes) -> dict[str, Any]:
    """One line of metrics. Raises StudyError."""
    try:
        values = json.loads(line)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        text = line[:60].decode(errors="replace")
        raise StudyError(f"{path} has a line that is not a step's: {text!r}; remove that line, or the run folder")
    return values
