"""The rank that the others wait for is the one that is named."""

import contextlib
import io
import json
import math
import os
import signal
import subprocess
import time

import pytest
import torch
import torch.distributed as dist

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
    arguments = overrides(prepared_data, tmp_path, *parallel)
    line = lines_from_slow_step(arguments, tmp_path, world_size, slow, "stopped")[1]
    assert line["slowest_rank"] in named
    # Not compared with step_seconds: rank 0 may begin its step later than others do theirs.
    assert line["slowest_rank_seconds"] > max(SECONDS, line["fastest_rank_seconds"])


def test_a_rank_whose_data_come_late_is_named(prepared_data, tmp_path):
    """Also among ranks that wait for each other, where there is but one replica."""
    arguments = overrides(prepared_data, tmp_path, "parallel.tensor_model_parallel_size=2")
    line = lines_from_slow_step(arguments, tmp_path, 2, 1, "data")[0]
    assert line["data_rank"] == 1 and line["data_seconds"] > SECONDS
    assert "slowest_rank" not in line


def lines_from_slow_step(arguments, run_dir, *rank) -> list[dict]:
    world_size, slow, how = rank
    results = run_ranks(slowed_rank, world_size, arguments, slow, how)
    assert [code for code, _ in results] == [0] * world_size, results
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return lines[SLOW_STEP - 1 :]


def agreeing_rank(rank, world_size):
    from bov_megatron.parallel.agreement import agree_on_highest
    from bov_megatron.training.trainer import durations

    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    own = {0: durations(0.5, 2.0), 1: durations(0.25, 3.0), 2: durations(7200.0, None)}[rank]
    numbers = torch.tensor([rank, math.nan if rank == 1 else 1.0, math.inf if rank == 2 else 0.0]).double()
    return agree_on_highest(numbers, own), agree_on_highest(numbers[:1])


def test_ranks_agree_on_extremes_and_whose_they_are():
    """The last rank is of a later pipeline stage, and has no time of gradients."""
    for (numbers, *extremes), without_durations in run_ranks(agreeing_rank, 3):
        assert numbers[0] == 2 and math.isnan(numbers[1]) and math.isnan(numbers[2])
        told = slowest_rank.fields(*extremes, replicas=2)
        assert told == {
            **{"data_rank": 2, "data_seconds": 7200.0},
            **{"slowest_rank": 1, "slowest_rank_seconds": 3.0, "fastest_rank_seconds": 2.0},
        }
        assert without_durations == ([2.0], [], [])
    assert slowest_rank.fields([1.0, -math.inf, -math.inf], [0, 5, 5], 8) == {"data_rank": 0, "data_seconds": 1.0}
