"""`submit --local`: cells trained on this machine, some of which fail, or are interrupted."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bov_megatron.commands import study as command
from bov_megatron.recipe.quantities import parameters_by_convention
from bov_megatron.studies.results import COLUMNS, read_results
from bov_megatron.studies.study import load_study
from tests.support.runs import metrics
from tests.support.study_runs import starts, tiny_study

ROOT = Path(__file__).resolve().parents[2]


def submit(path: Path, *arguments: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "tools/study.py", "submit", str(path), *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture(scope="module")
def trained(prepared_data, tmp_path_factory):
    """`(study file, output, exit status)` of two cells of two steps, and one whose data is missing."""
    variants = {
        "broken": {"data.path": "/nowhere"},
        "baseline": {"model.value.source": "projection"},
        "bank": {"model.value.source": "bank"},
    }
    path = tiny_study(tmp_path_factory.mktemp("study"), prepared_data, baseline="baseline", variants=variants)
    process = submit(path, "--local", "2")
    output, _ = process.communicate(timeout=400)
    return path, output, process.returncode


def test_a_failed_cell_does_not_stop_the_others(trained, capsys):
    path, output, status = trained
    assert status == 3, output
    assert "broken-d3-2.048e3tokens-s0: failed, error: " in output and "/nowhere" in output
    assert "2 of 3 cells complete, 1 failed, 0 to do" in output
    assert command.main(["status", str(path), "--json", "-"]) == 0
    found = {cell["cell"]: cell for cell in json.loads(capsys.readouterr().out)["cells"]}
    states = {name: cell["state"] for name, cell in found.items()}
    assert states == {
        "broken-d3-2.048e3tokens-s0": "failed",
        "baseline-d3-2.048e3tokens-s0": "complete",
        "bank-d3-2.048e3tokens-s0": "complete",
    }
    assert found["bank-d3-2.048e3tokens-s0"]["step"] == 2
    assert "logs/broken-d3-2.048e3tokens-s0.log" in found["broken-d3-2.048e3tokens-s0"]["note"]


def test_only_what_is_missing_is_started_again(trained, capsys):
    path, _, _ = trained
    assert command.main(["submit", str(path), "--local", "1", "--dry-run"]) == 0
    calls = [line for line in capsys.readouterr().out.splitlines() if "bov_megatron.train" in line]
    assert len(calls) == 1 and "name=broken-d3-2.048e3tokens-s0" in calls[0]


def test_results_are_those_of_the_runs(trained):
    study = load_study(trained[0])
    results = read_results(study)
    assert results.problems == ()
    table = results.table.set_index("cell", drop=False)
    assert list(results.table.columns) == list(COLUMNS) and list(table.variant) == ["baseline", "bank"]
    for cell in study.cells[1:]:
        row, lines = table.loc[cell.name], metrics(cell.run_dir)
        assert (row.steps, row.tokens, row.restarts, row.run) == (2, 2048, 0, str(cell.run_dir))
        assert row.loss == lines[-1]["validation_loss"] and row.bits_per_byte == lines[-1]["validation_bits_per_byte"]
        assert row.tokens_per_second > 0 and row.seconds > 0
        assert row.n_all == parameters_by_convention(cell.recipe.model)["all"]
        begun = starts(cell)[0]
        assert (row.digest, row.commit) == (begun["digest"], begun["commit"])
    assert table.n_without_tables["bank-d3-2.048e3tokens-s0"] < table.n_without_tables["baseline-d3-2.048e3tokens-s0"]


def test_interrupted_and_taken_up_again(prepared_data, tmp_path):
    path = tiny_study(tmp_path, prepared_data, steps=(60,), variants={"baseline": {"model.value.source": "projection"}})
    (cell,) = load_study(path).cells
    process = submit(path, "--local", "1")
    deadline = time.monotonic() + 300
    while not (cell.run_dir / "metrics.jsonl").exists() or len(metrics(cell.run_dir)) < 3:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 143 and f"{cell.name}: stopped" in output, output
    assert starts(cell)[-1]["status"] == 143 and 3 <= starts(cell)[-1]["end"] < 60

    process = submit(path, "--local", "1")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0 and "1 of 1 cells complete" in output, output
    assert starts(cell)[2]["start"] == starts(cell)[1]["end"]
    # A validation that was cut short has a line of its own, without a training loss.
    assert [line["step"] for line in metrics(cell.run_dir) if "loss" in line] == list(range(1, 61))
    assert read_results(load_study(path)).table.restarts.tolist() == [1]
