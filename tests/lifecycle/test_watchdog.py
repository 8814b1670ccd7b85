"""One rank sleeps forever in a step, the other waits for it in a collective: both end, and both say where they were."""

import os
import time

from bov_megatron import errors
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train


def hanging_rank(rank, world_size, arguments, folder):
    """Exit status and stderr of the run in a process of its own, whose second rank falls asleep in step 3."""
    stderr = os.path.join(folder, f"stderr_{rank}")
    child = os.fork()
    if child == 0:
        _hang(rank, arguments, stderr)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with open(stderr) as file:
        return status, file.read()


def _hang(rank, arguments, stderr):
    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.lifecycle import watchdog

    watchdog.GRACE_SECONDS = 2.0
    steps = []

    def forward_backward(self, micro_batches):
        steps.append(1)
        if len(steps) == 3 and rank == 1:
            falls_asleep()
        return original(self, micro_batches)

    original, MegatronEngine.forward_backward = MegatronEngine.forward_backward, forward_backward
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT), 2)
    os._exit(command.main([SMOKE, *arguments]))


def falls_asleep():
    time.sleep(3600)


def test_a_hang_ends_all_ranks_with_their_stacks(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path / "run", "checkpoint.interval=2", "health.hang_minutes=0.2")
    results = run_ranks(hanging_rank, 2, arguments, str(tmp_path))
    assert [status for status, _ in results] == [errors.HANG] * 2, results
    for rank, (_, stderr) in enumerate(results):
        stacks = (tmp_path / "run" / "stacks" / f"rank_{rank:05}.txt").read_text()
        assert f"rank {rank} has not finished a step for 0.2 minutes (health.hang_minutes)" in stderr
        for text in (stderr, stacks):
            assert ("in falls_asleep" in text) == (rank == 1), text
            assert "in forward_backward" in text and "in train_step" in text, text
    assert "resuming after step 2" in train(2, arguments)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(1, 9))
