"""Training several runs beside each other on one machine, each in processes of its own, as a person would start them.

Used by `submit --local`, and in a Slurm job whose node several small cells share.
"""

from __future__ import annotations

import collections
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bov_megatron import errors
from bov_megatron.errors import StudyError
from bov_megatron.lifecycle.restarts import decide
from bov_megatron.studies import folder
from bov_megatron.studies.study import Cell

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""For the other ranks of a run to end by themselves after one has failed."""


@dataclass(frozen=True)
class Run:
    """What to start: `train BASE OVERRIDES…` on `world_size` ranks."""

    name: str
    base: str
    overrides: tuple[str, ...]
    world_size: int
    run_dir: Path
    log: Path
    """What the ranks print is appended there."""

    @staticmethod
    def of(cell: Cell) -> Run:
        return Run(
            cell.name, str(cell.base), cell.overrides, cell.world_size, cell.run_dir, folder.log_in(cell.run_dir)
        )


@dataclass(frozen=True)
class Ended:
    """How a run ended, after all its starts here."""

    status: int
    """Exit status of its last start (bov_megatron.errors)."""
    seconds: float
    """Since its first start here."""
    reason: str
    """Why it is not started again; empty when it is complete."""

    stopped: bool = False
    """Whether it ended because this process was told to stop."""

    @property
    def complete(self) -> bool:
        return self.status == errors.DONE


class Observer:
    """Told about the runs; does nothing by itself."""

    def started(self, run: Run) -> None:
        """A run was started."""

    def restarted(self, run: Run, reason: str) -> None:
        """A run that was interrupted or crashed is started again."""

    def ended(self, run: Run, end: Ended) -> None:
        """A run has ended and is not started again."""

    def tick(self, running: Sequence[Run]) -> None:
        """Called a few times a second."""

    def stopping(self, running: Sequence[Run]) -> None:
        """A signal has arrived: the runs are told to save and end."""


class Runner:
    """Trains `runs`, at most `at_a_time` of them at once, in their order.

    A run that crashes is started again as `lifecycle.restarts` decides; one that fails leaves the others alone. SIGINT,
    SIGTERM and SIGUSR1 let every running run finish its step and save; a second SIGINT kills them.

    Args:
        at_a_time: runs at once.
        threads: OMP_NUM_THREADS of each rank; default: the machine's cores shared out.

    Raises StudyError where there are GPUs, but not enough for so many runs at once.
    """

    def __init__(self, runs: Sequence[Run], at_a_time: int, observer: Observer, threads: int | None = None):
        self.waiting, self.observer = collections.deque(runs), observer
        ranks = max((run.world_size for run in runs), default=1)
        self.slots = _slots(min(at_a_time, max(1, len(runs))), ranks)
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) // (len(self.slots) * ranks))
        self.running: dict[Run, _Processes] = {}
        self.ends: dict[str, Ended] = {}
        self.stop_signals: list[int] = []
        """Those that have arrived."""
        self._told = False

    def train(self) -> dict[str, Ended]:
        """Train until all have ended, or until a signal; how each ended, by name. Runs not started are missing."""
        with self._signals():
            try:
                while self.running or (self.waiting and not self.stop_signals):
                    self._pass_signals_on()
                    while self.waiting and self.slots and not self.stop_signals:
                        self._start(self.waiting.popleft())
                    for run, processes in list(self.running.items()):
                        if (status := processes.poll()) is not None:
                            self._ended(run, processes, status)
                    self.observer.tick(list(self.running))
                    time.sleep(POLL_SECONDS)
            finally:
                for processes in self.running.values():  # after an error here: no run is left without its parent
                    processes.send(signal.SIGTERM)
        return self.ends

    def _start(self, run: Run) -> None:
        self.running[run] = _Processes(run, self.slots.pop(), self.threads)
        self.observer.started(run)

    def _ended(self, run: Run, processes: _Processes, status: int) -> None:
        stopped = bool(self.stop_signals) and status != errors.DONE
        if stopped:
            reason = "stopped" if status == errors.INTERRUPTED else f"stopped, status {status}"
        else:
            decision = decide(run.run_dir, status)
            if decision.again:
                processes.start()
                self.observer.restarted(run, f"status {status}: {decision.reason}")
                return
            reason = "" if status == errors.DONE else decision.reason
        self.slots.append(processes.devices)
        self.running.pop(run)
        self.ends[run.name] = Ended(status, time.monotonic() - processes.first_start, reason, stopped)
        self.observer.ended(run, self.ends[run.name])

    @contextmanager
    def _signals(self) -> Iterator[None]:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            numbers.append(signal.SIGHUP)
        former = {number: signal.signal(number, lambda got, _: self.stop_signals.append(got)) for number in numbers}
        try:
            yield
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)

    def _pass_signals_on(self) -> None:
        # Here and not in the handler, which could run while a process is being started.
        if self.stop_signals and not self._told:
            self._told = True
            # A scheduler may signal the runs directly as well, and a second signal of the same kind kills them.
            self._send(signal.SIGUSR1 if self.stop_signals[0] == signal.SIGTERM else signal.SIGTERM)
            self.observer.stopping(list(self.running))
        if self.stop_signals.count(signal.SIGINT) > 1:
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for processes in self.running.values():
            processes.send(number)


class _Processes:
    """The ranks of one run."""

    def __init__(self, run: Run, devices: str | None, threads: int):
        self.run, self.devices, self.threads = run, devices, threads
        self.first_start = time.monotonic()
        self.ranks: list[subprocess.Popen] = []
        self.start()

    def start(self) -> None:
        self.failed: tuple[int, float] | None = None
        """Status of the first rank that failed, and when."""
        self.run.log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "bov_megatron.train", self.run.base, *self.run.overrides]
        # A session of their own: Ctrl-C is meant for this process, which passes it on as SIGTERM.
        with self.run.log.open("ab") as log:
            self.ranks = [
                subprocess.Popen(
                    command,
                    env=environ,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
                for environ in self._environments()
            ]

    def _environments(self) -> list[dict[str, str]]:
        # In a Slurm step this process is the only rank, which the runs must not take for their own.
        dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
        environ = {name: value for name, value in os.environ.items() if name not in (*dropped, "BOV_STATUS_FILE")}
        environ |= {"OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}
        if self.devices is not None:
            environ["CUDA_VISIBLE_DEVICES"] = self.devices
        size = self.run.world_size
        if size == 1:
            return [environ]
        world = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
        world["MASTER_PORT"] = str(_free_port())
        return [environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(size)]

    def poll(self) -> int | None:
        """The run's exit status once all ranks have ended: that of the first one that failed."""
        statuses = [rank.poll() for rank in self.ranks]
        bad = next((status for status in statuses if status), None)
        if bad and self.failed is None:
            self.failed = (128 - bad if bad < 0 else bad, time.monotonic())
        if None in statuses:
            if self.failed and time.monotonic() - self.failed[1] > GRACE_SECONDS and bad != errors.INTERRUPTED:
                self.send(signal.SIGKILL)  # they wait for the one that has gone
            return None
        return self.failed[0] if self.failed else errors.DONE

    def send(self, number: signal.Signals) -> None:
        for rank in self.ranks:
            rank.send_signal(number)


def _slots(at_a_time: int, ranks: int) -> list[str | None]:
    """The GPUs (CUDA_VISIBLE_DEVICES) of each run at once; None where there are none."""
    devices = visible_gpus()
    if not devices:
        return [None] * at_a_time
    if at_a_time * ranks > len(devices):
        raise StudyError(
            f"{at_a_time} cells at a time with {ranks} ranks need {at_a_time * ranks} GPUs, here are {len(devices)}; "
            f"at most {len(devices) // ranks} fit"
        )
    return [",".join(devices[slot * ranks : (slot + 1) * ranks]) for slot in range(at_a_time)]


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES of the GPUs that this process may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name.strip()]
    known = Path("/proc/driver/nvidia/gpus")
    return [str(number) for number in range(len(list(known.iterdir())))] if known.is_dir() else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
