"""Ends a run that hangs, with every rank's stacks, so that whoever started it can start it again.

A rank that waits in a collective for one that will never come looks alive to every scheduler. Left alone, it would hold
its nodes until the collective times out, if that does.
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
"""Between a rank's stacks and its end: launchers kill the others as soon as one has ended, and they have stacks too."""


class Watchdog:
    """Call `alive` at least every `minutes`; otherwise all threads' stacks are written to
    `RUN/stacks/rank_<n>.txt` and to stderr, and the process ends with `errors.HANG`.

    A context manager: on entering it is armed, on leaving disarmed. `minutes` 0 means never.
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
        """A step, or some other limited piece of work, has ended."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        while (left := self._last + self.seconds - time.monotonic()) > 0:
            # Should the interpreter itself be stuck, this thread is too. This one is not Python's.
            faulthandler.dump_traceback_later(2 * self.seconds + GRACE_SECONDS, exit=True, file=2)
            if self._leaving.wait(left):
                return
        self._end()

    def _end(self) -> None:
        said = (
            f"error: rank {self.rank} has not finished a step for {self.seconds / 60:g} minutes (health.hang_minutes); "
            f"its stacks are below and in {self.file}"
        )
        print(said, file=sys.stderr, flush=True)
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("w") as file:
                print(f"rank {self.rank}, {time.strftime('%Y-%m-%d %H:%M:%S')}", file=file, flush=True)
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:  # a file system that hangs or is full must not keep the run from ending
            print(f"warning: {self.file}: {error}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(2, all_threads=True)
        time.sleep(GRACE_SECONDS)
        os._exit(errors.HANG)
