"""An export becomes a run again: the same bits, and training reads on where the exported run stood."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.support.distributed import run_ranks
from tests.support.runs import launch, metrics, overrides, train
from tests.support.small_disk import fill

RUN = ("model.num_query_groups=2", "model.num_layers=4", "checkpoint.interval=2", "validation.interval=0")
TP2_PP2 = ("parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2")


def ways(rank, world_size, calls):
    """Results of calls of this project's conversions, `(function, arguments)`; an error's message in its place."""
    from bov_megatron.errors import BovError
    from bov_megatron.exchange.convert import to_hf
    from bov_megatron.exchange.from_hf import from_hf
    from bov_megatron.exchange.roundtrip import roundtrip

    results = []
    for function, arguments in calls:
        try:
            results.append({"to_hf": to_hf, "from_hf": from_hf, "roundtrip": roundtrip}[function](**arguments))
        except BovError as error:
            results.append(str(error))
    return results


@pytest.fixture(scope="module")
def exported(prepared_data, tmp_path_factory):
    """A run of four steps at TP 2 × PP 2, and an export of its second."""
    folder = tmp_path_factory.mktemp("exported")
    train(4, overrides(prepared_data, folder / "run", *RUN, *TP2_PP2, "train.steps=4"))
    call = ("to_hf", dict(run_dir=folder / "run", out_dir=folder / "export", step=2, check_parity=False))
    (results,) = run_ranks(ways, 1, [call])
    assert not isinstance(results[0], str), results
    return folder


def test_training_reads_on_where_the_exported_run_stood(exported, prepared_data, tmp_path):
    ((back,),) = run_ranks(ways, 1, [("from_hf", dict(export_dir=exported / "export", run_dir=tmp_path / "run"))])
    assert (back.step, back.has_tokenizer) == (2, True) and "batch 2 of the same data" in back.data_position
    own = [f for f in overrides(prepared_data, tmp_path / "run", *RUN, "train.steps=4") if not f.startswith("model.")]
    own += ["parallel.tensor_model_parallel_size=1", "parallel.pipeline_model_parallel_size=1"]
    results = launch(2, own, recipe=str(tmp_path / "run" / "recipe.yaml"))
    assert [code for code, _ in results] == [0, 0], results
    lines, original = metrics(tmp_path / "run"), metrics(exported / "run")[2:]
    assert [line["digest"] for line in lines] == [line["digest"] for line in original]
    assert lines[0]["loss"] == pytest.approx(original[0]["loss"], rel=1e-5), "the same weights on the same batch"


def test_other_data_is_refused(exported, prepared_data, other_prepared_data, tmp_path):
    run_ranks(ways, 1, [("from_hf", dict(export_dir=exported / "export", run_dir=tmp_path / "run"))])
    own = overrides(other_prepared_data, tmp_path / "run", *RUN, "train.steps=4", "checkpoint.interval=0")
    ((code, text),) = launch(1, own)
    assert code == 2 and "tokenizer" in text


def test_an_export_that_transformers_saved_again(exported, tmp_path):
    """Its training.json is gone, its weights are in several files: a model, at step 0."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported / "export", trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="100kB")
    AutoTokenizer.from_pretrained(exported / "export").save_pretrained(tmp_path / "again")
    assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
    calls = [
        ("from_hf", dict(export_dir=tmp_path / "again", run_dir=tmp_path / "run")),
        ("to_hf", dict(run_dir=tmp_path / "run", out_dir=tmp_path / "out", check_parity=False, dtype=torch.float32)),
    ]
    ((back, out),) = run_ranks(ways, 1, calls)
    assert back.step == 0 and "in the order of any data.path" in back.data_position
    value = back.recipe.model.value
    assert (value.source, value.target_layers, back.recipe.model.window_pattern) == ("bank", "last_third", "SSSL")
    expected, found = (load_file(folder / "model.safetensors") for folder in (exported / "export", out.out_dir))
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_roundtrip(exported):
    ((done,),) = run_ranks(ways, 1, [("roundtrip", dict(run_dir=exported / "run"))])
    assert (done.step, done.checkpoint.name) == (4, "step_00000004")
    assert done.tensors == len(load_file(exported / "export" / "model.safetensors"))
    assert done.parity.largest_difference < 1e-4 and done.parity.top1_agreement > 0.99 and done.parity.kl < 1e-8


def lossy_roundtrip(rank, world_size, run_dir):
    """A conversion in which one number of one tensor is off by the last bit."""
    from bov_megatron.errors import ConversionError
    from bov_megatron.exchange import from_hf, new_run
    from bov_megatron.exchange.roundtrip import roundtrip

    read = from_hf.ExportedWeights.__call__

    def lossy(self, name):
        tensor = read(self, name)
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor[0, 0] = torch.nextafter(tensor[0, 0], torch.tensor(torch.inf))
        return tensor

    write = new_run.write_run
    from_hf.write_run = lambda *args, **options: write(args[0], args[1], lambda n: lossy(args[2], n), **options)
    try:
        return roundtrip(run_dir)
    except ConversionError as error:
        return str(error)


def test_roundtrip_finds_a_bit(exported):
    (message,) = run_ranks(lossy_roundtrip, 1, exported / "run")
    assert "differ in 1 tensors: model.layers.1.mlp.up_proj.weight" in message


def test_a_full_disk_leaves_no_run(exported, small_disk):
    fill(small_disk, leave=250_000)  # of 370,000 bytes of weights
    ((message,),) = run_ranks(ways, 1, [("from_hf", dict(export_dir=exported / "export", run_dir=small_disk / "run"))])
    assert isinstance(message, str) and "No space left on device" in message, message
    assert [path.name for path in small_disk.iterdir()] == ["filler"]


def test_bad_input(exported, tmp_path):
    calls, expected = [], []

    def case(name, message, spoil, run_dir=None):
        folder = tmp_path / name
        shutil.copytree(exported / "export", folder)
        spoil(folder)
        calls.append(("from_hf", dict(export_dir=folder, run_dir=run_dir or tmp_path / f"{name}-run")))
        expected.append(message)

    def config(**changes):
        return lambda folder: edit(folder / "config.json", changes)

    def training(**changes):
        return lambda folder: edit(folder / "training.json", changes)

    def weights(change):
        def spoil(folder):
            tensors = load_file(folder / "model.safetensors")
            change(tensors)
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

        return spoil

    def smaller(folder):
        config(vocab_size=100)(folder)
        weights(lambda tensors: tensors.update({k: v[:100].clone() for k, v in tensors.items() if len(v) == 512}))(
            folder
        )

    def cut(folder):
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    case("no config", "is not an export: it has no config.json", lambda folder: (folder / "config.json").unlink())
    case("another model", "a model of type 'llama', not an export of ours", config(model_type="llama"))
    case("cut off", "model.safetensors is damaged or incomplete", cut)
    case("no weights", "is missing: the export is incomplete", lambda folder: (folder / "model.safetensors").unlink())
    case("a tensor missing", "missing: lm_head.weight", weights(lambda tensors: tensors.pop("lm_head.weight")))
    case("another shape", "model.smear.scale is [2], expected [1]",
         weights(lambda tensors: tensors.update({"model.smear.scale": torch.zeros(2)})))  # fmt: skip
    case("other windows", "has windows=[1, 2, 3, 4], but the recipe made of", config(windows=[1, 2, 3, 4]))
    case("rounded tables", "has value tables in int8, which no longer are those of the run", config(table_dtype="int8"))
    case("another vocabulary", "its tokenizer has 512 ids, its model 100", smaller)
    case("half a recipe", "training.json", training(recipe={"model": {"num_layer": 3}}))
    case("a full run folder", "is not empty", lambda folder: None, run_dir=exported / "run")
    left = sorted(tmp_path.iterdir())
    (found,) = run_ranks(ways, 1, calls)
    for message, text in zip(expected, found, strict=True):
        assert isinstance(text, str) and message in text and "\n" not in text, text
    assert sorted(tmp_path.iterdir()) == left


def edit(path: Path, changes: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
