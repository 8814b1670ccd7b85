"""A training shard damaged while the run goes on: a clear error, and no step lost once it is restored."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from bov_megatron.checkpoint.report import verify
from bov_megatron.data.loader import TrainLoader
from bov_megatron.recipe import load_recipe
from tests.support.launcher import Launch
from tests.support.results import lines_of, same_as, wait_until
from tests.support.runs import SMOKE, overrides, train

STEPS = [
    "train.steps=40",
    "train.global_batch_size=16",
    "validation.interval=0",
    "checkpoint.interval=4",
    "data.shuffle_block_size=1",  # shard by shard
    "data.prefetch_factor=1",
]
LATER = 34
"""A step for which the shard is needed, with some that need it before."""


@pytest.fixture(scope="module")
def undisturbed(prepared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, overrides(prepared_data, folder, *STEPS))
    return folder


def shard_of_step(arguments: list[str], step: int) -> tuple[Path, int]:
    """The shard that holds the first sample of a step, and the first step that needs it."""
    recipe = load_recipe(SMOKE, arguments)
    sizes = {"global_batch_size": 16, "micro_batch_size": 16, "sequence_length": 256, "vocab_size": 512}
    with TrainLoader(recipe.data, **sizes) as loader:
        (split,) = loader._splits
        ends = np.cumsum(split.shard_sizes)
        shards = [np.searchsorted(ends, loader.order.batch(n)[:, 1], side="right") for n in range(step + 1)]
        wanted = shards[step][0]
        return split._path(int(wanted)), next(n for n in range(step + 1) if wanted in shards[n])


def shard_of_second_rank_alone(arguments: list[str]) -> tuple[Path, int]:
    """A shard, and the step that is the first to need it, in the second half of its batch of 20 only."""
    recipe = load_recipe(SMOKE, arguments)
    sizes = {"global_batch_size": 20, "micro_batch_size": 20, "sequence_length": 256, "vocab_size": 512}
    with TrainLoader(recipe.data, **sizes) as loader:
        (split,) = loader._splits
        ends, seen = np.cumsum(split.shard_sizes), set()
        for step in range(40):
            shards = np.searchsorted(ends, loader.order.batch(step)[:, 1], side="right")
            alone = set(shards[10:]) - set(shards[:10]) - seen
            if alone:
                return split._path(int(alone.pop())), step
            seen |= set(shards)
    raise AssertionError("no such shard")


def truncate(shard: Path) -> None:
    os.truncate(shard, shard.stat().st_size - 100)


def flip(shard: Path) -> None:
    content = bytearray(shard.read_bytes())
    content[-50] ^= 1
    shard.write_bytes(content)


FAULTS = {
    "truncated": (truncate, "bytes, expected"),
    "gone": (Path.unlink, "is missing, expected"),
    "one bit flipped": (flip, "is damaged: its xxh64 differs from the index's"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_shard_is_damaged_while_the_run_goes_on(prepared_data, undisturbed, tmp_path, say, fault):
    """Before the run has come to it."""
    damage, reason = FAULTS[fault]
    shutil.copytree(prepared_data.folder, tmp_path / "data")
    run_dir = tmp_path / "run"
    arguments = overrides(prepared_data, run_dir, *STEPS, f"data.path={tmp_path}/data")
    shard, needed_at = shard_of_step(arguments, LATER)
    with Launch(2, arguments, tmp_path / "first") as launch:
        wait_until(lambda: lines_of(run_dir) >= 5, "five steps", launch.output)
        damage(shard)
        say(f"after step {lines_of(run_dir)}: {shard.name} {fault}; step {needed_at + 1} is the first to need it")
        statuses = launch.wait()
        errors = [line for line in launch.output().splitlines() if line.startswith("error: ")]
        say(f"statuses {statuses}, {lines_of(run_dir)} steps done; {errors[0]}")
    assert 2 in statuses and 0 not in statuses
    assert str(shard) in errors[0] and reason in errors[0] and "copy it again" in errors[0]
    assert lines_of(run_dir) <= needed_at

    verified = verify(run_dir)
    assert verified and not any(verified.values()), verified
    say(f"every byte of {', '.join(path.name for path in verified)} is as it was written")

    shutil.copy(prepared_data.folder / shard.relative_to(tmp_path / "data"), shard)
    with Launch(2, arguments, tmp_path / "second") as launch:
        assert launch.wait() == [0, 0], launch.output()
        say(f"restored; {launch.output().splitlines()[0].rpartition('; ')[2]}")
    say(same_as(undisturbed, run_dir))


def test_the_second_rank_alone_meets_it(prepared_data, tmp_path, say):
    """Rank 0 sees no more than a broken connection; a launcher is told that starting again is no use."""
    shutil.copytree(prepared_data.folder, tmp_path / "data")
    arguments = overrides(
        prepared_data, tmp_path / "run", *STEPS, "train.global_batch_size=20", f"data.path={tmp_path}/data"
    )
    shard, needed_at = shard_of_second_rank_alone(arguments)
    shard.unlink()
    status = tmp_path / "status"
    with Launch(2, arguments, tmp_path / "first", environ={"BOV_STATUS_FILE": str(status)}) as launch:
        statuses = launch.wait()
        error = next(line for line in launch.output().splitlines() if line.startswith("error: "))
        say(f"step {needed_at + 1}: statuses {statuses}, told {status.read_text().strip()}; {error}")
    assert statuses[1] == 2 and statuses[0] not in (0, 2) and status.read_text() == "2\n"
    assert error.startswith("error: rank 1: shard ") and str(shard) in error
