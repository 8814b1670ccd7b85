"""A study on the two-node cluster: small cells share a node, large ones have theirs; killed ones are completed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from bov_megatron.studies.results import read_results
from bov_megatron.studies.study import load_study
from tests.slurm.conftest import REPOSITORY, read_metrics
from tests.support.study_runs import starts

FLAGS = ("--ntasks-per-node", "2", "--gpus-per-node", "0", "--cpus-per-task", "1", "--sbatch=--time=00:10:00")
STEPS, LONG = 100, 420
SMALL, LARGE = "d2-1.024e5tokens-s0", "d3-1.024e5tokens-s0"


@pytest.fixture
def study(slurm_data, tmp_path):
    """Four cells: two of one rank, two of two."""
    values = {
        "base": str(REPOSITORY / "recipes" / "smoke.yaml"),
        "output_dir": str(tmp_path / "study"),
        "overrides": {
            **{"parallel.tensor_model_parallel_size": 1, "train.global_batch_size": 4, "train.micro_batch_size": 2},
            **{"validation.interval": 0, "validation.tokens": 8192, "checkpoint.interval": 10, "data.num_workers": 0},
            **{"data.path": str(slurm_data), "logging.wandb": "disabled", "train.precision": "fp32"},
        },
        "variants": {"baseline": {"model.value.source": "projection"}, "bank": {"model.value.source": "bank"}},
        "sizes": {
            "d2": {"depth": 2, "aspect_ratio": 16, "head_dim": 16},
            "d3": {"depth": 3, "aspect_ratio": 16, "head_dim": 16, "world_size": 2},
        },
        "budgets": {"tokens": [STEPS * 1024]},
        "seeds": [0],
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def command(cluster, study, tmp_path):
    """`command(NAME, arguments…)`: what `study.py NAME` prints, and what it writes with --json."""
    environ = cluster.environ | {"TMPDIR": str(tmp_path)}

    def run(name: str, *arguments: str) -> tuple[str, dict]:
        out = tmp_path / "out.json"
        words = [sys.executable, "tools/study.py", name, str(study), *arguments, "--json", str(out)]
        done = subprocess.run(words, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, json.loads(out.read_text())

    return run


def states(command) -> dict[str, str]:
    return {cell["cell"]: cell["state"] for cell in command("status")[1]["cells"]}


def wait(command, logs: Path, what, text: str) -> None:
    deadline = time.monotonic() + LONG
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(f"{text}: {states(command)}\n" + "".join(p.read_text() for p in logs.glob("*")))
        time.sleep(0.5)


def settled(command) -> bool:
    return not {"queued", "running"} & set(states(command).values())


def rank_of(cluster, cell: str) -> int:
    """The process that trains a cell."""
    for process in cluster.processes():
        try:
            words = Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if words[0] == sys.executable.encode() and f"name={cell}".encode() in words:
            return process
    raise AssertionError(f"nothing trains {cell}")


def test_killed_cells_are_completed_by_the_next_submit(cluster, command, study):
    cells = {cell.name: cell for cell in load_study(study).cells}
    logs = load_study(study).output_dir / "logs"
    text, submitted = command("submit", *FLAGS)
    assert "4 to start" in text and "2 cells in 1 tasks that share a node each" in text
    assert [job["tasks"] for job in submitted["jobs"]] == [
        [[f"baseline-{SMALL}", f"bank-{SMALL}"]],
        [[f"baseline-{LARGE}"], [f"bank-{LARGE}"]],
    ]
    assert "0 to start" in command("submit", *FLAGS)[0], "cells in the queue are not submitted twice"

    # One task is cancelled, and a cell that shares its node dies.
    cancelled, killed = cells[f"bank-{LARGE}"], cells[f"bank-{SMALL}"]
    wait(command, logs, lambda: len(read_metrics(killed.run_dir)) > 5, "training of the cell to kill")
    os.kill(rank_of(cluster, killed.name), signal.SIGKILL)
    wait(command, logs, lambda: len(read_metrics(cancelled.run_dir)) > 5, "training of the cell to cancel")
    cluster.command("scancel", f"{submitted['jobs'][1]['job']}_1")
    wait(command, logs, lambda: settled(command), "end of all jobs")
    assert states(command) == {
        **dict.fromkeys(cells, "complete"),
        cancelled.name: "pending",
    }, "".join(path.read_text() for path in logs.glob("*"))
    assert starts(cancelled)[-1]["status"] == 143

    text, submitted = command("submit", *FLAGS)
    assert "3 complete; 1 to start" in text and [job["tasks"] for job in submitted["jobs"]] == [[[cancelled.name]]]
    wait(command, logs, lambda: settled(command), "end of the last job")
    results = read_results(load_study(study))
    assert results.problems == () and sorted(results.table.cell) == sorted(cells)
    restarts = dict(zip(results.table.cell, results.table.restarts, strict=True))
    assert restarts == {**dict.fromkeys(cells, 0), cancelled.name: 1, killed.name: 1}
    for cell in cells.values():
        assert [line["step"] for line in read_metrics(cell.run_dir)] == list(range(1, STEPS + 1))
    assert {line["world_size"] for line in starts(cells[f"baseline-{LARGE}"]) if "start" in line} == {2}
