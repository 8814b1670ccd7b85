"""Whole runs in the newer layouts, through the command line's entry point: one rank's losses and statistics."""

import pytest

from tests.support.runs import metrics, overrides, train

RUN = ("model.num_layers=4", "train.steps=4", "checkpoint.interval=2")
CP2 = ["parallel.context_parallel_size=2"]
INTERLEAVED = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory, prepared_data):
    folder = tmp_path_factory.mktemp("one-rank")
    train(1, overrides(prepared_data, folder, *RUN))
    return metrics(folder)


@pytest.mark.parametrize("layout", [CP2, INTERLEAVED], ids=["context", "interleaved"])
def test_run(one_rank, prepared_data, tmp_path, layout):
    train(2, overrides(prepared_data, tmp_path, *RUN, *layout))
    check(metrics(tmp_path), one_rank)


def test_run_that_changes_layout_between_its_halves(one_rank, prepared_data, tmp_path):
    """Stopped after a validation in one layout, it goes on in the other."""
    train(2, overrides(prepared_data, tmp_path, *RUN, *INTERLEAVED))
    (tmp_path / "checkpoints" / "step_00000004").rename(tmp_path / "set aside")
    train(2, overrides(prepared_data, tmp_path, *RUN, *CP2))
    check(metrics(tmp_path), one_rank)


def check(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(expected) == 4 and "validation_bits_per_byte" in expected[-1]
    for line, wanted in zip(found, expected, strict=True):
        assert (line["step"], line["digest"], line["updated"]) == (wanted["step"], wanted["digest"], True)
        for key in wanted.keys() - {"digest", "updated"}:
            assert line[key] == pytest.approx(wanted[key], rel=2e-3), key  # Muon orthogonalises in bf16
