"""Checkpoint folders: whole or absent whenever a run is killed, and refused with a reason where they don't fit."""

import os
import re
import shutil

import pytest

from bov_megatron.errors import RecipeError
from tests.support.distributed import run_ranks
from tests.support.parity import batch, my_micro_batches, small_model, small_recipe


def tiny_recipe(**changes):
    return small_recipe(small_model(num_layers=2, **changes))


def start_engine(rank, world_size, recipe=None):
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe or tiny_recipe()
    process_groups.initialize(recipe, rank, world_size)
    return MegatronEngine(recipe)


def names(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# Where a save is cut short: (function of checkpoint.saving, whether after it instead of before, survivor's step)
CRASHES = {
    "nothing written yet": ("sharded_state", False, 1),
    "written, not flushed": ("_publish", False, 1),
    "half flushed": ("flush", True, 1),
    "renamed, old ones not removed": ("_publish", True, 2),
    "removing old ones": ("shutil.rmtree", False, 2),
}


def crashing_rank(rank, world_size, run_dir, function, after):
    """Dies by SIGKILL while it saves step 2."""
    import signal

    from bov_megatron import checkpoint
    from bov_megatron.checkpoint import saving

    engine = start_engine(rank, world_size)
    checkpoint.save(engine, run_dir, 1, keep_last=1, extra={})
    owner = saving
    for part in function.split(".")[:-1]:
        owner = getattr(owner, part)
    name = function.split(".")[-1]
    original = getattr(owner, name)

    def dying(*args, **kwargs):
        if after:
            original(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)
    checkpoint.save(engine, run_dir, 2, keep_last=1, extra={})


def continuing_rank(rank, world_size, run_dir):
    """What is found after the crash, and what there is after one more save."""
    from bov_megatron import checkpoint
    from bov_megatron.lifecycle import run_folder

    engine = start_engine(rank, world_size)
    found = checkpoint.load(engine, run_folder.latest_checkpoint(run_dir)).step
    checkpoint.save(engine, run_dir, 3, keep_last=1, extra={})
    return found


@pytest.mark.parametrize("crash", CRASHES)
def test_a_crash_while_saving_hides_no_checkpoint(tmp_path, crash):
    function, after, survivor = CRASHES[crash]
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(crashing_rank, 1, tmp_path, function, after)
    assert len(names(tmp_path)) > 1, "the crash left nothing behind: it did not happen where it should"
    assert run_ranks(continuing_rank, 1, tmp_path) == [survivor]
    assert names(tmp_path) == ["step_00000003"]


def keeping_rank(rank, world_size, run_dir, keep_every):
    from bov_megatron import checkpoint
    from bov_megatron.lifecycle import run_folder

    engine = start_engine(rank, world_size)
    listed = []
    for step in (5, 10, 15, 15, 20, 25):
        checkpoint.save(engine, run_dir, step, keep_last=2, extra={}, keep_every=keep_every)
        listed.append([step for step, _ in run_folder.list_checkpoints(run_dir)])
    return listed


@pytest.mark.parametrize("keep_every, kept", [(0, []), (10, [10])])
def test_keep_last_and_the_same_step_again(tmp_path, keep_every, kept):
    for listed in run_ranks(keeping_rank, 2, tmp_path, keep_every):
        assert listed == [[5], [5, 10], [10, 15], [10, 15], [*kept, 15, 20], [*kept, 20, 25]]
    assert names(tmp_path) == [f"step_{step:08d}" for step in (*kept, 20, 25)]


def truncate_tensors(folder):
    file = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(file, file.stat().st_size // 2)


DAMAGES = {
    "tensors truncated": truncate_tensors,
    "tensors missing": lambda folder: max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size).unlink(),
    "index missing": lambda folder: (folder / ".metadata").unlink(),
    "index empty": lambda folder: (folder / ".metadata").write_bytes(b""),
    "format missing": lambda folder: (folder / "metadata.json").unlink(),
    "run missing": lambda folder: (folder / "common.pt").unlink(),
    "run truncated": lambda folder: os.truncate(folder / "common.pt", 100),
    "empty": lambda folder: [path.unlink() for path in folder.iterdir()],
}


def refusing_rank(rank, world_size, run_dir):
    """Error of each kind of damage, of another model, another optimizer, another format."""
    from bov_megatron import checkpoint
    from bov_megatron.checkpoint import writing
    from bov_megatron.errors import CheckpointError

    engine = start_engine(rank, world_size)
    engine.train_step(my_micro_batches(engine.recipe, batch(0)))
    whole = checkpoint.save(engine, run_dir, 1, keep_last=1, extra={})
    errors = {}

    def note(name, error_type, path):
        try:
            checkpoint.load(engine, path)
        except error_type as error:
            errors[name] = str(error)

    for name, damage in DAMAGES.items():
        path = run_dir / name
        shutil.copytree(whole, path)
        damage(path)
        note(name, CheckpointError, path)
    writing.FORMAT_VERSION = 3
    note("another format", CheckpointError, whole)
    writing.FORMAT_VERSION = 2
    recipe = engine.recipe
    for name, changed in {
        "another model": tiny_recipe(rotary_base=5.0),
        "another optimizer": tiny_recipe(),
        "another precision": tiny_recipe(),
    }.items():
        engine.recipe = changed
        changed.optimizer.name = "adamw" if name == "another optimizer" else "muon"
        changed.train.precision = "bf16" if name == "another precision" else "fp32"
        note(name, RecipeError, whole)
    engine.recipe = recipe
    assert checkpoint.load(engine, whole).step == 1, "the errors above are none of the whole checkpoint"
    return errors


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    (errors,) = run_ranks(refusing_rank, 1, tmp_path)
    for damage in DAMAGES:
        assert f"checkpoint {tmp_path / damage} is damaged or incomplete" in errors[damage]
        assert "restore it from a copy, or use the one before" in errors[damage]
        if damage != "empty":
            assert re.search(r"\(\S+: expected \d+ bytes, found (no such file|\d+ bytes)\)", errors[damage])
    assert "format version 2, this code reads 3" in errors["another format"]
    assert errors["another model"].startswith("model.rotary_base=5.0, but the checkpoint")
    assert "saved with 100000.0; use the recipe stored with it" in errors["another model"]
    assert errors["another optimizer"].startswith("optimizer.name='adamw', but the checkpoint")
    assert errors["another precision"].startswith("train.precision='bf16', but the checkpoint")


def data_recipe():
    recipe = tiny_recipe()
    recipe.data.path = "somewhere"
    return recipe


def test_another_data_order_is_refused_on_resume(tmp_path):
    from bov_megatron.checkpoint.compatibility import check_same_data_order

    stored = {"recipe": data_recipe().to_dict(), "extra": {"shards": ["a"]}}
    moved = data_recipe()
    moved.data.path, moved.data.num_workers, moved.train.micro_batch_size = "elsewhere", 0, 2
    check_same_data_order(stored, moved, tmp_path)
    for section, field, value in [
        ("data", "shuffle_seed", 1),
        ("data", "shuffle_block_size", 7),
        ("data", "shuffle", False),
        ("data", "num_canonical_nodes", 2),
        ("train", "global_batch_size", 8),
    ]:
        changed = data_recipe()
        setattr(getattr(changed, section), field, value)
        with pytest.raises(RecipeError, match=f"{section}.{field}={value}, but the checkpoint .* reorder the data"):
            check_same_data_order(stored, changed, tmp_path)
