"""Worker processes of the data tools: killed where the tool is interrupted, gone where it is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, Literal

from bov_megatron.errors import DataError


def run_in_workers(
    calls: Sequence[Callable[[], Any]], workers: int, *, label: str, sizes: Sequence[int], done: int = 0,
    remedy: str, progress: bool, start_method: Literal["fork", "spawn"] = "fork",
) -> list[Any]:  # fmt: skip
    """Results of picklable calls, begun in order over `workers` processes.

    Args:
        label, sizes, done: of a progress bar; bytes of each call, and bytes done before.
        remedy: what to do where a worker is killed.
        start_method: forked workers don't take seconds to import what the parent has; spawned ones may use libraries
            with threads of their own, which a fork would leave behind.

    Raises what the first failing call raises, or DataError for a killed worker; the other workers are killed then.
    """
    from tqdm import tqdm

    total = done + sum(sizes)
    results = []
    with (
        _pool(min(workers, max(len(calls), 1)), remedy, start_method) as pool,
        tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=label, disable=not progress, file=sys.stderr)
        as bar,
    ):  # fmt: skip
        futures = [pool.submit(call) for call in calls]
        for future, size in zip(futures, sizes, strict=True):
            results.append(future.result())
            bar.update(size)
    return results


@contextmanager
def _pool(workers: int, remedy: str, start_method: str) -> Iterator[ProcessPoolExecutor]:
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context(start_method), _start_worker, (os.getpid(),))
    try:
        yield pool
    except BaseException as error:
        # A tokenizer at work would not notice a shutdown for minutes. (Python 3.14: pool.kill_workers())
        for process in list((pool._processes or {}).values()):
            process.kill()
        if isinstance(error, BrokenProcessPool):
            raise DataError(f"a worker process was killed, perhaps for memory; {remedy}") from None
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too: the parent ends them

    # A killed parent can't stop its workers, so they poll.
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
