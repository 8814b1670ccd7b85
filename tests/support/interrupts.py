"""Ctrl-C as a terminal sends it, to a command that really runs: to all processes of its foreground group."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 300.0
"""Seconds for a command to end on a busy machine; a hang is what fails."""
NOT_READABLE = re.compile(r"Traceback|Exception ignored|KeyboardInterrupt|resource_tracker|SignalException|Error:")


@dataclass
class Ended:
    """How a command ended."""

    status: int
    output: str
    """stdout and stderr, as they came."""
    took: float
    """Seconds from the interrupt to the end."""

    def check(self, *statuses: int) -> Ended:
        """Fails after a traceback, or with another status than these."""
        assert not NOT_READABLE.search(self.output), self.output
        assert self.status in statuses, f"status {self.status}\n{self.output}"
        return self


class Command:
    """A command in a foreground group of its own. Leaving the context kills what is left of it."""

    def __init__(self, arguments: Sequence[str | Path], log: Path, **environ: str):
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [str(argument) for argument in arguments],
                cwd=REPOSITORY,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env=os.environ | environ,
            )
        self.started = time.monotonic()

    def __enter__(self) -> Command:
        return self

    def __exit__(self, *exception: object) -> None:
        for kill in (lambda: os.killpg(self.process.pid, signal.SIGKILL), self.process.kill):
            with contextlib.suppress(ProcessLookupError):
                kill()
        self.process.wait()

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def hears(self) -> bool:
        """Whether our own code has begun: its first thread is the one that hears signals."""
        try:
            return len(os.listdir(f"/proc/{self.process.pid}/task")) > 1
        except OSError:
            return False

    def wait_for(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, f"ended with {self.process.returncode}\n{self.output}"
            assert time.monotonic() < deadline, self.output
            time.sleep(0.01)

    def sleep(self, seconds: float) -> None:
        """So long, or until the command has ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def interrupt(self) -> Ended:
        """Ctrl-C, at whatever the command does; how it ends."""
        sent = time.monotonic()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        return self.end(sent)

    def end(self, since: float | None = None) -> Ended:
        """Wait for the command to end by itself."""
        since = time.monotonic() if since is None else since
        status = self.process.wait(PATIENCE)
        return Ended(status, self.output, time.monotonic() - since)


def tool(name: str, *arguments: str | Path) -> list[str | Path]:
    """The command line of a file in tools/."""
    return [sys.executable, REPOSITORY / "tools" / f"{name}.py", *arguments]
