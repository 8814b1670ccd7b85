"""What processes of one machine have checked since a start, so that each file is hashed by one of them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

_SHARED_MEMORY = Path("/dev/shm")
_WAIT_SECONDS = 0.02


class CheckedFiles:
    """A byte for each file in the machine's memory: locked while a process checks the file, 1 once it is found good.

    The kernel unlocks what a killed process held, and another then checks. All processes must reserve the same numbers
    in the same order. Safe for threads.

    Args:
        name: of the start, the same on all its processes and on no other start's.

    Raises OSError where neither shared memory nor the folder for temporary files can be written.
    """

    def __init__(self, name: str):
        folder = _SHARED_MEMORY if os.access(_SHARED_MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        self._path = folder / f"bov-checked-{socket.gethostname()}-{name}"
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._reserved = 0
        self._threads: defaultdict[int, threading.Lock] = defaultdict(threading.Lock)

    def remove_name(self) -> None:
        """Leave nothing behind, however the processes end. Call it once all of them have made theirs."""
        self._path.unlink(missing_ok=True)

    def reserve(self, count: int) -> int:
        """The first of `count` new numbers."""
        self._reserved += count
        return self._reserved - count

    def once(self, number: int, check: Callable[[], object]) -> None:
        """Call `check`, which raises for a damaged file, unless a process has done so; waits while one does."""
        with self._threads[number]:
            while not self._is_good(number):
                with self._locked(number) as locked:
                    if locked and not self._is_good(number):
                        check()
                        os.pwrite(self._file, b"\1", number)
                if not locked:
                    time.sleep(_WAIT_SECONDS)

    def _is_good(self, number: int) -> bool:
        return os.pread(self._file, 1, number) == b"\1"

    @contextlib.contextmanager
    def _locked(self, number: int) -> Iterator[bool]:
        # Without waiting in the kernel, which takes threads of two processes that wait for each other's bytes for a
        # deadlock.
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except (BlockingIOError, PermissionError):
            yield False
            return
        try:
            yield True
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, number)
