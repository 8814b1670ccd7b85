"""Ensures that a run is started only once at a time, with a lease file in the run folder, held by rank 0.

    RUN/lease.json    host, process, job, start time, and a beat that increases every few seconds

File locks don't work: clusters' network file systems grant them to everyone, or keep them after a node died. A lease
whose beat doesn't change for STALE_SECONDS is free; this is observed, not computed from two machines' clocks. There is
no wait if the holder is certainly gone: a dead process of this machine, or an earlier start of the same Slurm job.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bov_megatron.errors import RunFolderError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.terminal import say

BEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


@dataclass(frozen=True)
class Holder:
    """The start of a run that holds the run folder."""

    token: str
    """Unique to this start."""
    host: str
    machine: str
    """Boot and process-id namespace in which `process` is valid."""
    process: int
    process_started: int | None
    """Clock ticks since boot; distinguishes a process from a later one with the same id."""
    job: str | None
    """Slurm job."""
    restart: int
    """How often Slurm has restarted the job."""
    since: str
    """Local time, for messages."""
    beat: int = 0

    def describe(self) -> str:
        where = f"host {self.host}, process {self.process}" + (f", Slurm job {self.job}" if self.job else "")
        return f"{where}, since {self.since}"


class Lease:
    """Context manager that holds a run folder for this process.

    Args:
        run_dir: created if it doesn't exist, and removed on leaving if it is empty.
        beat_seconds: how often to renew the lease.
        stale_seconds: time without renewal after which a lease is free; several beats, so that a busy file system or a
            suspended process doesn't look dead.
        environ: Slurm's variables.

    Raises RunFolderError on entering if the folder is in use, after at most `stale_seconds`, or can't be written.
    """

    def __init__(
        self,
        run_dir: Path,
        beat_seconds: float = BEAT_SECONDS,
        stale_seconds: float = STALE_SECONDS,
        environ: Mapping[str, str] = os.environ,
    ):
        self.path = run_dir / run_folder.LEASE
        self.beat_seconds, self.stale_seconds = beat_seconds, stale_seconds
        self.me = _myself(environ)
        self.lost = False
        """Another start has taken the folder, so this one must not write there any more."""
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._create():
                holder = read_holder(self.path)
                if holder is not None:
                    self._wait_until_free(holder)
                    self._remove(holder)
        except OSError as error:
            raise RunFolderError(
                f"run folder {self.path.parent} cannot be written ({error}): free space or fix its permissions, or set "
                "output_dir=… to another place"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leaving.set()
        self._thread.join()
        if not self.lost:
            self._remove(self.me)
        with contextlib.suppress(OSError):  # not empty
            self.path.parent.rmdir()

    def _create(self) -> bool:
        """Create the lease; False if there is one."""
        # By linking a complete file, which is atomic on network file systems too.
        part, text = self._part(), json.dumps(dataclasses.asdict(self.me))
        try:
            part.write_text(text)
            try:
                os.link(part, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without hard links
                with self.path.open("x") as file:
                    file.write(text)
            return True
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)

    def _wait_until_free(self, holder: Holder) -> None:
        """Return once the holder is known to be gone; raise RunFolderError once it is known to be alive."""
        if _is_gone(holder, self.me):
            say(f"taking over from {holder.describe()}: it has ended without releasing the run folder")
            return
        if holder.machine != self.me.machine:
            if (alive := self._watch(holder)) is None:
                return
            holder = alive
        raise RunFolderError(
            f"run folder {self.path.parent} is in use: {holder.describe()}. Wait until that run has ended, end it, or "
            "start another one with name=… or output_dir=…"
        )

    def _watch(self, holder: Holder) -> Holder | None:
        """Wait until the lease changes and return its holder; None if it was released or has become stale."""
        say(f"{self.path} is held by {holder.describe()}; waiting {self.stale_seconds:.0f} s for a sign of life")
        deadline = time.monotonic() + self.stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.beat_seconds))
            current = read_holder(self.path)
            if current != holder:
                return current
        say(f"taking over from {holder.describe()}: no sign of life for {self.stale_seconds:.0f} s")
        return None

    def _remove(self, holder: Holder) -> None:
        """Remove the lease if it is still `holder`'s."""
        # By renaming, in which only one process succeeds. If a third start was faster, its lease is put back.
        removed = self._part()
        try:
            self.path.rename(removed)
        except FileNotFoundError:
            return
        owner = read_holder(removed)
        if owner is not None and owner.token != holder.token:
            with contextlib.suppress(FileExistsError):
                os.link(removed, self.path)
        removed.unlink()

    def _keep(self) -> None:
        beat = 0
        while not self._leaving.wait(self.beat_seconds):
            beat += 1
            try:
                holder = read_holder(self.path)
                if holder is not None and holder.token != self.me.token:
                    self.lost = True
                    return
                part = self._part()
                part.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(self.me, beat=beat))))
                part.replace(self.path)
            except (OSError, RunFolderError) as error:  # a full disk, a partial file: the next beat may succeed
                say(f"warning: {self.path} cannot be renewed: {error}")

    def _part(self) -> Path:
        return self.path.with_name(f"{run_folder.LEASE}.{uuid.uuid4().hex}")


def read_holder(path: Path) -> Holder | None:
    """The holder in the lease file `path`; None if there is no file. Raises RunFolderError for a damaged one."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RunFolderError(
            f"{path} is not a lease of this version ({error}): remove it if no run uses the folder"
        ) from None


def current_holder(run_dir: Path, now: float) -> Holder | None:
    """The start that holds a run folder, judged without waiting; None if nobody does any more.

    A holder on another machine counts as gone when its lease was last renewed STALE_SECONDS before `now`, the
    modification time of a file just written to the same file system: clocks of machines are not compared.

    Raises RunFolderError for a damaged lease.
    """
    path = run_dir / run_folder.LEASE
    holder = read_holder(path)
    if holder is None or holder.machine == _machine():
        return holder if holder is not None and _start_ticks(holder.process) == holder.process_started else None
    try:
        return holder if now - path.stat().st_mtime < STALE_SECONDS else None
    except FileNotFoundError:  # released meanwhile
        return None


def _myself(environ: Mapping[str, str]) -> Holder:
    return Holder(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        machine=_machine(),
        process=os.getpid(),
        process_started=_start_ticks(os.getpid()),
        job=environ.get("SLURM_JOB_ID"),
        restart=int(environ.get("SLURM_RESTART_COUNT") or 0),
        since=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _machine() -> str:
    """Boot and process-id namespace (containers on one host don't see each other's processes)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _is_gone(holder: Holder, me: Holder) -> bool:
    """Whether the holder has certainly ended."""
    if holder.job is not None and holder.job == me.job and holder.restart < me.restart:
        return True  # Slurm restarts a job only after all of it has ended
    return holder.machine == me.machine and _start_ticks(holder.process) != holder.process_started


def _start_ticks(process: int) -> int | None:
    """Start time of a process of this machine, in clock ticks since boot; None if it has ended."""
    # Fields as in proc(5), counted from behind the name in parentheses, which may contain anything.
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], int(fields[19])
    return None if state in "ZX" else started
