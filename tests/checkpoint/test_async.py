"""Checkpoints written while training goes on: the same bytes as without, whole or absent whatever is killed."""

import contextlib
import io
import os
import re
import signal
import time

import psutil
import pytest

from bov_megatron.checkpoint.manifest import read_manifest
from bov_megatron.recipe import recipe_from_dict
from tests.checkpoint.test_checkpoint import names, start_engine
from tests.support.distributed import run_ranks
from tests.support.parity import batch, my_micro_batches, small_model, small_recipe
from tests.support.runs import SMOKE, metrics, overrides, train

ASYNCHRONOUS = "checkpoint.asynchronous=true"


def slow_writes(seconds: float) -> None:
    """Every process forked from now on writes late: training is far ahead by then."""
    from bov_megatron.checkpoint import background

    write = background.write_share

    def late(share):
        time.sleep(seconds)
        return write(share)

    background.write_share = late


def both_ways_rank(rank, world_size, recipe_dict, folder):
    """The same steps saved both ways, training between the copy and the writing of the asynchronous ones."""
    from bov_megatron import checkpoint

    recipe = recipe_from_dict(recipe_dict)
    engine = start_engine(rank, world_size, recipe)
    slow_writes(0.3)
    for step in (1, 2):
        engine.train_step(my_micro_batches(recipe, batch(step)))
        checkpoint.save(engine, folder / "waiting", step, keep_last=9, extra={})
        pending = checkpoint.begin_save(engine, folder / "beside", step, keep_last=9, extra={})
        assert not pending.is_written()
        engine.train_step(my_micro_batches(recipe, batch(step + 10)))
        assert names(folder / "beside")[-1].endswith(".saving")
        while not pending.is_written():
            time.sleep(0.01)
        pending.finish()


@pytest.mark.parametrize(
    "layout, precision", [({}, "fp32"), ({"tensor_model_parallel_size": 2}, "bf16")], ids=["dp2-fp32", "tp2-bf16"]
)
def test_the_same_bytes_as_a_save_that_waits(tmp_path, layout, precision):
    """Twice in a run, with training between copy and writing."""
    recipe = small_recipe(small_model(num_layers=2), precision=precision, **layout)
    run_ranks(both_ways_rank, 2, recipe.to_dict(), tmp_path)
    tensors = {}
    for step in (1, 2):
        name = f"checkpoints/step_{step:08d}"
        waiting, beside = (read_manifest(tmp_path / way / name).files for way in ("waiting", "beside"))
        tensors[step] = {file: entry for file, entry in beside.items() if file.endswith(".distcp")}
        assert len(tensors[step]) == 4
        assert {file: entry for file, entry in waiting.items() if file.endswith(".distcp")} == tensors[step]
        assert waiting["common.pt"] == beside["common.pt"]
    assert all(tensors[1][file] != tensors[2][file] for file in tensors[1]), "the second holds the second's weights"


def test_a_run_saves_the_same(prepared_data, tmp_path):
    """As one that waits: every checkpoint of it, and where it goes on from."""
    every = ("checkpoint.interval=1", "checkpoint.keep_last=9", "parallel.tensor_model_parallel_size=2")
    train(2, overrides(prepared_data, tmp_path / "waiting", *every))
    train(2, overrides(prepared_data, tmp_path / "beside", *every, ASYNCHRONOUS))
    assert names(tmp_path / "beside") == names(tmp_path / "waiting") == [f"step_{n:08d}" for n in range(1, 9)]
    for name in names(tmp_path / "waiting"):
        one, two = (read_manifest(tmp_path / way / "checkpoints" / name).files for way in ("waiting", "beside"))
        assert {f: e for f, e in one.items() if ".distcp" in f} == {f: e for f, e in two.items() if ".distcp" in f}
    assert metrics(tmp_path / "waiting") == metrics(tmp_path / "beside")
    further = overrides(prepared_data, tmp_path / "beside", *every, ASYNCHRONOUS, "train.steps=9")
    assert "resuming after step 8" in train(2, further)


def killed_rank(rank, world_size, folder):
    """Dies while its second checkpoint is being written."""
    from bov_megatron import checkpoint

    engine = start_engine(rank, world_size)
    checkpoint.save(engine, folder, 1, keep_last=1, extra={})
    slow_writes(60)
    pending = checkpoint.begin_save(engine, folder, 2, keep_last=1, extra={})
    (folder / f"writer {rank}").write_text(str(pending._writer.pid))
    assert not pending.is_written()
    os.kill(os.getpid(), signal.SIGKILL)


def test_kill_while_writing(tmp_path):
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(killed_rank, 2, tmp_path)
    assert [name[:13] for name in names(tmp_path)] == ["step_00000001", "step_00000002"]
    assert names(tmp_path)[1].endswith(".saving")
    for file in tmp_path.glob("writer *"):
        gone = [psutil.Process(int(file.read_text()))] if psutil.pid_exists(int(file.read_text())) else []
        psutil.wait_procs(gone, timeout=10)
        assert not psutil.pid_exists(int(file.read_text())), "the writer outlived its rank"
    assert run_ranks(continuing_rank, 1, tmp_path) == [1]
    assert names(tmp_path) == ["step_00000003"]


def continuing_rank(rank, world_size, folder):
    from bov_megatron import checkpoint

    engine = start_engine(rank, world_size)
    found = checkpoint.load(engine, checkpoint.newest_valid(folder)).step
    checkpoint.begin_save(engine, folder, 3, keep_last=1, extra={}).finish()
    return found


def losing_writers_rank(rank, world_size, arguments):
    """The run, one of whose second rank's writers is killed."""
    from bov_megatron import train as command
    from bov_megatron.checkpoint import background, saving

    writers = []

    class Killed(background.BackgroundWriter):
        def __init__(self, share):
            super().__init__(share)
            writers.append(self.pid)
            if rank == 1 and len(writers) == 1:
                os.kill(self.pid, signal.SIGTERM)  # which is not for it
                os.kill(self.pid, signal.SIGKILL)

    slow_writes(0.2)
    saving.BackgroundWriter = Killed
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue()


def test_a_writer_that_dies_fails_its_save_alone(prepared_data, tmp_path):
    results = run_ranks(losing_writers_rank, 2, overrides(prepared_data, tmp_path, ASYNCHRONOUS))
    assert [code for code, _ in results] == [0, 0], results
    warnings = [line for _, text in results for line in text.splitlines() if line.startswith("WARNING: ")]
    assert len(warnings) == 1
    assert re.search(
        r"checkpoint of step 3 was NOT saved: rank 1 \(\S+\): its writing process was killed by signal 9", warnings[0]
    )
    assert names(tmp_path) == ["step_00000006", "step_00000008"]


def pruning_rank(rank, world_size, folder):
    from bov_megatron import checkpoint
    from bov_megatron.lifecycle import run_folder

    engine = start_engine(rank, world_size)
    for step in range(1, 5):
        checkpoint.begin_save(engine, folder, step, keep_last=1, extra={}, keep_every=2).finish()
        assert run_folder.list_checkpoints(folder)[-1][0] == step
    return [step for step, _ in run_folder.list_checkpoints(folder)]


def test_old_ones_are_removed(tmp_path):
    assert run_ranks(pruning_rank, 1, tmp_path) == [[2, 4]]
    assert names(tmp_path) == ["step_00000002", "step_00000004"], "nor their files, once the run has ended"
