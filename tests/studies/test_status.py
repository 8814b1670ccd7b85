"""What is said about a cell, from its run folder as it may be found."""

import json
import os
import time

import pytest

from benchmarks.studies import write_run
from bov_megatron.commands import main
from bov_megatron.errors import StudyError
from bov_megatron.lifecycle.lease import Lease
from bov_megatron.studies.status import read_status
from bov_megatron.studies.study import load_study
from bov_megatron.studies.submission import cells_to_start
from tests.support.study_runs import edit, starts, tiny_study, write_starts


@pytest.fixture
def study_file(tmp_path, prepared_data):
    """A study of one cell of 40 steps, finished."""
    path = tiny_study(tmp_path, prepared_data, (40,), variants={"baseline": {"model.value.source": "projection"}})
    write_run(load_study(path).cells[0], lines=40)
    return path


def only(study_file):
    (status,) = read_status(load_study(study_file))
    return status


def cut(cell, lines: int, rest: str = "") -> None:
    path = cell.run_dir / "metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:lines]) + rest)


def test_complete(study_file):
    found = only(study_file)
    assert (found.state, found.step, found.steps, found.loss, found.restarts) == ("complete", 40, 40, 4.2, 0)


def test_stopped_and_to_go_on(study_file):
    study = load_study(study_file)
    (cell,) = study.cells
    start, end = starts(cell)
    write_starts(cell, start, end | {"end": 25, "status": 143})
    cut(cell, 25)
    found = only(study_file)
    assert (found.state, found.step, found.note) == ("pending", 25, "stopped after step 25")
    assert cells_to_start(study)[0] == [cell]


def test_running_with_a_line_half_written(study_file):
    """Here, as its process lives; and a cell that runs is not started."""
    study = load_study(study_file)
    (cell,) = study.cells
    write_starts(cell, starts(cell)[0])
    cut(cell, 20, '{"step": 21, "lo')
    with Lease(cell.run_dir):
        found = only(study_file)
        assert (found.state, found.step) == ("running", 20)
        assert found.seconds_left == pytest.approx(20 * 1024 / (16384 + 20))
        assert cells_to_start(study)[0] == []


def test_running_elsewhere_as_long_as_its_lease_is_renewed(study_file):
    (cell,) = load_study(study_file).cells
    write_starts(cell, starts(cell)[0])
    with Lease(cell.run_dir) as lease:
        holder = json.loads(lease.path.read_text()) | {"machine": "another"}
    lease.path.write_text(json.dumps(holder))
    assert only(study_file).state == "running"
    os.utime(lease.path, (time.time() - 90,) * 2)
    assert only(study_file).state == "failed"


@pytest.mark.parametrize(
    "end, note",
    [
        (None, "killed or crashed, see"),
        ({"status": 3, "error": "10 steps in a row not finite"}, "10 steps in a row not finite"),
        ({"status": 4}, "ended with status 4"),
    ],
)
def test_failed(study_file, end, note):
    study = load_study(study_file)
    start, last = starts(study.cells[0])
    write_starts(study.cells[0], start, *([last | {"end": None} | end] if end else []))
    found = only(study_file)
    assert found.state == "failed" and note in found.note
    assert cells_to_start(study)[0] == list(study.cells)


def test_edited(study_file):
    edit(study_file, optimizer__matrix_lr=0.5)
    found = only(study_file)
    assert (found.state, found.note) == ("edited", "optimizer.matrix_lr: 0.02 -> 0.5")
    study = load_study(study_file)
    with pytest.raises(StudyError, match=r"matrix_lr: 0.02 -> 0.5.*Undo the change, or give --set-aside"):
        cells_to_start(study)
    (cell,) = study.cells
    assert cells_to_start(study, set_aside=True)[0] == [cell]
    assert not cell.run_dir.exists() and (study.output_dir / "set_aside" / cell.name / "metrics.jsonl").exists()
    assert only(study_file).state == "pending"


def test_an_edited_cell_that_runs_is_left_alone(study_file):
    edit(study_file, optimizer__matrix_lr=0.5)
    study = load_study(study_file)
    with Lease(study.cells[0].run_dir), pytest.raises(StudyError, match="is being trained with another recipe"):
        cells_to_start(study, set_aside=True)


def test_a_folder_that_is_no_run(study_file, capsys):
    (cell,) = load_study(study_file).cells
    for file in cell.run_dir.iterdir():
        file.unlink()
    (cell.run_dir / "holiday.jpg").write_text("")
    found = only(study_file)
    assert (
        found.state == "unreadable"
        and "no run folder: it has no recipe.yaml, but holiday.jpg; move it away" in found.note
    )
    assert main(["study", "submit", str(study_file), "--local", "1"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {cell.run_dir} is no run folder")


def test_damaged_lines_are_named(study_file):
    (cell,) = load_study(study_file).cells
    cut(cell, 30, "rubbish\n")
    found = only(study_file)
    assert found.state == "unreadable" and "metrics.jsonl has a line that is not a step's: 'rubbish'" in found.note


def test_a_loss_that_is_not_finite(study_file):
    (cell,) = load_study(study_file).cells
    write_starts(cell, starts(cell)[0])
    cut(cell, 30, json.dumps({"step": 31, "loss": None, "tokens_per_second": 5.0}) + "\n")
    found = only(study_file)
    assert found.loss is None and "the loss of step 31 is not finite" in found.note


def test_only_the_end_of_the_metrics_is_read(study_file):
    """Whatever lies before the last 16 KiB is not looked at."""
    (cell,) = load_study(study_file).cells
    path = cell.run_dir / "metrics.jsonl"
    path.write_text("x" * 100_000 + "\n" + path.read_text())
    assert only(study_file).step == 40


def test_the_table_for_a_terminal(study_file, capsys):
    assert main(["study", "status", str(study_file)]) == 0
    text = capsys.readouterr().out
    assert "baseline-d3" in text and "40 / 40" in text and "4.2000" in text and "1 cells: 1 complete" in text
