"""Runs of several layouts, converted to Hugging Face in one process, with logits compared."""

from pathlib import Path

import pytest

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
    from bov_megatron.exchange.convert import to_hf

    if options.pop("wrong_table", False):
        _spoil_the_table()
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


def test_bad_input(runs, tmp_path):
    ((_, error),) = run_ranks(convert_rank, 1, str(tmp_path / "nowhere"), str(tmp_path / "out"), {})
    assert "nowhere holds no complete checkpoint" in error
    ((_, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "out"), {"step": 7})
    assert "no checkpoint of step 7; it has 2" in error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    ((_, error),) = run_ranks(convert_rank, 1, str(runs / "tp2-pp2"), str(tmp_path / "full"), {})
    assert "is not empty" in error and "--overwrite" in error


MODEL_BYTES, FILE_BYTES = 300 << 20, 32 << 20


def measure_conversion(rank: int, world_size: int, folder: str) -> int:
    """Most bytes that a conversion adds to this process, of a checkpoint of more than MODEL_BYTES."""
    import resource

    import psutil
    import torch

    from bov_megatron import checkpoint
    from bov_megatron.checkpoint import loading
    from bov_megatron.exchange import convert
    from bov_megatron.exchange.export import export
    from bov_megatron.recipe import ModelConfig, ParallelConfig, Recipe, TrainConfig
    from bov_megatron.recipe.parameters import parameter_specs

    del rank, world_size
    loading.READ_BYTES = 16 << 20
    model = ModelConfig(num_layers=24, hidden_size=512, num_attention_heads=8, vocab_size=8192, sequence_length=128)
    assert 4 * sum(spec.size for spec in parameter_specs(model)) > MODEL_BYTES
    recipe = Recipe(model=model, train=TrainConfig(precision="fp32", steps=1), parallel=ParallelConfig())
    run = Path(folder) / "run"
    if not run.exists():
        with convert.new_engine(recipe) as engine:
            checkpoint.save(engine, run, 1, keep_last=1, extra={})
        return 0
    [path] = (run / "checkpoints").iterdir()
    before = psutil.Process().memory_info().rss
    with torch.no_grad():
        export(convert.stored_tensors(path), model, None, Path(folder) / "out", max_shard_bytes=FILE_BYTES)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before


def test_memory_is_that_of_a_file_of_the_export(tmp_path):
    run_ranks(measure_conversion, 1, str(tmp_path))
    (added,) = run_ranks(measure_conversion, 1, str(tmp_path))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 5
    assert added < MODEL_BYTES * 2 / 3, f"{added / 2**20:.0f} MiB"
