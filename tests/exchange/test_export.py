"""An exported folder is complete, loads without this package, and computes the same."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from bov_megatron.errors import ExportError
from bov_megatron.exchange import export as export_module
from bov_megatron.exchange.export import export
from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM
from bov_megatron.recipe import ModelConfig, Recipe, ValueConfig
from tests.support.small_disk import fill
from tests.support.small_models import VARIANTS, random_ids, small_model, small_model_config
from tests.support.tiny_tokenizer import train_tiny_tokenizer

VOCAB = 300


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory):
    return train_tiny_tokenizer(tmp_path_factory.mktemp("tokenizer"), VOCAB)


def bank_model():
    value = VARIANTS["bank"]
    return small_model_config(value, vocab_size=VOCAB), small_model(value, windows=None, vocab_size=VOCAB)


def test_loads_and_generates_without_this_package(tmp_path, tokenizer_dir):
    config, model = bank_model()
    # The folder's name is no Python identifier, though its files are imported as modules.
    out = export(model.state_dict(), config, tokenizer_dir, tmp_path / "run.1 final")
    ids = random_ids(2, 12, vocab=VOCAB)
    with torch.no_grad():
        logits = model(ids).logits
    generated = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    save_file({"ids": ids, "logits": logits, "generated": generated}, tmp_path / "expected.safetensors")
    script = """
    import sys, torch
    if torch.version.cuda is None and torch.version.hip is None:  # a torchvision for CUDA beside a torch without it
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline
    expected = load_file("expected.safetensors")
    folder = sys.argv[1]
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token == "<|bos|>" and model.generation_config.eos_token_id == tokenizer.bos_token_id
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).target_layers == [1, 2, 3]
    with torch.no_grad():
        torch.testing.assert_close(model(expected["ids"]).logits, expected["logits"])
    found = model.generate(expected["ids"], max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(found, expected["generated"])
    model.generate(**tokenizer(tokenizer.bos_token + "def", return_tensors="pt"), max_new_tokens=2)
    texts = [tokenizer.bos_token + "def", tokenizer.bos_token + "import argparse"]
    options = dict(max_new_tokens=4, do_sample=False)
    together = model.generate(**tokenizer(texts, return_tensors="pt", padding=True), **options)
    for text, row in zip(texts, together):
        alone = model.generate(**tokenizer(text, return_tensors="pt"), **options)[0]
        assert row.tolist()[-4:] == alone.tolist()[-4:], "padded on the right"
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    for text, row, [found] in zip(texts, together, generator(texts, return_full_text=False, **options)):
        assert found["generated_text"] == tokenizer.decode(row[-4:], skip_special_tokens=True)
    devices = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.smear": "cpu"}
    devices |= {f"model.layers.{layer}": "disk" if layer in (0, 2) else "cpu" for layer in range(4)}
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, device_map=devices, offload_folder="offload")
    assert offloaded.model.layers[2].self_attn.q_proj.weight.is_meta
    with torch.no_grad():
        torch.testing.assert_close(offloaded(expected["ids"]).logits, expected["logits"])
    assert torch.equal(offloaded.generate(expected["ids"], eos_token_id=None, max_new_tokens=6, do_sample=False),
                       expected["generated"])
    model.save_pretrained("again")
    again = AutoModelForCausalLM.from_pretrained("again", trust_remote_code=True)
    assert torch.equal(again(expected["ids"]).logits, model(expected["ids"]).logits)
    assert "bov_megatron" not in sys.modules
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    # This transformers, and not the folder that this package is in.
    environment["PYTHONPATH"] = str(Path(transformers.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(out)],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def test_an_export_without_facts_of_its_value_source_loads(tmp_path):
    """As exports were before their configuration carried them."""
    config, model = bank_model()
    path = export(model.state_dict(), config, None, tmp_path / "out") / "config.json"
    values = json.loads(path.read_text())
    facts = values.pop("value_source_facts")
    assert facts == {"projects": False, "reads": "table", "coefficients": 1, "gated": False}
    path.write_text(json.dumps(values))
    ids = random_ids(2, 12, vocab=VOCAB)
    with torch.no_grad():
        assert torch.equal(type(model).from_pretrained(path.parent)(ids).logits, model(ids).logits)


def test_streamed_shards_hold_every_weight_once(tmp_path):
    config, model = bank_model()
    state = model.state_dict()
    out = export(iter(state.items()), config, None, tmp_path / "out", max_shard_bytes=20_000)
    shards = [load_file(file) for file in sorted(out.glob("*.safetensors"))]
    assert len(shards) > 3 and sum(map(len, shards)) == len(state)
    # A shard is larger than asked only where it holds a single tensor.
    sizes = [(sum(t.nbytes for t in shard.values()), len(shard)) for shard in shards]
    assert all(size <= 20_000 or count == 1 for size, count in sizes)
    loaded = BovForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


def test_weights_are_stored_as_asked_and_the_card_holds_the_recipe(tmp_path):
    config, model = bank_model()
    recipe = Recipe(name="tiny", model=config).to_dict()
    out = export(model.state_dict(), config, None, tmp_path / "out", dtype=torch.bfloat16, recipe=recipe)
    weights = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    written = json.loads((out / "config.json").read_text())
    assert written["auto_map"]["AutoModelForCausalLM"] == "modeling_bov.BovForCausalLM"
    assert written.get("dtype", written.get("torch_dtype")) == "bfloat16"
    card = (out / "README.md").read_text()
    assert "# tiny" in card and "sequence_length: 64" in card and "`bank` in layers 1, 2, 3" in card


def test_files_are_as_readable_as_the_umask_says(tmp_path, tokenizer_dir):
    config, model = bank_model()
    before = os.umask(0o027)
    try:
        out = export(model.state_dict(), config, tokenizer_dir, tmp_path / "out", max_shard_bytes=20_000)
    finally:
        os.umask(before)
    assert len(list(out.glob("*.safetensors"))) > 3
    assert {file.stat().st_mode & 0o777 for file in out.iterdir()} == {0o640}


@pytest.mark.parametrize("as_iterator", [False, True])
def test_weights_that_do_not_fit_are_named(tmp_path, as_iterator):
    config, model = bank_model()
    state = model.state_dict()
    state["extra"] = torch.zeros(1)
    del state["lm_head.weight"]
    state["model.embed_tokens.weight"] = torch.zeros(VOCAB + 4, 32)
    with pytest.raises(ExportError) as error:
        export(iter(state.items()) if as_iterator else state, config, None, tmp_path / "out")
    for part in ("missing: lm_head.weight", "unexpected: extra", "model.embed_tokens.weight is [304, 32], expected"):
        assert part in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    config, model = bank_model()
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="not empty; choose another folder, or pass overwrite"):
        export(model.state_dict(), config, None, out)

    def crash(*arguments):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(export_module, "model_card", crash)
        with pytest.raises(OSError, match="disk full"):
            export(model.state_dict(), config, None, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and (out / "mine.txt").read_text() == "mine"
    export(model.state_dict(), config, None, out, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not (out / "mine.txt").exists()


def test_a_tokenizer_that_does_not_fit_is_refused(tmp_path, tokenizer_dir):
    config, model = small_model_config(VARIANTS["bank"]), small_model(VARIANTS["bank"], windows=None)
    with pytest.raises(ExportError, match="has 300 ids, but model.vocab_size is 61"):
        export(model.state_dict(), config, tokenizer_dir, tmp_path / "out")
    with pytest.raises(ExportError, match="no tokenizer.json there"):
        export(model.state_dict(), config, tmp_path, tmp_path / "out")


def test_shipped_files_import_nothing_of_this_package():
    allowed = {"torch", "transformers", "safetensors", "", *sys.stdlib_module_names}
    for name in export_module.SHIPPED_FILES:
        text = (export_module.Path(export_module.__file__).parent / "hf" / name).read_text()
        imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
        assert imports and all(line.split()[1].split(".")[0] in allowed for line in imports), imports


def test_full_sizes_have_the_published_counts():
    """The exported 135M bank model, on the meta device: names and sizes as in arXiv 2606.02780."""
    with torch.device("meta"):
        model = BovForCausalLM(export_module.hf_config(ModelConfig(value=ValueConfig(source="bank"))))
    assert sum(p.numel() for p in model.parameters()) == 135_266_333 - 4 * 768**2 + 100_663_296


@pytest.mark.parametrize("spare", [-100_000, 9_000], ids=["before writing", "after the weights"])
def test_a_full_disk_leaves_no_export(tokenizer_dir, small_disk, spare):
    config, model = bank_model()
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    fill(small_disk, leave=size + spare)
    with pytest.raises(
        ExportError, match=r"could not write \S+/out: No space .*; about 0.\d MiB are needed and 0.\d MiB"
    ):
        export(model.state_dict(), config, tokenizer_dir, small_disk / "out")
    assert [path.name for path in small_disk.iterdir()] == ["filler"]
