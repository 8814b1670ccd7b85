"""Runs that can be killed: real ranks, forked warm (distributed.py), watched and ended as torchrun does it.

Each rank keeps a line on a board in shared memory, which says what it is doing and how often it has begun to: the
moment of a fault can be chosen by it, and said in the transcript.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from tests.support.distributed import free_port, rank_environment, warm_context
from tests.support.runs import SMOKE

PHASES = ("start-up", "step", "validation", "save")
WRITING_SECONDS = 0.05
"""By which writing a tiny checkpoint is slowed, to have a share of the run's time like that of a large one."""


class Launch:
    """`python -m bov_megatron.train` in `world_size` ranks, from now on. Leaving the context kills what is left.

    Args:
        arguments: overrides of recipes/smoke.yaml.
        folder: for what the ranks print, `rank<n>.log`.
        prepare: `prepare(rank, *prepare_arguments)` is called in each rank first; importable.
    """

    def __init__(
        self,
        world_size: int,
        arguments: list[str],
        folder: Path,
        prepare: Callable | None = None,
        prepare_arguments: tuple = (),
        environ: dict[str, str] | None = None,
    ):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.started = folder, time.monotonic()
        board = folder / "board"
        self.board = np.memmap(board, np.int64, "w+", shape=(world_size, 1 + len(PHASES)))
        self.board[:, 1] = 1
        context, port = warm_context(), free_port()
        self.ranks = [
            context.Process(
                target=_rank,
                args=(rank, world_size, port, arguments, folder, prepare, prepare_arguments, environ or {}),
            )
            for rank in range(world_size)
        ]
        for rank in self.ranks:
            rank.start()

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *exception: object) -> None:
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.join()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def phase(self, rank: int) -> str:
        return PHASES[self.board[rank, 0]]

    def wait_for(self, phase: str, rank: int = 0, times: int = 1, timeout: float = 600) -> None:
        """Until this rank is in `phase`, having begun it `times` times. Fails where the run ends before."""
        column, deadline = PHASES.index(phase), time.monotonic() + timeout
        while not (self.board[rank, 0] == column and self.board[rank, 1 + column] >= times):
            assert all(process.is_alive() for process in self.ranks), f"ended before its {phase}:\n{self.output()}"
            assert time.monotonic() < deadline, f"no {phase} in {timeout} s:\n{self.output()}"
            time.sleep(0.0005)

    def kill(self, rank: int) -> None:
        os.kill(self.ranks[rank].pid, signal.SIGKILL)

    def wait(self, timeout: float = 300) -> list[int]:
        """Exit statuses of all ranks, once they have ended. When one ends badly, the others are told to, and killed
        if they have not within some seconds: torchrun's way, with less patience."""
        deadline = time.monotonic() + timeout
        while any(rank.is_alive() for rank in self.ranks):
            if any(rank.exitcode for rank in self.ranks):
                self._end_all()
                break
            assert time.monotonic() < deadline, f"still running after {timeout} s:\n{self.output()}"
            time.sleep(0.005)
        return [rank.exitcode for rank in self.ranks]

    def _end_all(self) -> None:
        time.sleep(0.2)  # one that has an error of its own to say
        for rank in self.ranks:
            if rank.is_alive():
                rank.terminate()
        for rank in self.ranks:
            rank.join(5)
            rank.kill()
            rank.join()

    def output(self) -> str:
        """What the ranks have printed, by rank."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("rank*.log")))


def _rank(rank, world_size, port, arguments, folder, prepare, prepare_arguments, environ) -> None:
    log = os.open(folder / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environ | rank_environment(rank, world_size, port))
    import torch

    from bov_megatron import train

    torch.set_num_threads(1)
    _keep_board(rank, folder / "board", world_size)
    if prepare:
        prepare(rank, *prepare_arguments)
    status = train.main([SMOKE, *arguments])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _keep_board(rank: int, file: Path, world_size: int) -> None:
    from bov_megatron import checkpoint
    from bov_megatron.training.trainer import Trainer
    from tests.checkpoint.test_async import slow_writes

    line = np.memmap(file, np.int64, "r+", shape=(world_size, 1 + len(PHASES)))[rank]

    def note(owner, name: str, phase: str) -> None:
        function, column = getattr(owner, name), PHASES.index(phase)

        @functools.wraps(function)
        def noting(*positional, **named):
            before = line[0]
            line[1 + column] += 1
            line[0] = column
            try:
                return function(*positional, **named)
            finally:
                line[0] = before if before else PHASES.index("step")

        setattr(owner, name, noting)

    slow_writes(WRITING_SECONDS)
    note(Trainer, "train_step", "step")
    note(Trainer, "validate", "validation")
    note(checkpoint, "begin_save", "save")
