"""Memory that conversions add to a process, of a model larger than what they may hold."""

import ctypes
import gc
import re
from pathlib import Path

from tests.support.distributed import run_ranks

MODEL_BYTES, FILE_BYTES, READ_BYTES = 300 << 20, 32 << 20, 16 << 20


def _recipe():
    from bov_megatron.recipe import ModelConfig, ParallelConfig, Recipe, TrainConfig, ValueConfig

    model = ModelConfig(
        **dict(num_layers=18, hidden_size=512, num_attention_heads=8, vocab_size=8192, sequence_length=128),
        value=ValueConfig(source="bank", coefficient="learned"),
    )
    return Recipe(model=model, train=TrainConfig(precision="fp32", steps=1), parallel=ParallelConfig())


def make_models(rank, world_size, folder):
    """FOLDER/run, FOLDER/export and FOLDER/nanochat: the same weights in three formats."""
    import torch

    from bov_megatron import checkpoint
    from bov_megatron.exchange import convert, from_nanochat
    from bov_megatron.exchange.export import export
    from bov_megatron.recipe.parameters import parameter_specs
    from tests.support.nanochat import save_checkpoint

    recipe = _recipe()
    model, specs = recipe.model, parameter_specs(recipe.model)
    assert 4 * sum(spec.size for spec in specs) > MODEL_BYTES
    with convert.new_engine(recipe) as engine:
        checkpoint.save(engine, folder / "run", 1, keep_last=1, extra={"shards": None})
    [path] = (folder / "run" / "checkpoints").iterdir()
    with torch.no_grad():
        weights = dict(convert.stored_tensors(path))
        export(weights, model, None, folder / "export", recipe=recipe.to_dict(), max_shard_bytes=FILE_BYTES)
    assert len(list((folder / "export").glob("*.safetensors"))) > 5
    theirs = {from_nanochat.reference_name(spec, model): weights[spec.name].clone() for spec in specs}
    sizes = {theirs: getattr(model, ours) for theirs, ours in from_nanochat._SIZES.items()}
    sizes |= {"n_kv_head": model.kv_heads, "window_pattern": model.window_pattern}
    save_checkpoint(folder / "nanochat", 1, theirs, sizes, ["v_from_value_emb", "learn_init_coeffs"])


def measure(rank, world_size, folder, out):
    """By conversion: most bytes that it adds to this process, and what is planned; and the allowance in it."""
    import psutil
    import torch
    import transformers.modeling_utils  # noqa: F401

    from bov_megatron.checkpoint import loading
    from bov_megatron.exchange import convert, from_hf, from_nanochat, needs, roundtrip

    loading.READ_BYTES, small = READ_BYTES, {"max_shard_bytes": FILE_BYTES}
    run, export, nanochat, model = folder / "run", folder / "export", folder / "nanochat", _recipe().model
    of_export = convert.plan_to_hf(run, **small)
    assert of_export == needs.needs_of_export(model, torch.float32, None, FILE_BYTES)
    ways = {
        "to_hf": (lambda to: convert.to_hf(run, to, check_parity=False, **small), of_export.memory),
        "from_hf": (lambda to: from_hf.from_hf(export, to), from_hf.plan_from_hf(export).memory),
        "from_nanochat": (
            lambda to: from_nanochat.from_nanochat(nanochat, to),
            from_nanochat.plan_from_nanochat(nanochat).memory,
        ),
        "roundtrip": (
            lambda to: roundtrip.roundtrip(run, check_parity=False, **small),
            needs.needs_of_roundtrip(model, FILE_BYTES).memory,
        ),
        "parity": (lambda to: convert.to_hf(run, to, **small), of_export.memory_of_parity),
    }
    found = {}
    for name, (convert_to, planned) in ways.items():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = psutil.Process().memory_info().rss
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is used
        convert_to(out / name)
        [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        found[name] = int(peak) * 1024 - before, planned
    return found, needs.ALLOWANCE


def test_memory_is_as_planned_and_less_than_the_model(tmp_path):
    """To compare logits, one model is in memory, not two."""
    run_ranks(make_models, 1, tmp_path)
    ((found, allowance),) = run_ranks(measure, 1, tmp_path, tmp_path / "out")
    print({name: [f"{size / 2**20:.0f} MiB" for size in sizes] for name, sizes in found.items()})
    for name, (added, planned) in found.items():
        assert added < planned, name
        assert added < MODEL_BYTES * {"parity": 1.9, "roundtrip": 1.2}.get(name, 2 / 3), name
    for name in ("to_hf", "parity"):  # of the others, most is the allowance
        added, planned = found[name]
        assert added > (planned - allowance) / 2, name
