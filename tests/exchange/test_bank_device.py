"""Value tables on the CPU or in their file: same tokens and logits, without their memory. Also on transformers 5."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bov_megatron.exchange.export import export, quantize_rows, rounded_table
from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM, BovModel, BovTable
from bov_megatron.recipe import ValueConfig
from tests.support.small_models import VARIANTS, random_ids, small_model, small_model_config

PAD = 0
WITH_TABLE = [name for name, value in VARIANTS.items() if value.facts.reads == "table"]
PLACES = ("cpu", "mmap")


def saved(variant, folder):
    """The model of a variant and the folder it is saved in, in several files."""
    model = small_model(VARIANTS[variant])
    model.save_pretrained(folder, max_shard_size="20kB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return model, folder


def left_padded():
    mask = torch.stack([(torch.arange(9) >= 9 - length).long() for length in (9, 4, 1)])
    return random_ids(3, 9).masked_fill(mask == 0, PAD), mask


@pytest.mark.parametrize("bank_device", PLACES)
@pytest.mark.parametrize("variant", WITH_TABLE)
@torch.no_grad()
def test_the_same_logits_and_tokens(tmp_path, variant, bank_device):
    expected, folder = saved(variant, tmp_path / "saved")
    model, info = BovForCausalLM.from_pretrained(folder, bank_device=bank_device, output_loading_info=True)
    assert not any(info.values()), info
    assert model.tables() and not any("value_table" in name for name, _ in model.named_parameters())
    ids, mask = left_padded()
    assert torch.equal(model(ids, attention_mask=mask).logits, expected(ids, attention_mask=mask).logits)
    for options in (
        {},
        {"use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
    ):
        options |= dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=PAD)
        assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


@pytest.mark.parametrize("bank_device", PLACES)
def test_the_same_samples_guesses_and_conversation(tmp_path, bank_device):
    """Where the cache is repeated, cropped, and used again."""
    expected, folder = saved("bank_every", tmp_path / "saved")
    model = BovForCausalLM.from_pretrained(folder, bank_device=bank_device)
    assistant, ids = small_model(VARIANTS["projection"]), random_ids(1, 9)
    found: dict[BovForCausalLM, list] = {expected: [], model: []}
    for each, tokens in found.items():
        for options in (
            {"do_sample": True, "num_return_sequences": 3, "top_k": 0},
            {"do_sample": False, "assistant_model": assistant},
            {"do_sample": False, "prompt_lookup_num_tokens": 3, "eos_token_id": 60},
        ):
            torch.manual_seed(5)
            tokens.append(each.generate(ids, max_new_tokens=12, pad_token_id=PAD, **options))
        first = each.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD, return_dict_in_generate=True)
        longer = torch.cat([first.sequences, random_ids(1, 5, seed=3)], 1)
        options = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD)
        tokens.append(each.generate(longer, past_key_values=first.past_key_values, **options))
    assert all(torch.equal(*tokens) for tokens in zip(*found.values(), strict=True))


@pytest.mark.parametrize("bank_device", PLACES)
@torch.no_grad()
def test_bfloat16_and_the_base_model(tmp_path, bank_device):
    """Rows are converted where they are looked up, which is the same as a converted table."""
    expected, folder = saved("gated_shared", tmp_path / "saved")
    ids = random_ids(2, 12)
    model = BovForCausalLM.from_pretrained(folder, bank_device=bank_device, dtype=torch.bfloat16)
    assert torch.equal(model(ids).logits, expected.to(torch.bfloat16)(ids).logits)
    assert torch.equal(model.float()(ids).logits, expected.float()(ids).logits) is False, "tables were rounded as well"
    base = BovModel.from_pretrained(folder, bank_device=bank_device, dtype=torch.bfloat16)
    expected = BovModel.from_pretrained(folder, dtype=torch.bfloat16)
    assert torch.equal(base(ids).last_hidden_state, expected(ids).last_hidden_state)


def test_each_distinct_row_is_looked_up_once_a_step(tmp_path):
    _, folder = saved("bank_every", tmp_path / "saved")
    model = BovForCausalLM.from_pretrained(folder, bank_device="mmap")
    model.config.windows = [64] * 4
    asked = []
    for _, table in model.tables():
        table.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[0].tolist()))
    ids = torch.tensor([[5, 7, 5, 5, 9], [9, 9, 9, 7, 5]])
    model.generate(ids, max_new_tokens=2, do_sample=False, use_cache=False, pad_token_id=PAD, eos_token_id=None)
    assert len(asked) == 2 * 4 and asked[:4] == [[5, 7, 9]] * 4
    assert all(len(set(rows)) == len(rows) for rows in asked)


@pytest.mark.parametrize("variant", ["bank_every", "bank_listed_shared_fixed", "gated_shared"])
@torch.no_grad()
def test_decoding_looks_up_what_the_step_before_did_not_have(tmp_path, variant):
    """At most the new tokens' rows, one a sequence. The cache may be cropped and reordered meanwhile."""
    expected, folder = saved(variant, tmp_path / "saved")
    model = BovForCausalLM.from_pretrained(folder, bank_device="mmap")
    ids, asked = random_ids(2, 24), []
    for _, table in model.tables():
        table.register_forward_pre_hook(lambda module, arguments: asked.append(arguments[0].tolist()))
    reading = len(model.config.target_layers)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    for position in (20, 21, 22):
        asked.clear()
        cache = model(ids[:, position : position + 1], past_key_values=cache, use_cache=True).past_key_values
        assert len(asked) == reading and all(set(rows) <= set(ids[:, position].tolist()) for rows in asked)
    cache.crop(-13)
    cache.reorder_cache(torch.tensor([1, 0]))
    found = model(ids.flip(0)[:, 10:], past_key_values=cache).logits
    torch.testing.assert_close(found, expected(ids.flip(0)).logits[:, 10:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bank_device", PLACES)
def test_saved_again_it_is_the_same(tmp_path, bank_device):
    expected, folder = saved("bank", tmp_path / "saved")
    model = BovForCausalLM.from_pretrained(folder, bank_device=bank_device)
    if bank_device == "mmap":
        with pytest.raises(ValueError, match="holds the value tables that this model reads.*save to another folder"):
            model.save_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    weights = load_file(tmp_path / "again" / "model.safetensors")
    assert weights.keys() == expected.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.state_dict().items())
    assert BovForCausalLM.from_pretrained(tmp_path / "again").config.bank_device == bank_device
    plain = BovForCausalLM.from_pretrained(tmp_path / "again", bank_device=None)
    assert not plain.tables() and torch.equal(plain(random_ids(1, 9)).logits, expected(random_ids(1, 9)).logits)


@pytest.mark.parametrize("variant", ["bank", "gated_shared"])
@torch.no_grad()
def test_with_layers_on_disk(tmp_path, variant):
    expected, folder = saved(variant, tmp_path / "saved")
    devices = {"lm_head": "cpu", "model.embed_tokens": "cpu", "model.smear": "cpu"}
    devices |= {f"model.layers.{layer}": "disk" if layer in (0, 2) else "cpu" for layer in range(4)}
    if "shared" in variant:
        devices["model.value_table"] = "cpu"
    model = BovForCausalLM.from_pretrained(
        folder, bank_device="mmap", device_map=devices, offload_folder=tmp_path / "offload"
    )
    assert model.model.layers[2].self_attn.q_proj.weight.is_meta
    ids = random_ids(2, 12)
    assert torch.equal(model(ids).logits, expected(ids).logits)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    assert torch.equal(model.generate(ids, **options), expected.generate(ids, **options))


def test_the_rest_is_trained_and_the_tables_are_not(tmp_path):
    expected, folder = saved("bank", tmp_path / "saved")
    ids = random_ids(2, 12)
    expected.train()(ids, labels=ids).loss.backward()
    model = BovForCausalLM.from_pretrained(folder, bank_device="cpu").train()
    model(ids, labels=ids).loss.backward()
    gradients = {name: p.grad for name, p in expected.named_parameters() if "value_table" not in name}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name])


def test_what_is_refused(tmp_path):
    expected, folder = saved("bank", tmp_path / "saved")
    with pytest.raises(ValueError, match="bank_device='gpu' is neither"):
        BovForCausalLM.from_pretrained(folder, bank_device="gpu")
    model = BovForCausalLM.from_pretrained(folder, bank_device="mmap")
    with pytest.raises(ValueError, match="only value tables that are parameters can be resized"):
        model.resize_token_embeddings(70)
    with pytest.raises(RuntimeError, match="bank_device='mmap' takes tables from files alone"):
        model.load_state_dict(expected.state_dict())
    with pytest.raises(ValueError, match="from safetensors files, found a state_dict"):
        BovForCausalLM.from_pretrained(None, config=model.config, state_dict=expected.state_dict())
    model.config.bank_device = "cpu"
    fresh = BovForCausalLM(model.config)
    with pytest.raises(ValueError, match="has no rows yet: load the model with from_pretrained"):
        fresh(random_ids(1, 4))
    fresh.load_state_dict(expected.state_dict())
    assert torch.equal(fresh.eval()(random_ids(1, 4)).logits, expected(random_ids(1, 4)).logits)


def test_to_moves_all_but_the_tables():
    table = BovTable(3, 2, "cpu", is_int8=False)
    table.set_outside("weight", torch.ones(3, 2))
    assert table.to("meta")(torch.tensor([2, 0]), torch.zeros(1)).tolist() == [[1, 1], [1, 1]]


@pytest.mark.parametrize("variant", ["bank", "gated_shared"])
@pytest.mark.parametrize("tables", ["bf16", "int8"])
@torch.no_grad()
def test_rounded_tables(tmp_path, variant, tables):
    """Numbers are within half a step of their row's scale, and the model is that of the rounded tables, anywhere."""
    model = small_model(VARIANTS[variant], windows=None)
    config = small_model_config(VARIANTS[variant])
    out = export(model.state_dict(), config, None, tmp_path / "out", tables=tables, max_shard_bytes=20_000)
    for name, tensor in model.state_dict().items():
        if "value_table" in name:
            step = 2**-8 * tensor.abs() if tables == "bf16" else 0.51 * tensor.abs().amax(1, keepdim=True) / 127
            rounded = rounded_table(tensor, tables)
            assert not torch.equal(rounded, tensor) and bool(((rounded - tensor).abs() <= step).all())
            tensor.copy_(rounded)
    ids, mask = left_padded()
    expected = model(ids, attention_mask=mask).logits
    for bank_device in (None, *PLACES):
        loaded, info = BovForCausalLM.from_pretrained(out, bank_device=bank_device, output_loading_info=True)
        assert not any(info.values()), info
        torch.testing.assert_close(loaded(ids, attention_mask=mask).logits, expected, rtol=1e-6, atol=1e-6)
        loaded.save_pretrained(tmp_path / f"again-{bank_device}")
        again = BovForCausalLM.from_pretrained(tmp_path / f"again-{bank_device}", bank_device="mmap")
        assert torch.equal(again(ids, attention_mask=mask).logits, loaded(ids, attention_mask=mask).logits)
        if tables == "int8":
            kinds = {
                tensor.dtype for name, tensor in loaded.state_dict().items() if name.endswith("value_table.weight")
            }
            assert kinds == {torch.int8}
        rounded = BovForCausalLM.from_pretrained(out, bank_device=bank_device, dtype=torch.bfloat16)
        torch.testing.assert_close(rounded(ids, attention_mask=mask).logits, expected, rtol=0.1, atol=0.3)


def test_a_row_of_zeros_stays():
    rows, scales = quantize_rows(torch.tensor([[0.0, 0.0], [-127.0, 1.0]]))
    assert (rows * scales).tolist() == [[0, 0], [-127, 1]]


LARGE = dict(vocab_size=10_000, head_dim=320)  # 4 tables of 25.6 MB, in fp32; all other weights are 4 MB


RESIDENT = '''
import sys, torch
from transformers import AutoModelForCausalLM

def resident():
    """Bytes of memory of its own, and of weight files that are mapped."""
    lines = open("/proc/self/status").read().splitlines()
    found, is_weights = sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")), False
    for line in open("/proc/self/smaps"):
        if not line.split()[0].endswith(":"):
            is_weights = ".safetensors" in line
        found += int(line.split()[1]) if is_weights and line.startswith("Rss:") else 0
    return found * 1024

def generate(folder, **options):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **options)
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    return model, model.generate(torch.arange(4)[None], **options)[0].tolist()

small, large = sys.argv[1:]
kept = [generate(small)]  # imports, and whatever a first generation keeps
for bank_device in ("mmap", "cpu"):
    before = resident()
    model, found = generate(large, bank_device=bank_device)
    kept.append(model)
    print(resident() - before, *found)
'''


def test_resident_memory(tmp_path):
    """Of a process that loads a model and generates: it has the tables in memory with "cpu" and not with "mmap"."""
    value = ValueConfig(source="bank", target_layers="every")
    large = small_model(value, windows=None, **LARGE)
    folders = []
    for name, fields, model in (("small", {}, small_model(value, windows=None)), ("large", LARGE, large)):
        config = small_model_config(value, **fields)
        folders.append(export(model.state_dict(), config, None, tmp_path / name))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(transformers.__file__).parents[1])}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    done = subprocess.run(
        [sys.executable, "-c", RESIDENT, *folders], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    options = dict(max_new_tokens=4, do_sample=False, pad_token_id=PAD, eos_token_id=None)
    expected = large.generate(torch.arange(4)[None], **options)[0]
    tables = sum(tensor.nbytes for name, tensor in large.state_dict().items() if "value_table" in name)
    memory = {}
    for bank_device, line in zip(("mmap", "cpu"), done.stdout.splitlines(), strict=True):
        memory[bank_device], *found = map(int, line.split())
        assert found == expected.tolist()
    print(f"tables {tables / 1e6:.0f} MB, resident: {memory}")
    # A page that is looked up may bring those around it: up to 2 MB, of each of five places in each of four tables.
    assert memory["cpu"] > tables and memory["mmap"] < tables / 2
