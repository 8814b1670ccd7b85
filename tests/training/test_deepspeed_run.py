"""Whole runs of the DeepSpeed engine through the command line's entry point, beside Megatron's, and after them."""

import os
import shutil
from pathlib import Path

import pytest

from bov_megatron.checkpoint import report
from tests.exchange.test_convert import convert_rank
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train

ADAMW = ("optimizer.name=adamw", "optimizer.clip_grad=1.0")
ZERO2 = ("engine=deepspeed", "deepspeed.zero_stage=2")
ZERO3 = ("engine=deepspeed", "deepspeed.zero_stage=3")
TP2 = ("parallel.tensor_model_parallel_size=2",)


def outspoken(rank, world_size, arguments, folder):
    """The exit status of a run, whose output goes to files: also what is written behind Python's back."""
    from bov_megatron import train as command_line
    from bov_megatron.engines.deepspeed import engine

    engine.PERSISTENT_ELEMENTS = 1000  # or ZeRO 3 would keep every weight of this model whole
    for descriptor in (1, 2):
        file = os.open(Path(folder) / f"{descriptor}.{rank}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, descriptor)
    return command_line.main([SMOKE, *arguments])


@pytest.fixture(scope="module")
def runs(prepared_data, tmp_path_factory):
    """Folder with the same run by either engine, and what DeepSpeed's ranks wrote to their terminals."""
    folder = tmp_path_factory.mktemp("engines")
    train(2, overrides(prepared_data, folder / "megatron", *ADAMW))
    (folder / "output").mkdir()
    arguments = overrides(prepared_data, folder / "zero3", *ADAMW, *ZERO3, "checkpoint.asynchronous=true")
    assert run_ranks(outspoken, 2, arguments, folder / "output") == [0, 0]
    return folder


def test_metrics_equal_those_of_megatron(runs):
    check(metrics(runs / "zero3"), metrics(runs / "megatron"))


def test_deepspeed_keeps_quiet(runs):
    output = {path.name: path.read_text() for path in (runs / "output").iterdir()}
    assert output["1.0"] == output["1.1"] == output["2.1"] == ""
    own = ("smoke: ", "step ", "building the model", "opening the data")
    assert all(line.startswith(own) for line in output["2.0"].splitlines()), output["2.0"]
    made = {path.name for path in (runs / "zero3").iterdir()}
    assert made == {path.name for path in (runs / "megatron").iterdir()}


@pytest.mark.parametrize(
    ("begun", "changes"),
    [("zero3", TP2), ("megatron", (*ZERO2, "deepspeed.offload_optimizer=cpu")), ("megatron", (*ZERO2, *TP2))],
    ids=["zero3 then megatron", "megatron then zero2 with offload", "megatron then zero2 with tensor parallelism"],
)
def test_begun_by_one_engine_and_ended_by_the_other(runs, prepared_data, tmp_path, begun, changes):
    """The last two of eight steps."""
    shutil.copytree(runs / begun, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000008")
    output = train(2, overrides(prepared_data, tmp_path, *ADAMW, *changes))
    assert "resuming after step 6" in output
    check(metrics(tmp_path), metrics(runs / "megatron"))


def check(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    assert len(expected) == 8 and "validation_bits_per_byte" in expected[-1]
    assert "table_rows_touched/layer_2" in expected[-1] and expected[-1]["loss"] < expected[0]["loss"]
    for line, wanted in zip(found, expected, strict=True):
        assert (line["step"], line["digest"], line["updated"]) == (wanted["step"], wanted["digest"], True)
        for key in wanted.keys() - {"digest", "updated"}:
            assert line[key] == pytest.approx(wanted[key], rel=1e-5), key


def test_checkpoints_hold_the_same_tensors(runs):
    megatron, zero3 = (report.inspect(runs / name)["tensors"] for name in ("megatron", "zero3"))
    assert megatron == zero3 and len(zero3) > 20


def test_export(runs, tmp_path):
    ((done, error),) = run_ranks(convert_rank, 1, str(runs / "zero3"), str(tmp_path / "out"), {})
    assert error is None and done.step == 8 and done.parity.relative_error < 1e-5
