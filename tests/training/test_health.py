"""Gradients that are not finite: steps are skipped, a run of nothing else is ended, and its checkpoints stay good."""

import contextlib
import io

import pytest

from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train


def poisoned_rank(rank, world_size, arguments, poisoned_steps):
    """The run, with a nan in one gradient of the second rank at the given steps."""
    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine

    done = []

    def forward_backward(self, micro_batches):
        loss = original(self, micro_batches)
        done.append(1)
        if len(done) in poisoned_steps:
            if rank == world_size - 1:
                next(iter(self.model.parameters())).main_grad[0, 0] = float("nan")
            return loss * float("nan")
        return loss

    original, MegatronEngine.forward_backward = MegatronEngine.forward_backward, forward_backward
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue()


def test_a_step_is_skipped_by_all_ranks(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path, "parallel.tensor_model_parallel_size=2")
    assert [code for code, _ in run_ranks(poisoned_rank, 2, arguments, (4,))] == [0, 0]
    lines = metrics(tmp_path)
    assert [line["updated"] for line in lines] == [True, True, True, False, True, True, True, True]
    assert (lines[3]["loss"], lines[3]["gradient_norm"]) == (None, None), "JSON knows no nan"
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_a_run_without_updates_ends(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path, "train.steps=30", "validation.interval=0")
    results = run_ranks(poisoned_rank, 2, arguments, tuple(range(5, 99)))
    assert [code for code, _ in results] == [3, 3]
    errors = [line for _, text in results for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "not finite at 10 steps in a row, up to step 14" in errors[0]
    assert "optimizer.matrix_lr" in errors[0] and "optimizer.clip_grad=1.0" in errors[0]
    assert "resuming after step 12" in train(2, arguments), "weights of skipped steps are those before"
    assert metrics(tmp_path)[-1]["loss"] == pytest.approx(5, abs=1.2)
