"""How cells are distributed over the nodes of a cluster."""

import dataclasses
import shlex
from pathlib import Path

import pytest

from bov_megatron.errors import StudyError
from bov_megatron.studies.study import load_study
from bov_megatron.studies.submission import Nodes, arrays, submit
from bov_megatron.studies.task import read_task
from tests.support.study_runs import tiny_study


@pytest.fixture
def study(tmp_path, prepared_data):
    """Twelve cells: two variants, budgets of 2 to 7 steps."""
    return load_study(tiny_study(tmp_path, prepared_data, steps=tuple(range(2, 8))))


def sized(cells, *world_sizes: int):
    return [dataclasses.replace(cell, world_size=size) for cell, size in zip(cells, world_sizes, strict=False)]


def test_small_cells_share_a_node_with_those_that_take_as_long(study):
    (array,) = arrays(study.cells, Nodes(ntasks_per_node=4))
    assert (array.kind, array.nodes) == ("together", 1)
    steps = [[cell.recipe.train.steps for cell in cells] for cells in array.tasks]
    assert steps == [[7, 7, 6, 6], [5, 5, 4, 4], [3, 3, 2, 2]]


def test_every_cell_gets_its_ranks_and_no_node_too_many(study):
    cells = sized(study.cells, 1, 1, 1, 3, 3, 4, 4, 8, 8, 8)
    found = arrays(cells, Nodes(ntasks_per_node=4))
    placed = [cell.name for array in found for task in array.tasks for cell in task]
    assert sorted(placed) == sorted(cell.name for cell in cells)
    assert {(array.kind, array.nodes): [len(cells) for cells in array.tasks] for array in found} == {
        ("together", 1): [3, 1, 1],  # three of one rank; of three ranks only one fits
        ("alone", 1): [1, 1],
        ("alone", 2): [1, 1, 1],
    }


def test_arrays_stay_below_slurm_s_limit(study):
    many = [study.cells[0]] * 1500
    assert [len(array.tasks) for array in arrays(many, Nodes(ntasks_per_node=1))] == [1000, 500]


def test_what_cannot_be_placed(study):
    with pytest.raises(StudyError, match="needs 6 ranks, which is not a multiple of 4"):
        arrays(sized(study.cells, 6), Nodes(ntasks_per_node=4))
    with pytest.raises(StudyError, match="needs 2 nodes; --max-nodes 1 is too few"):
        arrays(sized(study.cells, 8), Nodes(ntasks_per_node=4, max_nodes=1))


def test_a_limit_holds_over_all_arrays(study):
    calls = [call for _, call, _ in submit(study, sized(study.cells, 1, 1, 8, 8), Nodes(4, max_nodes=5), dry_run=True)]
    small, large = calls
    assert {"--nodes=1", "--array=0-0%5", "--ntasks-per-node=1", "--cpus-per-task=12", "--gpus-per-node=2"} <= set(
        small
    )
    assert {"--nodes=2", "--array=0-1%2", "--ntasks-per-node=4", "--gpus-per-node=4"} <= set(large)
    assert "--dependency=afterany:JOB_1" in large and not [word for word in small if "dependency" in word]
    assert not study.output_dir.joinpath("slurm").exists(), "a dry run writes nothing"


def test_flags_of_the_user_come_last(study):
    ((_, call, _),) = submit(study, study.cells[:1], Nodes(gpus_per_node=0), ["--time=01:00:00"], dry_run=True)
    assert call.index("--time=01:00:00") == call.index("slurm/study.sh") - 1 and "--gpus-per-node=0" in call


def test_a_task_is_read_back_as_it_was_written(study, tmp_path):
    (array,) = arrays(study.cells[:2], Nodes(ntasks_per_node=2))
    path = tmp_path / "tasks.txt"
    path.write_text("\n".join(array.lines()))
    cells = {cell.name: cell for cell in study.cells}
    for run in read_task(path, 0):
        assert (run.base, run.overrides, run.run_dir) == (
            str(cells[run.name].base),
            cells[run.name].overrides,
            cells[run.name].run_dir,
        )
    with pytest.raises(StudyError, match="has no task 7"):
        read_task(path, 7)


def test_away_from_the_repository(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StudyError, match="submit from the repository's root"):
        list(submit(study, study.cells, Nodes()))


def test_a_line_of_a_whole_node_is_what_a_person_would_type(study):
    (array,) = arrays(sized(study.cells, 4), Nodes(ntasks_per_node=4))
    words = shlex.split(array.lines()[0])
    assert Path(words[0]) == study.cells[0].base and tuple(words[1:]) == study.cells[0].overrides
