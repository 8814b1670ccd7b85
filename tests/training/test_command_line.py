"""What a user gets who mistypes: exit status 2 and one line that names the field and the remedy."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from bov_megatron import train as command
from bov_megatron.data.prepare import PrepareOptions, prepare_data
from tests.support.runs import SMOKE, launch, overrides, train


@pytest.fixture
def alone(monkeypatch):
    """A world of one process, whatever launcher runs the tests."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_help_suffices(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for part in ("recipe", "section.field=value", "torchrun", "srun", "docs/use/recipes.md", "continued"):
        assert part in text


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["recipes/780m_bv.yaml"], ["780m_bv.yaml does not exist", "did you mean 780m_bov.yaml"]),
        ([SMOKE, "train.stesp=3"], ["unknown field 'train.stesp'", "did you mean 'train.steps'"]),
        ([SMOKE, "train.steps"], ["'train.steps' is not of the form section.field=value"]),
        (
            [SMOKE, "parallel.tensor_model_parallel_size=3"],
            ["model.num_attention_heads=4 is not divisible by parallel.tensor_model_parallel_size=3", "can be 1, 2, 4"],
        ),
        (
            [SMOKE, "parallel.pipeline_model_parallel_size=4"],
            ["model.num_layers=6 is not divisible by parallel.pipeline_model_parallel_size=4"],
        ),
        ([SMOKE], ["world size 1 is not a multiple of 2", "parallel.tensor_model_parallel_size"]),
    ],
    ids=["recipe", "field", "form", "heads", "layers", "world"],
)
def test_a_recipe_that_cannot_run(alone, capsys, arguments, parts):
    assert command.main(arguments) == 2
    check([capsys.readouterr().err], parts)


def test_part_of_a_launcher_s_variables(alone, capsys):
    alone.setenv("WORLD_SIZE", "2")
    assert command.main([SMOKE]) == 2
    check([capsys.readouterr().err], ["WORLD_SIZE=2 set, but not RANK", "torchrun or srun"])


def test_one_line_for_all_ranks(prepared_data, tmp_path):
    """Refused at once, and refused after the ranks have met."""
    odd = overrides(prepared_data, tmp_path / "a", "train.global_batch_size=3")
    refuse(2, odd, "train.global_batch_size=3")
    missing = overrides(prepared_data, tmp_path / "a", f"data.path={tmp_path / 'nowhere'}")
    refuse(2, missing, str(tmp_path / "nowhere"), "bov prepare-data")
    assert not (tmp_path / "a").exists(), "a run that cannot start leaves no folder"


def test_data_that_does_not_fit_the_model(prepared_data, tmp_path):
    refuse(1, overrides(prepared_data, tmp_path, "model.vocab_size=500"), "vocabulary of 512", "model.vocab_size=512")
    shorter = overrides(prepared_data, tmp_path, "model.sequence_length=128")
    refuse(1, shorter, "sequence_length 256", "--sequence-length 128")


def test_what_a_checkpoint_refuses_on_resume(prepared_data, other_prepared_data, tmp_path):
    short = ("train.steps=2", "checkpoint.interval=1")
    train(2, overrides(prepared_data, tmp_path / "run", *short))
    again = ("train.steps=4",)
    other = overrides(other_prepared_data, tmp_path / "run", *again)
    refuse(2, other, "tokenizer", "the checkpoint with", "all must use the same one")
    order = overrides(prepared_data, tmp_path / "run", *again, "data.shuffle_seed=1")
    refuse(2, order, "data.shuffle_seed=1", "reorder the data", "start another run with name=")
    larger = overrides(prepared_data, tmp_path / "run", *again, "model.hidden_size=64")
    refuse(2, larger, "model.hidden_size=64", "saved with 32")
    adamw = overrides(prepared_data, tmp_path / "run", *again, "optimizer.name=adamw")
    refuse(2, adamw, "optimizer.name='adamw'", "saved with 'muon'")


def test_resuming_on_other_shards_of_the_same_tokenizer(prepared_data, tmp_path):
    """Sample numbers would mean other samples, and no digest would show it."""
    train(1, overrides(prepared_data, tmp_path / "run", "train.steps=1"))
    other = PrepareOptions(
        [str(Path(json.__file__).parent)], str(prepared_data.tokenizer), str(tmp_path / "data"), sequence_length=256
    )
    prepare_data(dataclasses.replace(other, validation_fraction=0.2, workers=1), progress=False)
    again = overrides(prepared_data, tmp_path / "run", "train.steps=2", f"data.path={tmp_path / 'data'}")
    refuse(1, again, "training shards of", "checkpoint of step 1", "start another run with name=")


def damaged_for_one(rank, world_size, arguments):
    """Rank 1's node lacks the data."""
    from tests.support import runs

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if rank == 1:
        arguments = [item.replace("/data", "/gone") if item.startswith("data.path=") else item for item in arguments]
    return runs._rank(rank, world_size, [SMOKE, *arguments])


def test_an_error_on_another_node_is_heard(prepared_data, tmp_path):
    from tests.support.distributed import run_ranks

    results = run_ranks(damaged_for_one, 2, overrides(prepared_data, tmp_path))
    assert [code for code, _ in results] == [2, 2]
    check([text for _, text in results], ["gone", "(on rank 1)"])


def refuse(world_size: int, arguments: list[str], *parts: str) -> None:
    results = launch(world_size, arguments)
    assert [code for code, _ in results] == [2] * world_size, results
    check([text for _, text in results], parts)


def check(texts: list[str], parts) -> None:
    """One line over all ranks beside those of progress; it says all of `parts`."""
    text = "".join(texts)
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0], lines[0]
