"""`bov simulate` from the command line: numbers, JSON, worlds of thousands of ranks, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bov_megatron.commands import main
from bov_megatron.simulation.step import KINDS

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["recipes/135m_bov.yaml", "model.num_layers=4", "train.micro_batch_size=1"]


@pytest.fixture
def simulated(tmp_path):
    """`bov simulate` with these arguments, in a process of its own."""

    def run(*arguments):
        target = tmp_path / "step.json"
        command = [sys.executable, "tools/simulate.py", *arguments, "--json", str(target)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert "Traceback" not in done.stderr
        return done, json.loads(target.read_text()) if done.returncode == 0 else None

    return run


def test_a_rank_of_thousands(simulated):
    layout = ["parallel.tensor_model_parallel_size=2", "train.global_batch_size=4096", "train.compile=false"]
    done, step = simulated(*SMALL, *layout, "--world-size", "4096", "--rank", "4095")
    assert done.returncode == 0 and done.stderr == ""
    peak = step["peak_memory_bytes"]
    assert peak["total"] == sum(peak[kind] for kind in KINDS) > 0
    assert all(peak[kind] > 0 for kind in ("weights", "gradients", "optimizer", "activations", "loss"))
    assert step["place"] == {"tensor": 1, "context": 0, "pipeline": 0, "data": 2047}
    groups = {(entry["kind"], entry["group"]): entry for entry in step["collectives"]}
    assert groups["all_to_all", "tensor"]["group_size"] == 2 and groups["all_to_all", "tensor"]["within_node"]
    reduced = groups["reduce_scatter", "data"]
    assert reduced["group_size"] == 2048 and not reduced["within_node"]
    assert reduced["bytes"] == pytest.approx(peak["gradients"] * 2047 / 2048, rel=1e-3)
    assert step["launches"] > 100 and step["host_waits"] == 1
    assert step["step_seconds"] == pytest.approx(sum(step["roofline"].values())) and step["bottleneck"] == "links"
    for expected in ("rank 4095 of 4,096", "Peak memory", "all-to-all", "bottleneck: links", "fake CPU tensors"):
        assert expected in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 100


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([*SMALL, "--world-size", "3", "parallel.tensor_model_parallel_size=2"], "world size 3 is not a multiple of 2"),
        ([*SMALL, "--world-size", "4", "--rank", "4"], "rank 4 is not in a world of 4: ranks are 0 to 3"),
        ([*SMALL, "--world-size", "5"], "train.global_batch_size=256 is not a multiple of"),
        (
            [*SMALL, "--world-size", "2", "engine=deepspeed", "optimizer.name=adamw"],
            "engine=deepspeed: only Megatron's",
        ),
        (
            [*SMALL, "--world-size", "2", "model.value.table_memory=host", "parallel.use_distributed_optimizer=false"],
            "model.value.table_memory=host: tables that every data-parallel rank updates whole",
        ),
        ([*SMALL, "--world-size", "2", "model.hiden_size=8"], "did you mean 'model.hidden_size'"),
    ],
    ids=str,
)
def test_what_cannot_be_simulated_is_refused(arguments, complaint, capsys):
    assert main(["simulate", *arguments]) == 2
    assert complaint in capsys.readouterr().err
