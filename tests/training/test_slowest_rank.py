"""The rank that the others wait for is the one that is named."""

import contextlib
import io
import json
import os
import signal
import subprocess
import time

import pytest

from bov_megatron.training.callbacks import slowest_rank
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, overrides

SECONDS, SLOW_STEP = 1.2, 5


def slowed_rank(rank, world_size, arguments, slow, how):
    """The run, in which rank `slow` is held up in one step: its process is stopped for a while in its forward
    pass, or its data come late."""
    from bov_megatron import train as command
    from bov_megatron.data.loader import TrainLoader
    from bov_megatron.model.attention import ValueSourceLayer

    drawn, forward, held_up = TrainLoader.__next__, ValueSourceLayer.forward, []
    step = 0

    def next_batch(self):
        nonlocal step
        step += 1
        if rank == slow and step == SLOW_STEP and how == "data":
            time.sleep(SECONDS)
        return drawn(self)

    def stopping(self, *positional, **named):
        if rank == slow and step == SLOW_STEP and how == "stopped" and not held_up:
            held_up.append(1)
            subprocess.Popen(["sh", "-c", f"sleep {SECONDS}; kill -CONT {os.getpid()}"])
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(self, *positional, **named)

    TrainLoader.__next__, ValueSourceLayer.forward = next_batch, stopping
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue()


LAYOUTS = {
    # ranks, recipe, the rank that is slowed, those that may be named
    "dp2": (2, [], 1, {1}),
    "tp2-dp2": (4, ["parallel.tensor_model_parallel_size=2"], 2, {2, 3}),
    "pp2-dp2": (4, ["parallel.pipeline_model_parallel_size=2", "model.num_layers=4"], 3, {1}),
}
"""Ranks of a replica wait for each other: one of its first pipeline stage is named."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_rank_that_computes_late_is_named(prepared_data, tmp_path, layout):
    world_size, parallel, slow, named = LAYOUTS[layout]
    line = line_of_slow_step(overrides(prepared_data, tmp_path, *parallel), tmp_path, world_size, slow, "stopped")
    assert line["slowest_rank"] in named
    # Not compared with step_seconds: rank 0 may begin its step later than others do theirs.
    assert line["slowest_rank_seconds"] > max(SECONDS, line["fastest_rank_seconds"])


def test_a_rank_whose_data_come_late_is_named(prepared_data, tmp_path):
    """Also among ranks that wait for each other, where there is but one replica."""
    arguments = overrides(prepared_data, tmp_path, "parallel.tensor_model_parallel_size=2")
    line = line_of_slow_step(arguments, tmp_path, 2, 1, "data")
    assert line["data_rank"] == 1 and line["data_seconds"] > SECONDS
    assert "slowest_rank" not in line


def line_of_slow_step(arguments, run_dir, *rank) -> dict:
    world_size, slow, how = rank
    results = run_ranks(slowed_rank, world_size, arguments, slow, how)
    assert [code for code, _ in results] == [0] * world_size, results
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines[SLOW_STEP - 1]


def test_extremes_of_many_ranks():
    seconds = {0: 0.5, 1: 0.25, 2: 0.75, 70_000: 0.75, 999_999: 3600.0}
    own = {rank: slowest_rank.durations(one / 2, one) for rank, one in seconds.items()}
    own[5] = slowest_rank.durations(7200.0, None)
    extremes = [max(numbers) for numbers in zip(*own.values(), strict=True)]
    owners = [slowest_rank.ranks_of(numbers, extremes, rank) for rank, numbers in own.items()]
    told = slowest_rank.fields(extremes, [max(ranks) for ranks in zip(*owners, strict=True)], replicas=5)
    assert (told["slowest_rank"], told["slowest_rank_seconds"], told["fastest_rank_seconds"]) == (999_999, 3600.0, 0.25)
    assert (told["data_rank"], told["data_seconds"]) == (5, 7200.0)
