"""The table of results: what gets in, what is left out and named, and what is read."""

import json
import math
import os

import pytest

from benchmarks.studies import write_run
from bov_megatron.lifecycle import run_folder
from bov_megatron.studies.results import read_results
from bov_megatron.studies.study import load_study
from tests.support.study_runs import edit, starts, tiny_study, write_starts


@pytest.fixture
def study_file(tmp_path, prepared_data):
    """A study of four finished cells."""
    path = tiny_study(tmp_path, prepared_data, steps=(20, 40))
    for cell in load_study(path).cells:
        write_run(cell, lines=10)
    return path


def test_medians_and_seconds_stand_for_steps_without_a_line(study_file):
    table = read_results(load_study(study_file)).table
    assert table.steps.tolist() == [20, 40, 20, 40]
    # Lines of steps 11 to 20 of 20: rates 16384 + step, a quarter of a second each.
    assert table.tokens_per_second[0] == 16384 + 15.5 and table.seconds[0] == 5.0
    assert table.loss.tolist() == [4.2] * 4 and table.flops[1] == pytest.approx(2 * table.flops[0])


def test_a_run_that_goes_on_is_read_again_and_no_other(study_file):
    study = load_study(study_file)
    before = read_results(study).table
    first, second = study.cells[:2]
    path = first.run_dir / run_folder.METRICS
    times = path.stat()
    path.write_text(" " * times.st_size)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as if it had not been touched
    other = second.run_dir / run_folder.METRICS
    other.write_text(other.read_text().replace('"validation_loss": 4.2', '"validation_loss": 3.5'))
    after = read_results(study).table
    assert after.loss.tolist() == [4.2, 3.5, 4.2, 4.2] and before.loss[1] == 4.2


def test_unfinished_runs_are_no_results(study_file):
    study = load_study(study_file)
    write_starts(study.cells[0], starts(study.cells[0])[0])  # has not ended
    results = read_results(study)
    assert study.cells[0].name not in set(results.table.cell) and len(results.table) == 3
    assert results.problems == ()


def test_runs_of_another_recipe_are_left_out_and_the_change_is_named(study_file):
    edit(study_file, optimizer__matrix_lr=0.5)
    results = read_results(load_study(study_file))
    assert results.table.empty and len(results.problems) == 4
    assert "optimizer.matrix_lr: 0.02 -> 0.5" in results.problems[0] and "--set-aside" in results.problems[0]
    edit(study_file, optimizer__matrix_lr=0.02, logging__interval=5, checkpoint__interval=9)
    assert len(read_results(load_study(study_file)).table) == 4


def test_a_run_that_went_on_with_another_recipe_is_left_out(study_file):
    """Its recipe.yaml is the last start's, and shows nothing."""
    cell = load_study(study_file).cells[0]
    start, end = starts(cell)
    write_starts(cell, start | {"digest": "0" * 16}, end | {"end": 8, "status": 143}, start | {"start": 8}, end)
    results = read_results(load_study(study_file))
    assert cell.name not in set(results.table.cell)
    assert "recipe of the first start" in results.problems[0] and "0000000000000000" in results.problems[0]
    # Where the first start made no steps, nothing of its recipe is in the run.
    write_starts(cell, start | {"digest": "0" * 16}, end | {"end": 0, "status": 143}, start, end)
    assert len(read_results(load_study(study_file)).table) == 4


def test_damage_is_named(study_file):
    study = load_study(study_file)
    damaged, cut, missing, diverged = (cell.run_dir / run_folder.METRICS for cell in study.cells)
    lines = damaged.read_text().splitlines(keepends=True)
    damaged.write_text("".join([*lines[:3], lines[3][:40] + "\n", *lines[4:]]))
    cut.write_text(cut.read_text()[:-30])
    missing.unlink()
    text = diverged.read_text().replace('"validation_loss": 4.2', '"validation_loss": NaN')
    diverged.write_text(text.replace('"validation_bits_per_byte": 1.5', '"validation_bits_per_byte": NaN'))
    results = read_results(study)
    assert len(results.problems) == 4
    assert f"{damaged} has a line that is not a step's" in results.problems[0]
    assert f"{cut} has no validation after step 40" in results.problems[1]
    assert f"{missing} is missing" in results.problems[2]
    assert "has no finite validation loss: it diverged" in results.problems[3]
    assert results.table.cell.tolist() == [study.cells[3].name] and math.isnan(results.table.loss[0])


def test_a_cache_of_something_else_is_not_used(study_file):
    study = load_study(study_file)
    read_results(study)
    path = study.output_dir / "results.json"
    stored = json.loads(path.read_text())
    for content in ("{", json.dumps(stored | {"version": 0})):
        path.write_text(content)
        assert len(read_results(study).table) == 4
