"""Real process groups in tests: ranks forked from one warm server process that has Megatron-core imported."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_MODULES = ["tests.support.warm"]


def run_ranks(function: Callable, world_size: int, *args: Any, timeout: float = 600) -> list[Any]:
    """Call `function(rank, world_size, *args)` in `world_size` processes and return their results by rank.

    `function` must be importable (module level), arguments and results picklable. RANK, WORLD_SIZE,
    LOCAL_RANK, MASTER_ADDR and MASTER_PORT are set, so `process_groups.initialize` works with its defaults.
    A rank that raises fails the caller with that rank's traceback; a hang fails after `timeout` seconds.
    """
    context = warm_context()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        port = free_port()
        ranks = [
            context.Process(target=_rank_main, args=(function, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        try:
            _wait(ranks, Path(folder), timeout)
            return [pickle.loads((Path(folder) / f"{rank}.result").read_bytes()) for rank in range(world_size)]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def warm_context() -> multiprocessing.context.ForkServerContext:
    """What starts processes as forks of the warm server."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(WARM_MODULES)
    return context


def _wait(ranks, folder: Path, timeout: float) -> None:
    import time

    deadline = time.monotonic() + timeout
    while any(process.is_alive() for process in ranks):
        failed = sorted(folder.glob("*.error"))
        if failed:
            break
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
        if time.monotonic() > deadline:
            alive = [rank for rank, process in enumerate(ranks) if process.is_alive()]
            raise TimeoutError(f"ranks {alive} still running after {timeout} s")
        time.sleep(0.01)
    failed = [f"rank {error.stem} failed:\n{error.read_text()}" for error in sorted(folder.glob("*.error"))]
    if failed:  # one that was killed may be what the others complain of
        for process in ranks:
            process.join(0.1)
    codes = [process.exitcode for process in ranks]
    if failed or any(codes):
        raise AssertionError("\n".join([*failed, f"ranks ended with exit codes {codes}"]))


def _rank_main(function, rank: int, world_size: int, port: int, folder: str, args: tuple) -> None:
    import torch

    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    try:
        result = function(rank, world_size, *args)
        target = Path(folder) / f"{rank}.result"
        target.with_suffix(".part").write_bytes(pickle.dumps(result))
        target.with_suffix(".part").rename(target)
    except BaseException:
        error = Path(folder) / f"{rank}.error"
        error.with_suffix(".part-error").write_text(traceback.format_exc())
        error.with_suffix(".part-error").rename(error)
        os._exit(1)
    finally:
        import torch.distributed as dist

        if dist.is_initialized():
            dist.destroy_process_group()


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun would set for a rank of a single node. Where there are fewer GPUs than ranks, none is seen."""
    import torch

    return {
        **({"CUDA_VISIBLE_DEVICES": ""} if torch.cuda.device_count() < world_size else {}),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def pytest_worker() -> int:
    """Number of this one of pytest's workers."""
    return int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))


def free_port() -> int:
    """Below Linux's ephemeral ports, where another program's connection may take it before the ranks meet; each of
    pytest's workers has ports of its own."""
    first, count = 10_000 + 1000 * (pytest_worker() % 10), 1000
    while True:
        port = first + random.SystemRandom().randrange(count)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
