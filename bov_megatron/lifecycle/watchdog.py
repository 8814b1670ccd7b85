"""Ends a hanging run with the stacks of every rank, so that it can be started again.

To a scheduler, a rank that waits in a collective for one that will never come looks alive.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from bov_megatron import errors
from bov_megatron.lifecycle import run_folder

GRACE_SECONDS = 5.0
"""Between dumping stacks and exiting: launchers kill all ranks once one has exited, and the others dump stacks too."""


class Watchdog:
    """Context manager that ends the process with `errors.HANG` if `alive` isn't called for `minutes` (0: never).

    First it writes all threads' stacks to `RUN/stacks/rank_<n>.txt` and stderr.
    """

    def __init__(self, run_dir: Path, rank: int, minutes: float):
        self.file, self.rank, self.seconds = run_dir / run_folder.STACKS / f"rank_{rank:05}.txt", rank, 60 * minutes
        self._last = time.monotonic()
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.alive()
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.seconds:
            self._leaving.set()
            self._thread.join()
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Call after each step or other bounded piece of work."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while (left := self._last + self.seconds - time.monotonic()) > 0:
            # If the interpreter itself is stuck, so is this thread; faulthandler's isn't a Python thread.
            faulthandler.dump_traceback_later(2 * self.seconds + GRACE_SECONDS, exit=True, file=2)
            if self._leaving.wait(left):
                return
        self._end()

    def _end(self) -> None:
        message = (
            f"error: rank {self.rank} has not finished a step for {self.seconds / 60:g} minutes (health.hang_minutes); "
            f"its stacks are below and in {self.file}"
        )
        print(message, file=sys.stderr, flush=True)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("w") as file:
                print(f"rank {self.rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a full file system must not keep the run from ending
            print(f"warning: {self.file}: {error}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)
        time.sleep(GRACE_SECONDS)
        os._exit(errors.HANG)
