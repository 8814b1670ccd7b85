"""One start of a run at a time: a lease file in the run folder, held by rank 0.

    RUN/lease.json    host, process, job, since when; written again every few seconds with a new beat

File locks are no help: network file systems that clusters use grant them to everyone, or keep them after a node died.
A lease whose beat stands still is nobody's. Whether it stands still is watched, never computed from clocks of two
machines. Where it is certain that the holder is gone, nobody waits: a dead process of this machine, or an earlier start
of the same Slurm job.
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
    """Who holds a run folder."""

    token: str
    """Of this one start, unlike any other."""
    host: str
    machine: str
    """Within which `process` means something: boot and process-id namespace."""
    process: int
    process_started: int | None
    """Clock ticks from boot on; tells a process from a later one of the same number."""
    job: str | None
    """Slurm job, or None."""
    restart: int
    """How often Slurm has started that job again."""
    since: str
    """Local time, for people."""
    beat: int = 0

    def describe(self) -> str:
        where = f"host {self.host}, process {self.process}" + (f", Slurm job {self.job}" if self.job else "")
        return f"{where}, since {self.since}"


class Lease:
    """Take a run folder for this process, keep it, give it back. A context manager.

    Args:
        run_dir: made if it does not exist, and removed again on leaving if nothing was put there.
        beat_seconds: between two signs of life.
        stale_seconds: without any after which a lease is nobody's; several beats, so that a busy file system or a
            stopped process is not taken for a dead one.
        environ: where Slurm's variables are looked up.

    Raises RunFolderError on entering, at once where the holder is known to live, else after at most `stale_seconds`.
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
        """Another start has taken the folder: this one must not write there any more."""
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
                f"run folder {self.path.parent} cannot be written ({error}): make room or give permission there, or "
                "set output_dir=… to another place"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._leaving.set()
        self._thread.join()
        if not self.lost:
            self._remove(self.me)
        with contextlib.suppress(OSError):  # something is in it
            self.path.parent.rmdir()

    def _create(self) -> bool:
        """Whether the lease is now ours. A hard link to a complete file: the one step that network file systems, too,
        grant to only one."""
        part, text = self._part(), json.dumps(dataclasses.asdict(self.me))
        try:
            part.write_text(text)
            try:
                os.link(part, self.path)
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                with self.path.open("x") as file:
                    file.write(text)
            return True
        except FileExistsError:
            return False
        finally:
            part.unlink(missing_ok=True)

    def _wait_until_free(self, holder: Holder) -> None:
        """Return as soon as the holder is known to be gone. Raises RunFolderError as soon as it is known to live."""
        if _is_gone(holder, self.me):
            say(f"taking over from {holder.describe()}: it has ended without giving the run folder back")
            return
        if not _is_on_this_machine(holder, self.me):
            holder = self._watch(holder)
            if holder is None:
                return
        raise RunFolderError(
            f"run folder {self.path.parent} is in use: {holder.describe()}. Wait until that has ended or end it, or "
            "start another run with name=… or output_dir=…"
        )

    def _watch(self, holder: Holder) -> Holder | None:
        """The holder as of its first sign of life; None where it gave none for long enough, or gave the folder back."""
        say(f"{self.path} is held by {holder.describe()}; waiting for a sign of life, {self.stale_seconds:.0f} s long")
        deadline = time.monotonic() + self.stale_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self.beat_seconds))
            now = read_holder(self.path)
            if now != holder:
                return now
        say(f"taking over from {holder.describe()}: no sign of life for {self.stale_seconds:.0f} s")
        return None

    def _remove(self, holder: Holder) -> None:
        """Remove the lease if it is still `holder`'s. By renaming, which only one can do; what turns out to be a third
        start's, which was faster, is put back."""
        removed = self._part()
        try:
            self.path.rename(removed)
        except FileNotFoundError:
            return
        found = read_holder(removed)
        if found is not None and found.token != holder.token:
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
            except (OSError, RunFolderError) as error:  # a full disk, half a file: the next beat may succeed
                say(f"warning: {self.path} cannot be renewed: {error}")

    def _part(self) -> Path:
        return self.path.with_name(f"{run_folder.LEASE}.{uuid.uuid4().hex}")


def read_holder(path: Path) -> Holder | None:
    """Who holds the lease file `path`; None where there is none."""
    try:
        return Holder(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise RunFolderError(
            f"{path} is no lease of this version ({error}): remove it once no run uses the folder"
        ) from None


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
    """Boot and process-id namespace: containers of one machine don't see each other's processes."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + " " + os.readlink("/proc/self/ns/pid")
    except OSError:
        return socket.gethostname()


def _is_on_this_machine(holder: Holder, me: Holder) -> bool:
    return holder.machine == me.machine


def _is_gone(holder: Holder, me: Holder) -> bool:
    """Whether the holder has certainly ended."""
    if holder.job is not None and holder.job == me.job and holder.restart < me.restart:
        return True  # Slurm starts a job again only after all of it has ended
    if not _is_on_this_machine(holder, me):
        return False
    return _start_ticks(holder.process) != holder.process_started


def _start_ticks(process: int) -> int | None:
    """When a process of this machine was started, from boot on, whatever has been done to the clock since; None if it
    has ended. Fields of proc(5), counted from behind the name, which may hold anything."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    state, started = fields[0], int(fields[19])
    return None if state in "ZX" else started
