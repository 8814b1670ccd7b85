"""`--check`: what would stop a run is found before the ranks start, all at once, and nothing is changed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bov_megatron.lifecycle.lease import Lease
from bov_megatron.plan import plan
from bov_megatron.preflight import format_preflight, preflight
from bov_megatron.recipe import load_recipe
from tests.support.runs import SMOKE, overrides, train

ROOT = Path(__file__).resolve().parents[1]


def check(arguments: list[str], world_size: int = 1):
    recipe = load_recipe(SMOKE, arguments)
    done = preflight(recipe, plan(recipe, world_size))
    return done, format_preflight(done)


def changed(arguments: list[str], *changes: str) -> list[str]:
    return [f"{key}={value}" for key, value in dict(item.split("=", 1) for item in (*arguments, *changes)).items()]


def contents(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime for path in folder.rglob("*")}


@pytest.fixture(scope="module")
def run(prepared_data, tmp_path_factory):
    """`(arguments, folder)` of a run that has done 4 of its 8 steps."""
    folder = tmp_path_factory.mktemp("check")
    train(1, overrides(prepared_data, folder / "run", "train.steps=4", "validation.interval=0"))
    return overrides(prepared_data, folder / "run"), folder / "run"


def test_a_run_that_can_start(prepared_data, tmp_path):
    done, text = check(overrides(prepared_data, tmp_path / "run", "model.vocab_size=640"), 2)
    assert done.exit_status == 0 and text.splitlines()[-1] == "ready to train", text
    for part in (
        "none in",
        "from the beginning",
        "the run reads 0.",
        "128 rows stay untrained",
        "free in",
        "8 steps of",
    ):
        assert part in text, text
    assert "an assumption, nothing is measured yet" in text
    assert not (tmp_path / "run").exists() and list(tmp_path.iterdir()) == []


def test_a_run_to_be_resumed_says_where_and_what_is_left(run):
    arguments, folder = run
    before = contents(folder)
    done, text = check(arguments)
    assert done.exit_status == 0 and (done.step, done.steps_left) == (4, 4)
    assert "step_00000004: resumes after step 4 of 8, 4 to go" in text
    assert "at the run's last steps" in text and "4 steps of 1,024 tokens" in text
    assert contents(folder) == before
    text = check(changed(arguments, "optimizer.matrix_lr=0.01"))[1]
    assert "fields differ from its recipe" in text and "optimizer.matrix_lr  0.02" in text, text
    finished, text = check(changed(arguments, "train.steps=4"))
    assert finished.exit_status == 0 and "all steps are done" in text
    assert text.endswith("ready, but nothing is left to train")


def test_all_errors_are_found_at_once(run, tmp_path):
    arguments, folder = run
    done, text = check(changed(arguments, f"data.path={tmp_path}/nowhere", "data.shuffle_seed=1"))
    assert done.exit_status == 2 and "2 errors: training would end with status 2" in text
    assert "data.shuffle_seed=1" in text and "nowhere does not exist" in text


def test_damage_is_found(run, prepared_data, tmp_path):
    arguments, folder = run
    data = shutil.copytree(prepared_data.folder, tmp_path / "data")
    copy = shutil.copytree(folder, tmp_path / "run")
    moved = changed(arguments, f"data.path={data}", f"output_dir={copy}")
    assert check(moved)[0].exit_status == 0
    (copy / "checkpoints/step_00000004/__0_0.distcp").write_bytes(b"x")
    done, text = check(moved)
    assert "step_00000004 is damaged: __0_0.distcp: expected" in text and "resumes after step 3 of 8" in text
    shard = next((data / "train").rglob("*.mds"))
    shard.write_bytes(shard.read_bytes()[:-1])
    done, text = check(moved)
    assert done.exit_status == 2 and f"shards are missing or have another size, the first is {shard}" in text
    shutil.copy(prepared_data.folder / shard.relative_to(data), shard)
    tokenizer = data / "tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"min_frequency"', '"x"').replace("<|bos|>", "<|BOS|>"))
    done, text = check(moved)
    assert done.exit_status == 2 and "tokenizer" in text


def test_a_folder_in_use_and_one_that_cannot_be_written(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path / "run")
    with Lease(tmp_path / "run"):
        done, text = check(arguments)
        assert done.exit_status == 2 and "is in use" in text
    (tmp_path / "file").write_text("")
    done, text = check(overrides(prepared_data, tmp_path / "file/run"))
    assert done.exit_status == 2 and "cannot be written" in text


def test_a_disk_without_room(prepared_data, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda where: shutil._ntuple_diskusage(10, 9, 1))
    done, text = check(overrides(prepared_data, tmp_path / "run"))
    assert done.exit_status == 2 and "not even one fits" in text and "output_dir=" in text


def test_prompts_are_checked(prepared_data, tmp_path):
    done, text = check(overrides(prepared_data, tmp_path / "run", f"validation.prompts=[{'word ' * 300}]"))
    assert done.exit_status == 2 and "validation.prompts[0] has" in text


def test_the_command(prepared_data, tmp_path):
    environ = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    arguments = overrides(prepared_data, tmp_path / "run", "parallel.tensor_model_parallel_size=2")

    def call(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "bov_megatron.train", SMOKE, "--check", *arguments, *more]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environ)

    done = call("--world-size", "4", "--nodes", "2")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("Plan of smoke") and done.stdout.endswith("ready to train\n")
    alone = call()
    assert alone.returncode == 2 and "world size 1 is not a multiple of 2" in alone.stderr
    assert alone.stderr.count("\n") == 1
