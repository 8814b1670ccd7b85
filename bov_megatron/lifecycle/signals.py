"""Hearing signals at once, wherever the main thread is. Imports nothing heavy, so that it can be the first import."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from typing import Any, NoReturn

ONE_PRESS_SECONDS = 1.0
"""One Ctrl-C may arrive twice: from the terminal and, moments later, passed on by torchrun."""
POLL_SECONDS = 0.1


class Listener:
    """Hears signals of `numbers` between `listen` and `stop`, or as a context manager; in the main thread only.

    Python runs handlers in the main thread, and only between its own instructions: never while a library computes for a
    minute. So there is a thread as well, which `first` is called in when a signal arrives for the first time. The
    second signal of a kind ends the process at once, with status 128 + its number.
    """

    def __init__(self, numbers: tuple[signal.Signals, ...]):
        self.numbers = numbers
        self._final_status: int | None = None
        self._former: dict[int, Any] = {}

    def handle(self, number: signal.Signals) -> None:
        """In the main thread, for each signal, as soon as that thread can."""

    def first(self, number: signal.Signals) -> None:
        """In the listening thread, for the first signal of a kind."""

    def waiting(self, since: float) -> None:
        """In the listening thread, often, once a signal has arrived: `since` on time.monotonic()."""

    def leave_with(self, status: int) -> None:
        """Call when the exit status of the process is known: a signal from now on ends it at once with this one."""
        self._final_status = status

    def listen(self) -> None:
        # Held back while all of this is put in place; the thread inherits that, so the main one gets the signals.
        former_mask = signal.pthread_sigmask(signal.SIG_BLOCK, self.numbers)
        self._pid = os.getpid()
        self._reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former_wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._handle) for number in self.numbers}
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        signal.pthread_sigmask(signal.SIG_SETMASK, former_mask)

    def stop(self) -> None:
        """Restore the handlers from before."""
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_wakeup)
        os.write(self._writing, b"\0")
        self._thread.join()
        os.close(self._reading)
        os.close(self._writing)

    def __enter__(self):
        self.listen()
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def _handle(self, number: int, frame: object) -> None:
        if os.getpid() == self._pid:  # a forked child has our handlers until it sets its own
            self.handle(signal.Signals(number))

    def _listen(self) -> None:
        arrivals: dict[int, float] = {}
        poll = select.poll()
        poll.register(self._reading, select.POLLIN)
        while True:
            if not poll.poll(1000 * POLL_SECONDS if arrivals else None):
                self.waiting(min(arrivals.values()))
                continue
            now = time.monotonic()
            for number in os.read(self._reading, 64):
                if number == 0:
                    return
                if number not in self.numbers:
                    continue
                if self._final_status is not None:
                    end(self._final_status)
                if number not in arrivals:
                    arrivals[number] = now
                    self.first(signal.Signals(number))
                elif now - arrivals[number] > ONE_PRESS_SECONDS:
                    end(128 + number)


def end(status: int) -> NoReturn:
    """End the process at once, from any thread: no clean-up, no exit hooks."""
    os._exit(status)


def tell(text: str) -> None:
    """Write a line to stderr from any thread, below what a terminal shows of ^C or of a progress bar."""
    line = f"\n{text}\n" if os.isatty(2) else f"{text}\n"
    with contextlib.suppress(OSError):
        os.write(2, line.encode())  # not through sys.stderr, which the main thread may hold


def speaks() -> bool:
    """Whether this process prints what concerns all ranks: it is the first of its node, or alone."""
    return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
