"""Checkpoints of the paper's code become runs: the same logits at any layout, the same bits on the way back."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.golden_files import GOLDEN_NAMES, load_golden
from tests.support.nanochat import (
    Calls,
    save_checkpoint,
    save_golden_checkpoint,
    save_tokenizer,
    train_tokenizer,
)
from tests.support.results import same_as, tensors
from tests.support.runs import launch, metrics, overrides
from tests.support.tiny_tokenizer import STDLIB

TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
ONE_STAGE = ("bov_shared", "x0_wv", "v1")
"""Golden models that cannot be pipelined: later stages would need a table, or values, of the first."""
LAYOUTS = {name: (TP2,) if name in ONE_STAGE else (TP2, PP2) for name in GOLDEN_NAMES}
"""Of four ranks."""
SIZES = {"sequence_len": 64, "vocab_size": 100, "n_layer": 3, "n_head": 2, "n_kv_head": 1, "n_embd": 32}


def import_all(rank, world_size, folder, names):
    from bov_megatron.exchange.from_nanochat import from_nanochat

    for name in names:
        from_nanochat(folder / name / "d6", folder / name / "run")


def logits_at_a_layout(rank, world_size, folder, layouts):
    """Of each model, at the golden positions; then saved again by these ranks, as step 41."""
    from bov_megatron import checkpoint
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups
    from bov_megatron.recipe import load_recipe

    found = {}
    for name, layout in layouts.items():
        run, golden = folder / name / "run", load_golden(name)
        recipe = load_recipe(run / "recipe.yaml", layout)
        process_groups.initialize(recipe, rank, world_size, init_method=f"file://{folder / name}/rendezvous")
        engine = MegatronEngine(recipe, with_optimizer=False)
        loaded = checkpoint.load(engine, run / "checkpoints" / "step_00000040")
        lengths = [torch.full((2,), int(position) + 1) for position in golden.positions]
        found[name] = torch.stack([engine.next_logits(golden.tokens, length) for length in lengths], dim=1)
        checkpoint.save(engine, run, loaded.step + 1, keep_last=2, extra=loaded.extra)
        process_groups.shutdown()
    return found


def export_and_return(rank, world_size, folder, names):
    """Weights of the run made of each model's export, by canonical name."""
    from bov_megatron.exchange.convert import stored_tensors, to_hf
    from bov_megatron.exchange.from_hf import from_hf

    weights = {}
    for name in names:
        to_hf(folder / name / "run", folder / name / "export", check_parity=False)
        back = from_hf(folder / name / "export", folder / name / "back")
        weights[name] = dict(stored_tensors(back.checkpoint))
    return weights


@pytest.fixture(scope="module")
def golden_ways(tmp_path_factory):
    """Every golden model through a run, TP 2 × PP 2, an export and back: (folder, logits at that layout, weights)."""
    folder = tmp_path_factory.mktemp("golden")
    for name in GOLDEN_NAMES:
        save_golden_checkpoint(folder / name / "d6", name)
    run_ranks(import_all, 1, folder, GOLDEN_NAMES)
    logits = run_ranks(logits_at_a_layout, 4, folder, LAYOUTS)
    (weights,) = run_ranks(export_and_return, 1, folder, GOLDEN_NAMES)
    return folder, logits, weights


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_logits_at_tp2_pp2_and_in_transformers(golden_ways, name):
    from transformers import AutoModelForCausalLM

    folder, at_layout, _ = golden_ways
    golden = load_golden(name)
    for logits in at_layout:
        torch.testing.assert_close(logits[name], golden.logits, rtol=0, atol=1e-5)
    exported = AutoModelForCausalLM.from_pretrained(folder / name / "export", trust_remote_code=True).eval()
    with torch.no_grad():
        found = exported(golden.tokens).logits[:, golden.positions]
    torch.testing.assert_close(found, golden.logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_golden_weights_come_back_bit_for_bit(golden_ways, name):
    expected, found = load_golden(name).weights, golden_ways[2][name]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key].view(torch.int32), expected[key].view(torch.int32)) for key in expected)


def test_step_and_place_in_the_data_are_stated(golden_ways):
    folder, _, _ = golden_ways
    origin = json.loads((folder / "bov" / "run" / "origin.json").read_text())
    assert origin["step"] == 40 and origin["dataloader_state_dict"] == {"pq_idx": 3, "rg_idx": 17, "epoch": 1}
    assert origin["nanochat"].endswith("bov/d6/model_000040.pt")


def made_up(flags=(), names=(), **sizes):
    """Weights by the reference's names that differ from each other, and the configuration's sizes."""
    sizes = {**SIZES, **sizes}
    vocab, d, kv = sizes["vocab_size"], sizes["n_embd"], sizes["n_kv_head"] * sizes["n_embd"] // sizes["n_head"]
    shapes = {"transformer.wte.weight": (vocab, d), "lm_head.weight": (vocab, d)}
    shapes |= {"smear_gate.weight": (1, 24), "smear_lambda": (1,)}
    for i in range(sizes["n_layer"]):
        layer = f"transformer.h.{i}."
        shapes |= {f"{layer}attn.c_q.weight": (d, d), f"{layer}attn.c_proj.weight": (d, d)}
        shapes |= {f"{layer}attn.c_k.weight": (kv, d), f"{layer}attn.c_v.weight": (kv, d)}
        shapes |= {f"{layer}mlp.c_fc.weight": (4 * d, d), f"{layer}mlp.c_proj.weight": (d, 4 * d)}
    generator = torch.Generator().manual_seed(0)
    shapes |= {name: (vocab, kv) if name.startswith("value_embeds") else (1,) for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, sizes, flags


def layers(numbers, *names):
    return [f"transformer.h.{i}.attn.{name}" for i in numbers for name in names]


SUM = ("alpha_v", "beta_v")
# The reference's flags and tensors of what no golden file has -> source, target layers, coefficient.
OTHERS = {
    "scaled": (("v_scale_learn", "learn_init_coeffs"), layers([2], "gamma_v"), ("scaled_projection", "last_third")),
    "v1_sum": (("add_init_v", "learn_init_coeffs"), layers([2], *SUM), ("projection_plus_first_layer", "last_third")),
    "x0_sum": (
        ("add_init_res_v", "learn_init_coeffs", "on_every_layer"),
        layers([0, 1, 2], *SUM),
        ("projection_plus_embedding", "every"),
    ),
    "bank_sum": (
        ("add_init_value_emb", "learn_init_coeffs", "on_second_half_layers"),
        [*layers([1, 2], *SUM), "value_embeds.1.weight", "value_embeds.2.weight"],
        ("projection_plus_bank", "second_half"),
    ),
    "bank_sum_fixed": (
        ("add_init_value_emb", "on_last_two_thirds_layers"),
        ["value_embeds.1.weight", "value_embeds.2.weight"],
        ("projection_plus_bank", "last_two_thirds"),
    ),
    "v1_everywhere": (("v_from_v1", "on_every_layer"), [], ("first_layer", "every")),
}
COEFFICIENTS = {"alpha_v": "projection_coefficient", "beta_v": "source_coefficient", "gamma_v": "source_coefficient"}


def import_others(rank, world_size, folder):
    """(section model.value, precision, weights of the checkpoint) of each of OTHERS."""
    from bov_megatron.exchange.convert import stored_tensors
    from bov_megatron.exchange.from_nanochat import from_nanochat

    found = {}
    for name in OTHERS:
        run = from_nanochat(folder / name, folder / f"{name}-run")
        found[name] = run.recipe.model.value, run.recipe.train.precision, dict(stored_tensors(run.checkpoint))
    return found


def test_sources_without_a_golden_file(tmp_path):
    for name, (flags, names, _) in OTHERS.items():
        weights, sizes, _ = made_up(flags, names)
        weights["transformer.wte.weight"] = weights["transformer.wte.weight"].bfloat16()  # as on a GPU
        compiled = {f"_orig_mod.{key}": tensor for key, tensor in weights.items()}
        save_checkpoint(tmp_path / name, 7, compiled if name == "scaled" else weights, sizes, flags)
    (found,) = run_ranks(import_others, 1, tmp_path)
    for name, (flags, names, (source, targets)) in OTHERS.items():
        value, precision, ours = found[name]
        assert (value.source, value.target_layers, precision) == (source, targets, "bf16")
        assert value.coefficient == ("learned" if "learn_init_coeffs" in flags else "fixed")
        theirs = made_up(flags, names)[0]
        assert torch.equal(ours["model.embed_tokens.weight"], theirs["transformer.wte.weight"].bfloat16().float())
        assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"]), "padding is cut off"
        assert torch.equal(ours["model.layers.1.mlp.down_proj.weight"], theirs["transformer.h.1.mlp.c_proj.weight"])
        for key in names:
            if key.startswith("value_embeds"):
                mine = f"model.layers.{key.split('.')[1]}.self_attn.value_table.weight"
            else:
                *_, layer, _, coefficient = key.split(".")
                mine = f"model.layers.{layer}.self_attn.{COEFFICIENTS[coefficient]}"
            assert torch.equal(ours[mine], theirs[key]), key


VARIANTS = {
    "gpt_base": ("projection", "last_third", "learned", "per_layer"),
    "gpt_base_v_from_value_emb": ("bank", "last_third", "fixed", "per_layer"),
    "gpt_base_v_from_value_emb_learn_shared": ("bank", "last_third", "learned", "shared"),
    "gpt_base_v_from_value_emb_learn_last_two_thirds": ("bank", "last_two_thirds", "learned", "per_layer"),
    "gpt_base_v_from_x0_learn_every2": ("embedding_projection", "every_second", "learned", "per_layer"),
    "gpt_base_v_from_v1_every_layer": ("first_layer", "every", "fixed", "per_layer"),
    "gpt_base_add_init_value_emb_nanogpt_every2": ("gated_value_embedding", "every_second", "learned", "per_layer"),
    "gpt_base_add_init_value_emb_learn_every2": ("projection_plus_bank", "every_second", "learned", "per_layer"),
    "gpt_base_add_init_res_v": ("projection_plus_embedding", "last_third", "fixed", "per_layer"),
    "gpt_base_v_scale_learn": ("scaled_projection", "last_third", "learned", "per_layer"),
}


def values_of_names(rank, world_size):
    from bov_megatron.exchange.from_nanochat import _value
    from bov_megatron.recipe import ValueConfig

    return {name: ValueConfig(**_value(name, dict(SIZES))) for name in VARIANTS}


def test_a_variant_is_known_by_its_name_alone():
    (found,) = run_ranks(values_of_names, 1)
    for name, expected in VARIANTS.items():
        value = found[name]
        assert (value.source, value.target_layers, value.coefficient, value.table) == expected, name


def refusals(rank, world_size, cases):
    """Messages, by case, of `from_nanochat(**arguments)`; what it leaves is listed with them."""
    from bov_megatron.errors import ConversionError
    from bov_megatron.exchange.from_nanochat import from_nanochat

    messages = {}
    for case, arguments in cases.items():
        before = sorted(Path(arguments["run_dir"]).parent.rglob("*"))
        try:
            from_nanochat(**arguments)
            messages[case] = "nothing"
        except ConversionError as error:
            messages[case] = str(error)
        left = set(Path(arguments["run_dir"]).parent.rglob("*")) - set(before)
        assert not left, (case, left)
    return messages


def test_bad_input(tmp_path):
    expected, cases = {}, {}

    def case(name, message, spoil=None, flags=(), names=(), tokenizer=None, step=None, sizes=None, **meta):
        weights, right, _ = made_up(flags, names)
        folder = save_checkpoint(tmp_path / name / "d3", 7, weights, {**right, **(sizes or {})}, flags, **meta)
        if spoil:
            spoil(folder)
        (tmp_path / name / "made").mkdir()
        run_dir = tmp_path / name / "made" / "run"
        cases[name] = dict(checkpoint_dir=folder, run_dir=run_dir, tokenizer_dir=tokenizer, step=step)
        expected[name] = message

    def change(**tensors):
        def spoil(folder):
            weights = torch.load(folder / "model_000007.pt")
            for name, tensor in tensors.items():
                name = name.replace("__", ".")
                weights.pop(name, None)
                weights |= {} if tensor is None else {name: tensor}
            torch.save(weights, folder / "model_000007.pt")

        return spoil

    def rewrite(name, content):
        return lambda folder: (folder / name).write_bytes(content)

    encoding = train_tokenizer([(STDLIB / "heapq.py").read_text()], 300)
    other = save_tokenizer(tmp_path / "tokenizer", encoding)
    case("no folder", "can't be read: No such file or directory", spoil=shutil.rmtree)
    case("no weights", "holds no model_*.pt", spoil=lambda folder: (folder / "model_000007.pt").unlink())
    case("another step", "has no weights of step 8; it has 7", step=8)
    case("no metadata", "meta_000007.json is missing", spoil=lambda folder: (folder / "meta_000007.json").unlink())
    case("half metadata", "meta_000007.json can't be read", spoil=rewrite("meta_000007.json", b'{"step": 7, "mod'))
    case("no configuration", "has no model_config", model_config=None)
    half = {key: value for key, value in SIZES.items() if key not in ("n_embd", "sequence_len")}
    case("half configuration", "model_config lacks n_embd, sequence_len", model_config=half)
    case("sizes that don't fit", "model.num_attention_heads=3", sizes={"n_head": 3, "n_kv_head": 3})
    case("cut off", "is damaged, or was not saved by nanochat", spoil=lambda folder: truncate(folder))
    call = Calls(os.mkdir, str(tmp_path / "ran"))
    case("a call", "was not loaded: it asks for posix.mkdir",
         spoil=lambda folder: torch.save({"a": call}, folder / "model_000007.pt"))  # fmt: skip
    case("a list", "is not a model's state dict", spoil=lambda folder: torch.save([1], folder / "model_000007.pt"))
    case("a tensor missing", "transformer.h.1.attn.c_k.weight is missing",
         spoil=change(transformer__h__1__attn__c_k__weight=None))  # fmt: skip
    case("another shape", "lm_head.weight is [90, 32], expected [128, 32]",
         spoil=change(lm_head__weight=torch.zeros(90, 32)))  # fmt: skip
    case("whole numbers", "smear_lambda is of int64", spoil=change(smear_lambda=torch.zeros(1, dtype=torch.int64)))
    case("an unknown tensor", "resid_lambdas is unknown", model_type=None, spoil=change(resid_lambdas=torch.ones(3)))
    case("a table too few", "value_embeds.2.weight is missing", flags=("v_from_value_emb",))
    case("another model", "model_type is 'gpt', which this project has no model for", model_type="gpt")
    case("a variant", "model_type is 'gpt_base_add_init_qkv_learn'", model_type="gpt_base_add_init_qkv_learn")
    case("a flag", "the checkpoint's model has add_init_res, v_exclude_self, which this project's models lack",
         flags=("v_exclude_self", "add_init_res"))  # fmt: skip
    case("a flag of later", "has rotary_twist", model_config={**SIZES, "rotary_twist": 0.5})
    case("two sources", "several value sources at once", flags=("v_from_x0", "v_from_v1"))
    case("another tokenizer", "it has 300 ids, but the checkpoint's model_config.vocab_size is 100", tokenizer=other)
    case("no tokenizer", "has neither tokenizer.pkl nor a tokenizer.json", tokenizer=tmp_path)
    case("a full run folder", "is not empty")
    (cases["a full run folder"]["run_dir"] / "mine").mkdir(parents=True)
    (found,) = run_ranks(refusals, 1, cases)
    for name, message in expected.items():
        assert message in found[name], name
        assert "\n" not in found[name], name
    assert not (tmp_path / "ran").exists()


def truncate(folder):
    path = folder / "model_000007.pt"
    path.write_bytes(path.read_bytes()[:-2000])


STEP = 6
SHAPE = (
    *("optimizer.warmup_steps=4", "optimizer.warmdown_ratio=0.0", "train.steps=9"),
    *("checkpoint.interval=1", "validation.interval=0"),
)


@pytest.fixture(scope="module")
def imported(prepared_data, tmp_path_factory):
    """A run at step 6 of a made-up checkpoint with a bank, and the tokenizer of the data."""
    folder = tmp_path_factory.mktemp("imported")
    flags = ("v_from_value_emb", "learn_init_coeffs", "on_second_half_layers")
    sizes = dict(sequence_len=256, vocab_size=512, n_layer=4, n_head=4, n_kv_head=2)
    names = ["value_embeds.2.weight", "value_embeds.3.weight", *layers([2, 3], "gamma_v")]
    weights, sizes, _ = made_up(flags, names, **sizes)
    weights = {name: 0.1 * tensor for name, tensor in weights.items()}
    save_checkpoint(folder / "d4", STEP, weights, sizes, flags)
    arguments = dict(checkpoint_dir=folder / "d4", run_dir=folder / "run", tokenizer_dir=prepared_data.tokenizer)
    run_ranks(import_one, 1, arguments)
    return folder / "run"


def import_one(rank, world_size, arguments):
    from bov_megatron.exchange.from_nanochat import from_nanochat

    return str(from_nanochat(**arguments))


def go_on(imported, folder, data, world_size, *changes):
    """Train a copy of the imported run to step 9, by its own recipe; its lines of metrics."""
    shutil.copytree(imported, folder)
    own = [field for field in overrides(data, folder, *SHAPE, *changes) if not field.startswith("model.")]
    results = launch(world_size, own, recipe=str(folder / "recipe.yaml"))
    assert [code for code, _ in results] == [0] * world_size, "".join(text for _, text in results)
    assert "resuming after step 6" in results[0][1]
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [7, 8, 9] and all(line["updated"] for line in lines)
    return lines


@pytest.fixture(scope="module")
def one_rank(imported, prepared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("went-on") / "run"
    return folder, go_on(imported, folder, prepared_data, 1, "optimizer.name=adamw")


WAYS_ON = {
    "tp2-pp2": (4, TP2, PP2),
    "deepspeed-zero2": (2, "engine=deepspeed", "deepspeed.zero_stage=2"),
    "deepspeed-zero3": (2, "engine=deepspeed", "deepspeed.zero_stage=3"),
}


@pytest.mark.parametrize("way", WAYS_ON)
def test_it_trains_on_at_another_layout_and_with_deepspeed(imported, one_rank, prepared_data, tmp_path, way):
    world_size, *changes = WAYS_ON[way]
    lines = go_on(imported, tmp_path / "run", prepared_data, world_size, "optimizer.name=adamw", *changes)
    for line, expected in zip(lines, one_rank[1], strict=True):
        assert line["digest"] == expected["digest"]
        for key in ("loss", "gradient_norm", "learning_rate/matrix"):
            assert line[key] == pytest.approx(expected[key], rel=1e-3), key


def test_it_trains_on_with_muon(imported, prepared_data, tmp_path):
    go_on(imported, tmp_path / "run", prepared_data, 2)


def test_the_new_optimizer_warms_up_and_is_remembered(imported, one_rank, prepared_data, tmp_path):
    """AdamW's first update counts as its first, and a later start knows since when it has moments."""
    folder, lines = one_rank
    rates = [line["learning_rate/coefficient"] for line in lines]
    assert rates[0] > 0 and [rate / rates[0] for rate in rates] == pytest.approx([1, 2, 3])
    first = tensors(folder / "checkpoints" / "step_00000007")
    before = tensors(imported / "checkpoints" / "step_00000006")
    name = next(key for key in before if key.endswith("word_embeddings.weight"))
    moved = (first[name] - before[name])[:512].abs()
    # Adam's first update is the learning rate in every element with a gradient, whatever the gradient's size.
    rate = lines[0]["learning_rate/embedding"]
    touched = moved[moved > rate / 10]  # in rows of other tokens only weight decay acts
    assert len(touched) > 1000 and touched.median().item() == pytest.approx(rate, rel=0.05)
    shutil.copytree(folder, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000009")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000008")
    own = [f for f in overrides(prepared_data, tmp_path / "run", *SHAPE, "optimizer.name=adamw")]
    results = launch(1, [f for f in own if not f.startswith("model.")], recipe=str(tmp_path / "run" / "recipe.yaml"))
    assert results[0][0] == 0 and "resuming after step 7" in results[0][1]
    same_as(folder, tmp_path / "run")


def main_weights(rank, world_size, run, folder, engine):
    """Save what a bf16 start of the imported run has, before any update."""
    from bov_megatron import checkpoint
    from bov_megatron.engines.build import build_engine
    from bov_megatron.parallel import process_groups
    from bov_megatron.recipe import load_recipe

    settings = ["train.precision=bf16", "optimizer.name=adamw", f"engine={engine}", "data.path=unused"]
    recipe = load_recipe(run / "recipe.yaml", [*settings, TP2])
    process_groups.initialize(recipe, rank, world_size)
    built = build_engine(recipe)
    checkpoint.load(built, run / "checkpoints" / "step_00000006")
    checkpoint.save(built, folder, 6, keep_last=1, extra={})


@pytest.mark.parametrize("engine", ["megatron", "deepspeed"])
def test_main_weights_of_a_bf16_run_are_not_rounded(imported, tmp_path, engine):
    run_ranks(main_weights, 2, imported, tmp_path, engine)
    stored = tensors(imported / "checkpoints" / "step_00000006")
    found = tensors(tmp_path / "checkpoints" / "step_00000006")
    names = [key for key in stored if f"optimizer.main_param.{key}" in found]
    assert len(names) >= 20
    rounded = False
    for key in names:
        ours = found[f"optimizer.main_param.{key}"]
        rows = min(len(ours), len(stored[key]))  # the padding of the vocabulary follows the layout
        assert torch.equal(ours[:rows], stored[key][:rows]), key
        assert not found[f"optimizer.exp_avg.{key}"].any()
        rounded |= not torch.equal(found[key].float()[:rows], stored[key][:rows])
    assert rounded, "the model's own weights are in bf16"
