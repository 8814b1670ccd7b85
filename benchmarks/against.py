"""The training step of this tree against that of a commit, in turns.

The commit is checked out into a temporary worktree; a process in each tree builds the same recipes by that tree's own
code and takes a step when told to, while the other one waits.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.timing import Spread, Timings, speed_ratio
from benchmarks.training_step import SOURCES, bench_recipe

TREE = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).resolve().parent / "against_worker.py"
DISCARD = 3


def bench_against(commit: str, turns: int, quick: bool, settings: Sequence[str] = ()) -> dict:
    """Per value source: tokens/s of both trees, and the ratios of whole steps and of the optimizer's part of them.

    Args:
        commit: anything that git resolves to one.
        settings: recipe fields `section.field=value` for this tree alone.

    Raises ValueError where git knows no such commit.
    """
    tokens = {source: bench_recipe(source, quick).batch_tokens for source in SOURCES}
    with checked_out(commit) as folder, _worker(folder, quick) as before, _worker(TREE, quick, settings) as now:
        trees = {"now": now, commit: before}
        steps = {source: {tree: Timings() for tree in trees} for source in SOURCES}
        updates = {source: {tree: Timings() for tree in trees} for source in SOURCES}
        losses: dict[str, dict[str, list[float]]] = {source: {tree: [] for tree in trees} for source in SOURCES}
        for turn in range(DISCARD + turns):
            for source in SOURCES:
                for tree in list(trees)[:: -1 if turn % 2 else 1]:
                    done = _take_step(trees[tree], source, turn)
                    losses[source][tree].append(done["loss"])
                    if turn >= DISCARD:
                        for timings, part in ((steps, "step"), (updates, "update")):
                            wall, processor = done[part]
                            timings[source][tree].wall.append(wall)
                            timings[source][tree].processor.append(processor)
    return {
        source: {
            "variants": {
                tree: {
                    "tokens_per_second": Spread.of([tokens[source] / wall for wall in steps[source][tree].wall]),
                    "update_milliseconds": Spread.of([1e3 * wall for wall in updates[source][tree].wall]),
                    "losses": losses[source][tree],
                }
                for tree in trees
            },
            f"step now / {commit}": speed_ratio(steps[source], "now", commit),
            f"optimizer now / {commit}": speed_ratio(updates[source], "now", commit),
        }
        for source in SOURCES
    }


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """Context manager: a temporary worktree of a commit."""
    git = ["git", "-C", str(TREE)]
    known = subprocess.run([*git, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise ValueError(f"--against {commit}: git knows no such commit here; fetch it, or name another one")
    with tempfile.TemporaryDirectory(prefix="against-") as folder:
        path = Path(folder) / "tree"
        subprocess.run([*git, "worktree", "add", "--quiet", "--detach", str(path), commit], check=True)
        try:
            yield path
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(path)], check=True)


@contextlib.contextmanager
def _worker(tree: Path, quick: bool, settings: Sequence[str] = ()) -> Iterator[subprocess.Popen]:
    arguments = [str(torch.get_num_threads()), json.dumps(SOURCES), json.dumps(quick), *settings]
    process = subprocess.Popen(
        [sys.executable, str(WORKER), *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "OMP_WAIT_POLICY": "passive"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _take_step(process: subprocess.Popen, source: str, turn: int) -> dict:
    print(json.dumps([source, turn]), file=process.stdin, flush=True)
    answer = process.stdout.readline()  # type: ignore[union-attr]
    if not answer:
        raise RuntimeError("a process of the comparison has ended; its error is above")
    return json.loads(answer)
