"""tools/checkpoint.py as a user runs it: no launcher, no process group."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bov_megatron.commands import main
from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.parameters import parameter_specs
from tests.checkpoint.test_integrity import flip_byte, largest
from tests.support.runs import SMOKE, overrides, train

TOOL = Path(__file__).resolve().parents[2] / "tools" / "checkpoint.py"


@pytest.fixture(scope="module")
def run_dir(prepared_data, tmp_path_factory):
    """A run over two tensor-parallel ranks with checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("run")
    layout = ("parallel.tensor_model_parallel_size=2", "train.steps=4", "checkpoint.interval=2")
    train(2, overrides(prepared_data, folder, *layout))
    return folder


@pytest.fixture
def copy(run_dir, tmp_path):
    """One that may be damaged."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


@pytest.fixture
def tool(monkeypatch, capsys):
    """`tool(*arguments)`: exit status, stdout, stderr of the command, in this process."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)

    def call(*arguments):
        status = main(["checkpoint", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_help_suffices():
    done = subprocess.run([sys.executable, TOOL, "--help"], capture_output=True, text=True, check=True)
    for part in ("list", "inspect", "verify", "RUN_DIR", "Exit status"):
        assert part in done.stdout


def test_list(tool, copy):
    folder = copy / "checkpoints"
    shutil.copytree(folder / "step_00000002", folder / "step_00000003.damaged")
    (folder / "step_00000005.abcd.saving").mkdir()
    os.truncate(largest(folder / "step_00000002"), 10)
    status, text, _ = tool("list", copy)
    assert status == 0
    assert [line.split()[0] for line in text.splitlines()] == [
        "step_00000002",
        "step_00000003.damaged",
        "step_00000004",
        "step_00000005.abcd.saving",
    ]
    two, _, four, _ = text.splitlines()
    assert "damaged: __" in two and "found 10 bytes" in two
    assert four.endswith("valid") and "2 ranks: tensor 2 × pipeline 1 × context 1 × data 1" in four
    entries = json.loads(tool("list", copy, "--json")[1])
    assert [entry["step"] for entry in entries] == [2, 3, 4, 5]
    assert [entry["status"] for entry in entries] == ["damaged", "set aside", "valid", "unfinished"]
    assert entries[2]["bytes"] > 100_000 and entries[2]["layout"]["world_size"] == 2
    assert json.loads(tool("list", folder / "step_00000004", "--json")[1]) == [entries[2]]


def test_verify(tool, copy):
    newest = copy / "checkpoints" / "step_00000004"
    status, text, _ = tool("verify", copy)
    assert status == 0 and text.count(": valid\n") == 2
    flip_byte(largest(newest))
    assert tool("list", copy)[1].splitlines()[-1].endswith("valid"), "by size alone"
    status, text, _ = tool("verify", copy)
    assert status == 1
    assert f"{newest}: DAMAGED, 1 files\n  {largest(newest).name}: expected checksum" in text
    assert tool("verify", newest)[0] == 1
    assert tool("verify", newest.with_name("step_00000002"))[0] == 0
    found = json.loads(tool("verify", copy, "--json")[1])
    assert [one["file"] for one in found[str(newest)]] == [largest(newest).name]


def test_inspect(tool, copy):
    recipe = load_recipe(copy / "recipe.yaml")
    found = json.loads(tool("inspect", copy, "--json")[1])
    assert found["step"] == 4 and found["recipe_differences"] == []
    assert recipe.model.vocab_size % 256 == 0, "else stored tables have rows that pad them"
    assert found["groups"]["model"]["elements"] == sum(spec.size for spec in parameter_specs(recipe.model))
    keys = {tensor["key"] for tensor in found["tensors"] if tensor["group"] == "model"}
    assert any("table" in key for key in keys) and len(keys) == found["groups"]["model"]["tensors"]
    assert any(group.startswith("optimizer.") for group in found["groups"])
    text = tool("inspect", copy)[1]
    assert "step 4" in text and "2 ranks: tensor 2" in text and "recipe: the same" in text
    assert all(key in text for key in keys)
    (copy / "recipe.yaml").write_text((copy / "recipe.yaml").read_text().replace("keep_last: 3", "keep_last: 5"))
    found = json.loads(tool("inspect", copy, "--json")[1])
    assert found["recipe_differences"] == [{"field": "checkpoint.keep_last", "stored": 3, "other": 5}]
    assert "optimizer.warmup_steps: 2 -> " in tool("inspect", copy, "--recipe", SMOKE)[1]


def test_nothing_to_look_at(tool, tmp_path):
    for command in ("list", "inspect", "verify"):
        status, text, error = tool(command, tmp_path)
        assert (status, text) == (2, "") and error.startswith(f"error: {tmp_path} holds no ")


def test_inspecting_a_damaged_one(tool, copy):
    (copy / "checkpoints" / "step_00000004" / "common.pt").unlink()
    status, _, error = tool("inspect", copy)
    assert status == 2 and "step_00000004 is damaged or incomplete" in error
    (copy / "checkpoints" / "step_00000002" / ".metadata").write_bytes(b"")
    status, _, error = tool("inspect", copy / "checkpoints" / "step_00000002")
    assert status == 2 and "cannot be read" in error
