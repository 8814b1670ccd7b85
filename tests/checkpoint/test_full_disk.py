"""A disk that takes no more: the save fails, on all ranks and loudly, and the run goes on."""

import contextlib
import io
import re
from types import SimpleNamespace

import pytest

from tests.checkpoint.test_checkpoint import names, start_engine
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train
from tests.support.small_disk import fill


def disk_rank(rank, world_size, arguments, filler, freed_after):
    """The run on a disk from which `filler` disappears during a step (None: never)."""
    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine

    done = []

    def forward_backward(self, micro_batches):
        done.append(1)
        if len(done) == freed_after and rank == 0:
            filler.unlink()
        return original(self, micro_batches)

    original, MegatronEngine.forward_backward = MegatronEngine.forward_backward, forward_backward
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue()


def lines(results, start: str) -> list[str]:
    return [line for _, text in results for line in text.splitlines() if line.startswith(start)]


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_full_disk_fails_the_save_and_not_the_run(prepared_data, small_disk, asynchronous):
    run_dir = small_disk / "run"
    fill(small_disk, leave=400_000)
    arguments = overrides(prepared_data, run_dir, f"checkpoint.asynchronous={asynchronous}")
    results = run_ranks(disk_rank, 2, arguments, small_disk / "filler", 6)
    assert [code for code, _ in results] == [0, 0], results
    (warning,) = lines(results, "WARNING: ")
    assert re.search(r"checkpoint of step 3 was NOT saved: rank \d \(\S+\) could not write \S+: No space left", warning)
    assert re.search(r"0\.\d MiB are free in \S+/checkpoints\. Free space there", warning)
    assert "the next save tries again" in warning
    assert names(run_dir) == ["step_00000006", "step_00000008"], "nothing is left of the failed one"
    assert len(metrics(run_dir)) == 8
    assert "resuming after step 8" in train(2, overrides(prepared_data, run_dir, "train.steps=9"))


def test_a_run_whose_last_save_failed_says_so_at_its_end(prepared_data, small_disk):
    run_dir = small_disk / "run"
    train(2, overrides(prepared_data, run_dir, "train.steps=3"))
    fill(small_disk, leave=100_000)
    results = run_ranks(disk_rank, 2, overrides(prepared_data, run_dir), small_disk / "filler", None)
    assert [code for code, _ in results] == [3, 3], results
    assert len(lines(results, "WARNING: ")) == 1, "of step 6; the last one is the error"
    (error,) = lines(results, "error: ")
    assert "checkpoint of step 8 was NOT saved: rank" in error and "No space left on device" in error
    assert f"the newest checkpoint is {run_dir / 'checkpoints' / 'step_00000003'}" in error
    assert names(run_dir) == ["step_00000003"]
    (small_disk / "filler").unlink()
    assert "resuming after step 3" in train(2, overrides(prepared_data, run_dir))


def test_metrics_wait_for_space(small_disk, monkeypatch, capsys):
    from bov_megatron.training.callbacks import metrics_file

    monkeypatch.setattr(metrics_file.dist, "get_rank", lambda: 0)

    class Trainer:
        step, owed, health = 4, (), SimpleNamespace(rollbacks=[])

        def is_due(self, interval):
            return True

    file = metrics_file.MetricsFile(small_disk, 1)
    file.start(Trainer())
    record = {"step": 0, "text": "x" * 3000}
    file.after_step(Trainer(), record)
    fill(small_disk, leave=0)
    for step in range(1, 5):
        file.after_step(Trainer(), {**record, "step": step})
    assert 0 < len(metrics_file.read_lines(file.path)) < 4
    assert capsys.readouterr().err.count("No space left on device; lines are kept") == 1
    (small_disk / "filler").unlink()
    file.finish(Trainer())
    assert [line["step"] for line in metrics(small_disk)] == [0, 1, 2, 3, 4]


def limited_rank(rank, world_size, run_dir):
    """Errors of a save while the second rank alone can write no large file, and of one after it can again."""
    import resource

    import torch.distributed as dist

    from bov_megatron import checkpoint

    engine = start_engine(rank, world_size)
    checkpoint.save(engine, run_dir, 1, keep_last=1, extra={})
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    with pytest.raises(checkpoint.SaveError) as error:
        checkpoint.save(engine, run_dir, 2, keep_last=1, extra={})
    left = names(run_dir)
    dist.barrier()  # rank 0 begins the next save without waiting
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    checkpoint.save(engine, run_dir, 3, keep_last=1, extra={})
    return str(error.value), left


def test_one_rank_s_failure_is_everybody_s(tmp_path):
    for error, left in run_ranks(limited_rank, 2, tmp_path):
        assert re.match(r"rank 1 \(\S+\) could not write \S+/__1_\d\.distcp: File too large; ", error)
        assert left == ["step_00000001"]
    assert names(tmp_path) == ["step_00000003"]


def unwritable_rank(rank, world_size, run_dir, file):
    """The error where rank 0 cannot write one of the files that it alone writes, as a folder is in its place."""
    import torch.distributed as dist

    from bov_megatron import checkpoint
    from bov_megatron.checkpoint.planning import Planner

    engine = start_engine(rank, world_size)
    plan = Planner.plan

    def blocking(planner, state, folder, *args):
        if rank == 0:
            (folder / file).mkdir()
        return plan(planner, state, folder, *args)

    Planner.plan = blocking
    with pytest.raises(checkpoint.SaveError) as error:
        checkpoint.save(engine, run_dir, 1, keep_last=1, extra={})
    Planner.plan = plan
    left = names(run_dir)
    dist.barrier()
    checkpoint.save(engine, run_dir, 2, keep_last=1, extra={})
    return str(error.value), left


@pytest.mark.parametrize("file", ["common.pt", ".metadata", "metadata.json", "manifest.json"])
def test_files_of_rank_0_alone(tmp_path, file):
    for error, left in run_ranks(unwritable_rank, 2, tmp_path, file):
        assert re.match(r"rank 0 \(\S+\) could not write ", error) and "directory" in error
        assert left == []
