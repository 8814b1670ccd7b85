"""Runs of several layouts, converted to Hugging Face in one process, with logits compared."""

import contextlib
import io
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.distributed import run_ranks
from tests.support.runs import overrides, train

GROUPED = ("model.num_query_groups=2", "train.steps=2", "checkpoint.interval=0", "validation.interval=0")
LAYOUTS = {
    "tp2-pp2": (4, "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"),
    "dp2-bf16": (2, "train.precision=bf16"),
}


def convert_rank(rank: int, world_size: int, run_dir: str, out: str, options: dict):
    """What `tools/convert.py to-hf` does, in a process of its own: (conversion, None) or (None, error)."""
    from bov_megatron.errors import CheckpointError, ExportError
    from bov_megatron.exchange import needs
    from bov_megatron.exchange.convert import to_hf

    if options.pop("wrong_table", False):
        _spoil_the_table()
    if options.pop("little_memory", False):
        needs.available_memory = lambda: 1 << 20
    try:
        return to_hf(Path(run_dir), Path(out), **options), None
    except (ExportError, CheckpointError) as error:
        return None, str(error)


def _spoil_the_table() -> None:
    """Export rows in another order than the model's: what a wrong unpadding or resharding would do."""
    from bov_megatron.exchange import convert

    right = convert.full_from_gathered

    def wrong(local, gathered):
        return {name: t.flip(0) if "value_table" in name else t for name, t in right(local, gathered).items()}

    convert.full_from_gathered = wrong


@pytest.fixture(scope="module")
def runs(prepared_data, tmp_path_factory):
    """A finished run in each layout: four layers, the last two with a bank."""
    folder = tmp_path_factory.mktemp("convert")
    for name, (world_size, *layout) in LAYOUTS.items():
        changes = overrides(prepared_data, folder / name, *GROUPED, "model.num_layers=4", *layout)
        train(world_size, changes)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_agree(runs, layout, tmp_path):
    ((done, error),) = run_ranks(convert_rank, 1, str(runs / layout), str(tmp_path / "out"), {})
    assert error is None
    assert done.step == 2 and done.parity.relative_error < 1e-5
    text = (tmp_path / "out" / "config.json").read_text()
    assert ('"dtype": "bfloat16"' if "bf16" in layout else '"dtype": "float32"') in text
    assert (tmp_path / "out" / "tokenizer.json").exists(), "the tokenizer kept with the run"


def test_rounded_tables_agree_when_rounded_alike(runs, tmp_path):
    ((done, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "out"), {"tables": "int8"})
    assert error is None
    assert done.parity.relative_error < 1e-5 < done.cost_of_tables.relative_error < 0.02
    assert '"table_dtype": "int8"' in (tmp_path / "out" / "config.json").read_text()
    assert "value tables int8 with a bfloat16 scale per row" in (tmp_path / "out" / "README.md").read_text()


def test_a_wrong_export_is_not_kept(runs, tmp_path):
    out = tmp_path / "out"
    ((done, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(out), {"wrong_table": True})
    assert done is None and "logits differ from the Megatron model's" in error
    assert not out.exists()


def test_logits_that_memory_has_no_room_for_are_not_begun(runs, tmp_path):
    options = {"little_memory": True}
    ((_, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "out"), options)
    assert "comparing logits takes about" in error and "0.0 GiB are available; give --skip-parity" in error
    assert not (tmp_path / "out").exists()
    options |= {"check_parity": False}
    ((done, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "out"), options)
    assert error is None and done.parity is None


def planned(rank, world_size, run_dir, out):
    """The command line's plan, and bytes of weights of an export made as planned."""
    from bov_megatron.commands.convert import main
    from bov_megatron.exchange.convert import plan_to_hf

    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        assert main(["to-hf", run_dir, out, "--plan"]) == 0
    return text.getvalue(), plan_to_hf(Path(run_dir)).disk, plan_to_hf(Path(run_dir), tables="int8").disk


def test_plan(runs, tmp_path):
    out = tmp_path / "out"
    ((text, disk, disk_int8),) = run_ranks(planned, 1, str(runs / "tp2-pp2"), str(out))
    assert not out.exists() and f"disk: {disk / 2**10:.2f} KiB in {out}" in text and "--skip-parity" in text
    for tables, planned_bytes in ((None, disk), ("int8", disk_int8)):
        options = {"check_parity": False, "tables": tables, "overwrite": True}
        run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(out), options)
        weights = load_file(out / "model.safetensors")
        assert sum(tensor.nbytes for tensor in weights.values()) == planned_bytes


def test_bad_input(runs, tmp_path):
    ((_, error),) = run_ranks(convert_rank, 1, str(tmp_path / "nowhere"), str(tmp_path / "out"), {})
    assert "nowhere holds no complete checkpoint" in error
    ((_, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "out"), {"step": 7})
    assert "no checkpoint of step 7; it has 2" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    ((_, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "full"), {})
    assert "is not empty" in error and "--overwrite" in error
