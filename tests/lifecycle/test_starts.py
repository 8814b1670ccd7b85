"""What a run's starts leave behind, and what is read from it."""

import json

import pytest

from bov_megatron import errors
from bov_megatron.errors import DataError, RunFolderError, TrainingError
from bov_megatron.lifecycle.lease import Lease
from bov_megatron.lifecycle.starts import StartRecord, read_starts


def record(run_dir, step: int, end: int | None = None, status: int = errors.DONE, raises=None) -> None:
    with Lease(run_dir) as lease, StartRecord(lease, "d1", 2, {"SLURM_JOB_ID": "7"}) as start:
        start.begin(step)
        if raises:
            raise raises
        if end is not None:
            start.end(end, status)


def test_interrupted_then_finished(tmp_path):
    record(tmp_path, 0, 40, errors.INTERRUPTED)
    first = read_starts(tmp_path)
    assert not first.finished and (first.end["end"], first.end["status"]) == (40, errors.INTERRUPTED)
    record(tmp_path, 40, 60)
    starts = read_starts(tmp_path)
    assert starts.finished and [line["start"] for line in starts.starts] == [0, 40]
    assert {(line["digest"], line["world_size"], line["job"]) for line in starts.starts} == {("d1", 2, "7")}
    assert len(starts.starts[0]["commit"].removesuffix("+changes")) == 12


def test_a_start_that_was_killed_has_no_end(tmp_path):
    record(tmp_path, 0, 60)
    path = tmp_path / "starts.jsonl"
    lines = path.read_text().splitlines()
    path.write_text(f"{lines[0]}\n{lines[1]}\n{lines[0]}\n{lines[1][:20]}")  # killed while writing its end
    assert not read_starts(tmp_path).finished and read_starts(tmp_path).end is None
    record(tmp_path, 60, 60)  # the cut-off line does not swallow this one
    assert read_starts(tmp_path).finished and len(read_starts(tmp_path).starts) == 3


def test_an_error_is_kept_with_its_status(tmp_path):
    with pytest.raises(TrainingError):
        record(tmp_path, 5, raises=TrainingError("ten steps not finite"))
    end = read_starts(tmp_path).end
    assert (end["status"], end["error"]) == (errors.NOT_WORTH_GOING_ON, "ten steps not finite")


def test_a_start_that_cannot_begin(tmp_path):
    """Leaves no folder; in one that has a history, it is part of it."""

    def fail(run_dir):
        with pytest.raises(DataError), Lease(run_dir) as lease, StartRecord(lease, "d1", 1):
            raise DataError("no shards")

    fail(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    record(tmp_path / "old", 0, 10, errors.INTERRUPTED)
    fail(tmp_path / "old")
    assert read_starts(tmp_path / "old").end["status"] == errors.CANNOT_START


def test_nothing_is_written_to_a_folder_that_another_start_has_taken(tmp_path):
    with Lease(tmp_path) as lease, StartRecord(lease, "d1", 1) as start:
        start.begin(0)
        lease.lost = True
    assert [json.loads(line).get("start") for line in (tmp_path / "starts.jsonl").read_text().splitlines()] == [0]


def test_lines_of_something_else_are_named(tmp_path):
    (tmp_path / "starts.jsonl").write_text('{"colour": "blue"}\n')
    with pytest.raises(RunFolderError, match="neither a start nor an end"):
        read_starts(tmp_path)
