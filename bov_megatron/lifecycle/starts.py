"""When a run was started, by which code and with which recipe, and how each start ended.

    RUN/starts.jsonl    a line at the start of training and one at its end, written by rank 0 under the lease

A start has `time`, `start` (steps done before it), `commit`, `version`, `digest` (recipe.identity), `world_size`,
`host` and `job`; an end has `time`, `end` (steps done; null after an error), `status` (bov_megatron.errors), and
`error` if there was one. A start without an end was killed, or still runs.
"""

from __future__ import annotations

import datetime
import json
import os
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bov_megatron
from bov_megatron import errors
from bov_megatron.errors import BovError, RunFolderError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.lease import Lease
from bov_megatron.lifecycle.terminal import warn


@dataclass(frozen=True)
class Starts:
    """What a run's file says."""

    starts: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    """Of the last start; None if it has not ended, or was killed."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done, and the validation and the checkpoint after them."""
        return self.end is not None and self.end["status"] == errors.DONE


class StartRecord:
    """Context manager around one start, on rank 0. A start that fails before `begin` leaves nothing in a new folder.

    Args:
        lease: on the run's folder; nothing is written once it is lost.
        digest: of the recipe.
    """

    def __init__(self, lease: Lease, digest: str, world_size: int, environ: Mapping[str, str] = os.environ):
        self.lease, self.path = lease, lease.path.with_name(run_folder.STARTS)
        self.digest, self.world_size, self.job = digest, world_size, environ.get("SLURM_JOB_ID")
        self._begun = False
        self._end: dict[str, Any] = {"end": None, "status": errors.CRASHED}

    def __enter__(self) -> StartRecord:
        return self

    def begin(self, step: int) -> None:
        """Training begins, with `step` steps done."""
        self._begun = True
        self._append(
            start=step,
            commit=commit_of_code(),
            version=bov_megatron.__version__,
            digest=self.digest,
            world_size=self.world_size,
            host=socket.gethostname(),
            job=self.job,
        )

    def end(self, step: int, status: int) -> None:
        """Training has ended after `step` steps; written when the context is left."""
        self._end = {"end": step, "status": status}

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self.lease.lost or not (self._begun or self.path.exists()):
            return
        if error is not None:
            status = error.exit_status if isinstance(error, BovError) else errors.CRASHED
            self._end = {"end": None, "status": status, "error": str(error) or type(error).__name__}
        self._append(**self._end)

    def _append(self, **fields: Any) -> None:
        time = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        try:
            with self.path.open("a+b") as file:
                # A line that a crash has cut off must not spoil this one.
                torn = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
                file.write(b"\n" * torn + json.dumps({"time": time, **fields}).encode() + b"\n")
        except OSError as problem:
            warn(f"cannot write {self.path}: {problem.strerror}")


def read_starts(run_dir: Path) -> Starts:
    """The starts of a run; none where it was never started. Raises RunFolderError for lines that make no sense."""
    path = run_dir / run_folder.STARTS
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        return Starts()
    starts: list[dict[str, Any]] = []
    end = None
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a crash
            continue
        if isinstance(line, dict) and {"start", "digest", "commit"} <= line.keys():
            starts.append(line)
            end = None
        elif isinstance(line, dict) and {"end", "status"} <= line.keys():
            end = line
        else:
            raise RunFolderError(f"{path}: line {text[:60]!r} is neither a start nor an end; remove the line")
    return Starts(starts, end)


def commit_of_code() -> str:
    """Git commit of the running code, with `+changes` if tracked files differ from it; the version where the package
    is installed without its repository."""
    root = Path(bov_megatron.__file__).resolve().parents[1]
    if not (root / ".git").exists():  # git would find a repository that the installed package lies in
        return f"version {bov_megatron.__version__}"
    try:
        commit = _git(root, "rev-parse", "HEAD")[:12]
        return f"{commit}+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.SubprocessError):
        return f"version {bov_megatron.__version__}"


def _git(root: Path, *arguments: str) -> str:
    command = ["git", "-C", str(root), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
