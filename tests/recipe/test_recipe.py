"""Recipes: loading, overrides, and an instruction for everything that cannot run."""

import dataclasses
import itertools
import math
import re
import typing
from pathlib import Path

import pytest
import yaml

from bov_megatron.errors import RecipeError
from bov_megatron.plan import plan
from bov_megatron.recipe import Recipe, ValueConfig, data_parallel_size, load_recipe, recipe_from_dict
from bov_megatron.recipe.fields import TARGET_LAYERS
from bov_megatron.recipe.layout_checks import parts_of_data
from bov_megatron.recipe.value_sources import VALUE_SOURCES

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
ALL = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name != "studies")
BANK = RECIPES / "135m_bov.yaml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


# --- the recipes that are there -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_every_recipe_loads_and_says_what_it_is_for(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    comment = list(itertools.takewhile(lambda line: line.startswith("# "), path.read_text().splitlines()))
    assert 2 <= len(comment) <= 4
    p = plan(recipe, 2 if path.stem == "smoke" else 16)
    assert p.memory_per_rank_bytes < 80e9


def test_every_source_and_option_has_a_recipe():
    values = [load_recipe(path).model.value for path in ALL if path.parent.name == "variants"]
    assert {value.source for value in values} == set(VALUE_SOURCES)
    targets = {value.target_layers if isinstance(value.target_layers, str) else "list" for value in values}
    assert targets == {*TARGET_LAYERS, "list"}
    hints = typing.get_type_hints(ValueConfig)
    for field in ("coefficient", "table", "table_partition", "lookup", "table_memory"):
        assert {getattr(value, field) for value in values} == set(typing.get_args(hints[field])), field


def test_variants_differ_in_what_their_name_says_only():
    base = load_recipe(BANK).to_dict()
    for path in ALL:
        if path.parent.name == "variants":
            changed = {key for key, value in load_recipe(path).to_dict().items() if value != base[key]}
            assert changed <= {"name", "model", "parallel", "optimizer"}, path.name


# --- loading and overriding ---------------------------------------------------------------------------------------


def test_overrides_reach_every_kind_of_field():
    recipe = load_recipe(
        BANK,
        [
            "optimizer.matrix_lr=0.01",
            "--train.steps=20",
            "train.budget_flops=1e18",
            "model.value.target_layers=[9, 11]",
            "optimizer.reference_parameters=null",
            "model.head_dim=",
            "data.path=null",
            "data.streams=[{path: a, weight: 2}, {path: b}]",
            "validation.tokens=4e6",
            "logging.wandb=disabled",
        ],
    )
    assert recipe.optimizer.matrix_lr == 0.01 and recipe.train.steps == 20 and recipe.train.budget_flops == 1e18
    assert recipe.model.layers_from_source() == [9, 11] and recipe.optimizer.reference_parameters is None
    assert [(stream.path, stream.weight) for stream in recipe.data.streams] == [("a", 2.0), ("b", 1.0)]
    assert recipe.validation.tokens == 4_000_000 and isinstance(recipe.validation.tokens, int)


def test_resolved_recipe_comes_back_from_its_stored_form():
    recipe = load_recipe(BANK, ["data.path=", "data.streams=[{path: a}]", "model.value.target_layers=[10]"])
    assert recipe_from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe


def test_base_chain_merges_sections_and_keeps_the_outer_name(tmp_path):
    write(tmp_path, "a.yaml", "name: a\ntrain: {steps: 5, seed: 1}\nmodel: {num_layers: 3}\n")
    write(tmp_path, "b.yaml", "base: a.yaml\ntrain: {seed: 2}\n")
    (tmp_path / "deep").mkdir()
    recipe = load_recipe(write(tmp_path / "deep", "c.yaml", "base: ../b.yaml\nmodel: {num_layers: 6}\n"))
    assert (recipe.name, recipe.train.steps, recipe.train.seed, recipe.model.num_layers) == ("c", 5, 2, 6)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- a\n", "must be a mapping of sections, found list"),
        ("train: {steps: [}\n", "is not valid YAML"),
        ("train: {steps: 1}\ntrain: {seed: 2}\n", r"'train' is given twice \(line 2\); keep one"),
        ("train:\n  steps: 1\n  steps: 2\n", r"'steps' is given twice \(line 3\)"),
        ("base: self.yaml\n", "is its own base"),
        ("base: [a, b]\n", "expected the path of one recipe"),
        ("base: nothing.yaml\n", r"nothing.yaml does not exist \(the base of self.yaml\)"),
        ("train:\n", "train=None: 'train' is a section, not a value"),
        ("trane: {steps: 1}\n", "unknown field 'trane'; did you mean 'train'"),
        ("train: {step: 1}\n", "unknown field 'train.step'; did you mean 'train.steps'"),
        ("train: {steps: 1, zzz: 1}\n", "unknown field 'train.zzz'; known: micro_batch_size"),
        ("train: {steps: ten}\n", "train.steps='ten': expected an integer or null, found a string"),
        ("train: {steps: 1.5}\n", "train.steps=1.5: expected an integer or null, found a number with a fraction"),
        ("train: {steps: true}\n", "train.steps=True: expected an integer or null, found a boolean"),
        ("train: {steps: 1, deterministic: 1}\n", "train.deterministic=1: expected true or false"),
        (
            "train: {steps: 1}\noptimizer: {matrix_lr: .nan}\n",
            "optimizer.matrix_lr=nan: expected a finite number, found a number that is not",
        ),
        ("train: {steps: 1}\nlogging: {wandb: off}\n", "logging.wandb=False: expected a string.*quote it"),
        (
            "train: {steps: 1}\nmodel: {value: {source: bank, target_layers: [1, x]}}\n",
            r"model.value.target_layers\[1\]='x': expected an integer",
        ),
        ("train: {steps: 1}\noptimizer: {adamw_matrix_betas: 0.9}\n", "expected a list of numbers"),
        ("train: {steps: 1}\ndata: {streams: {path: a}}\n", "data.streams=.*expected a list of sections"),
        ("train: {steps: 1}\ndata: {streams: [{pth: a}]}\n", r"unknown field 'data.streams\[0\].pth'"),
    ],
)
def test_unreadable_recipe(tmp_path, text, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(write(tmp_path, "self.yaml", text))


def test_of_an_override_given_twice_the_last_holds():
    recipe = load_recipe(RECIPES / "smoke.yaml", ["train.steps=3", "train.seed=5", "train.steps=4"])
    assert (recipe.train.steps, recipe.train.seed) == (4, 5)


def test_missing_file_names_the_one_that_was_meant(tmp_path):
    with pytest.raises(RecipeError, match=r"135m_bov does not exist; did you mean 135m_bov.yaml\?"):
        load_recipe(RECIPES / "135m_bov")
    with pytest.raises(RecipeError, match=r"did you mean 780m_bov.yaml\? In its folder: 135m_baseline.yaml"):
        load_recipe(RECIPES / "780_bov.yaml")
    with pytest.raises(RecipeError, match="is a folder; name one of its files"):
        load_recipe(RECIPES)
    with pytest.raises(RecipeError, match=r"x.yaml does not exist. In its folder: no recipe"):
        load_recipe(tmp_path / "none" / "x.yaml")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.steps"], "override 'train.steps' is not of the form section.field=value"),
        (["=3"], "is not of the form"),
        (["train..steps=3"], "is not of the form"),
        (["name="], "^name is empty, or null: expected a string; leave it out for the default"),
        (["train.steps.x=3"], r"train.steps=\{'x': 3\}: expected an integer or null, found a section"),
        (["model=3"], "'model' is a section, not a value; set model.<field>"),
        (["data.path.x=3"], "'data.path' is a value, not a section"),
        (["name=[1"], r"override 'name=\[1': the value is not valid YAML"),
        (["data.streams=[{path: a}]", "data.streams.0.weight=3"], r"give the whole list: data.streams=\["),
        (["optimizer.matrx_lr=1"], "unknown field 'optimizer.matrx_lr'; did you mean 'optimizer.matrix_lr'"),
    ],
)
def test_bad_override(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(BANK, overrides)


# --- impossible recipes: field, value found, remedy ---------------------------------------------------------------

TP2, TP4 = (f"parallel.tensor_model_parallel_size={size}" for size in (2, 4))
ZERO = "engine=deepspeed optimizer.name=adamw"
PP2 = "parallel.pipeline_model_parallel_size=2"
VPP2 = "parallel.virtual_pipeline_model_parallel_size=2"
TP6 = "parallel.tensor_model_parallel_size=6"
CP2 = "parallel.context_parallel_size=2"

IMPOSSIBLE = [
    # naming
    ("name=a/b", "name='a/b': must be usable as a folder name"),
    ("output_dir=runs/{nme}", "output_dir='runs/{nme}': must be a path in which only {name}"),
    ("output_dir=runs/{", "output_dir='runs/{'.*only {name} may be in braces"),
    # model sizes
    ("model.num_layers=0", "model.num_layers=0: must be at least 1"),
    ("model.vocab_size=-1", "model.vocab_size=-1: must be at least 1"),
    ("model.num_query_groups=0", "model.num_query_groups=0: must be at least 1"),
    ("model.rotary_base=0", "model.rotary_base=0.0: must be greater than 0"),
    ("model.hidden_size=18", r"model.hidden_size=18: must be at least 24 \(smear"),
    ("model.hidden_size=770", "model.hidden_size=770 is not divisible by model.num_attention_heads=6.*can be 1, 2, 5"),
    ("model.hidden_size=54", "model.head_dim=9: must be even"),
    ("model.head_dim=7", "model.head_dim=7: must be even"),
    ("model.num_query_groups=4", "num_attention_heads=6 is not divisible by model.num_query_groups=4.*1, 2, 3, 6"),
    ("model.window_pattern=SSX", "model.window_pattern='SSX': must be letters S .* and L"),
    ("model.window_pattern=''", "model.window_pattern='': must be letters"),
    ("model.core_attention=sdap", "model.core_attention='sdap' is unknown; did you mean 'sdpa'"),
    # values
    ("model.value.source=bnak", "model.value.source='bnak' is unknown; did you mean 'bank'"),
    ("model.value.source=zzz", "model.value.source='zzz' is unknown; known: projection, bank"),
    ("model.value.target_layers=last_half", "target_layers='last_half' is unknown.*or a list of 0-based layers"),
    ("model.value.target_layers=[3, 12]", r"layer 12 does not exist; layers are 0 to 11"),
    ("model.value.target_layers=[-1]", r"layer -1 does not exist"),
    ("model.value.target_layers=[3, 3]", r"target_layers=\[3, 3\]: layer 3 is listed twice"),
    ("model.value.target_layers=[]", r"target_layers=\[\] selects no layer of 12 for source 'bank'"),
    ("model.value.source=first_layer model.value.target_layers=[0, 3]", "layer 0 cannot be a target of source 'first"),
    ("model.value.source=first_layer model.num_layers=1", "selects no layer of 1 for source 'first_layer'"),
    ("model.value.coefficient=learnt", "model.value.coefficient='learnt' is unknown; did you mean 'learned'"),
    ("model.value.table=common", "model.value.table='common' is unknown.*per_layer, shared"),
    ("model.value.table_partition=heads", "table_partition='heads' is unknown; did you mean 'head'"),
    (
        "model.value.lookup=reducescatter",
        "model.value.lookup='reducescatter' is unknown; did you mean 'reduce_scatter'",
    ),
    ("model.value.lookup=all_reduce", "model.value.lookup='all_reduce' is unknown.*distinct, reduce_scatter"),
    ("model.core_attention=megatron", "model.core_attention='megatron' is unknown.*auto, sdpa, flex"),
    ("model.value.table_memory=hos", "table_memory='hos' is unknown; did you mean 'host'"),
    (
        "model.value.table_memory=host model.value.source=projection",
        "=host: model.value.source=projection has no table",
    ),
    (
        "model.value.table_memory=host model.value.lookup=reduce_scatter",
        "=host copies distinct rows, and .*=reduce_scatter",
    ),
    ("model.value.table_memory=host model.value.table_partition=head", "=host copies distinct rows, and .*=head"),
    # layout
    (f"{TP4}", "num_attention_heads=6 is not divisible by parallel.tensor_model_parallel_size=4.*can be 1, 2, 3, 6"),
    (f"{TP2} model.num_query_groups=3", "model.num_query_groups=3 is not divisible by parallel.tensor_model_parallel"),
    (f"{TP2} model.num_query_groups=1 model.value.table_partition=head", "num_query_groups=1 is less than.*=2.*=vocab"),
    (
        f"{TP2} model.num_query_groups=1 model.value.lookup=reduce_scatter",
        "num_query_groups=1 is less than.*=2.*use model.value.lookup=distinct",
    ),
    (f"{TP2} model.num_query_groups=1 model.value.source=gated_value_embedding", "gates, one a group, do not divide"),
    (
        f"{TP6} model.num_query_groups=4 model.num_attention_heads=12 model.head_dim=64",
        "tensor_model_parallel_size=6 is not divisible by model.num_query_groups=4.*num_query_groups can be 1, 2, 3, 6",
    ),
    (
        f"{TP6} model.num_query_groups=1 model.head_dim=32",
        "num_query_groups × model.head_dim=32 is not divisible by .*=6",
    ),
    (f"{TP2} model.ffn_hidden_size=999", "model.ffn_hidden_size=999 is not divisible by parallel.tensor_model"),
    ("parallel.pipeline_model_parallel_size=5", "num_layers=12 is not divisible by .*pipeline.*=5.*1, 2, 3, 4, 6, 12"),
    ("parallel.tensor_model_parallel_size=0", "parallel.tensor_model_parallel_size=0: must be at least 1"),
    ("parallel.make_vocab_size_divisible_by=0", "make_vocab_size_divisible_by=0: must be at least 1"),
    ("parallel.recompute=ful", "parallel.recompute='ful' is unknown; did you mean 'full'"),
    ("parallel.recompute_num_layers=2", "recompute_num_layers=2 needs parallel.recompute=full, found 'none'"),
    ("parallel.recompute=full parallel.recompute_num_layers=0", "recompute_num_layers=0: must be between 1 and 12"),
    (f"{PP2} parallel.recompute=full parallel.recompute_num_layers=7", "must be between 1 and 6, the layers of a"),
    (f"{VPP2}", "virtual_pipeline_model_parallel_size=2 needs parallel.pipeline_model_parallel_size > 1, found 1"),
    (f"{VPP2} {PP2} model.num_layers=10", "num_layers=10 is not divisible by .*pipeline.* × parallel.virtual.*=4"),
    (f"{VPP2} {PP2} parallel.recompute=full parallel.recompute_num_layers=4", "must be between 1 and 3, the layers"),
    (f"{PP2} parallel.pipeline_balance=tim", "parallel.pipeline_balance='tim' is unknown; did you mean 'time'"),
    (f"{PP2} parallel.pipeline_layers=[12]", "pipeline_layers=.12.: needs 2 numbers, found 1"),
    (f"{PP2} parallel.pipeline_layers=[5,6]", "add up to model.num_layers=12, found 11"),
    (f"{PP2} parallel.pipeline_layers=[0,12]", "must be at least 1 each"),
    (f"{PP2} parallel.pipeline_layers=[6,6] parallel.pipeline_balance=time", "are both set; set one of them"),
    (f"{PP2} model.num_layers=1 parallel.pipeline_balance=time", "num_layers=1 is less than 2 pipeline stages"),
    (f"{PP2} {VPP2} parallel.pipeline_balance=memory", "pipeline_balance=memory cannot be used with .*virtual.*=2"),
    ("parallel.sequence_parallel=true", "needs parallel.tensor_model_parallel_size > 1, found 1.*=false"),
    (f"{TP2} parallel.sequence_parallel=true model.sequence_length=2047", "sequence_length=2047 is not divisible by"),
    (
        f"{CP2} {TP4} parallel.sequence_parallel=true model.num_attention_heads=8 model.sequence_length=2052",
        "sequence_length=2052 / parallel.context_parallel_size=2 is not divisible by .*=4.*sequence_parallel=false",
    ),
    (
        f"{CP2} model.sequence_length=2046",
        "sequence_length=2046 is not a multiple of 2 × par",
    ),
    (f"{PP2} model.value.table=shared", "model.value.table=shared would put copies.*pipeline_model_parallel_size=2"),
    *(
        (f"{PP2} model.value.source={source}", f"source={source} reads {what}, which only the first pipeline stage")
        for source, what in (
            ("first_layer", "layer 0's values"),
            ("projection_plus_first_layer", "layer 0's values"),
            ("embedding_projection", "the token embedding"),
            ("projection_plus_embedding", "the token embedding"),
        )
    ),
    # engine
    ("engine=deepsped", "engine='deepsped' is unknown; did you mean 'deepspeed'"),
    ("deepspeed.zero_stage=4", "deepspeed.zero_stage=4: must be 1, 2 or 3"),
    ("deepspeed.offload_optimizer=nvme", "offload_optimizer='nvme' is unknown.*none, cpu"),
    ("engine=deepspeed", "AdamW only, found optimizer.name=muon.*use optimizer.name=adamw, or engine=megatron"),
    (f"{ZERO} {PP2}", "data and tensor parallelism only, found parallel.pipeline_model_parallel_size=2; set it to 1"),
    (f"{ZERO} parallel.context_parallel_size=2", "found parallel.context_parallel_size=2; set it to 1"),
    (f"{ZERO} deepspeed.zero_stage=3 {TP2}", "data-parallel ranks alone, found .*=2; .*use deepspeed.zero_stage=2"),
    (f"{ZERO} parallel.use_distributed_optimizer=false", "always shards the optimizer's state.*leave it true"),
    # training
    ("train.micro_batch_size=0", "train.micro_batch_size=0: must be at least 1"),
    ("train.micro_batch_size=24", "global_batch_size=256 is not divisible by train.micro_batch_size=24"),
    ("train.precision=fp16", "train.precision='fp16' is unknown.*bf16, fp32"),
    ("train.steps=0", "train.steps=0: must be at least 1"),
    ("health.hang_minutes=-1", "health.hang_minutes=-1.0: must be at least 0"),
    ("health.on_spike=skipp", "health.on_spike='skipp' is unknown; did you mean 'skip'"),
    ("health.spike_window=3", "health.spike_window=3: must be at least 4"),
    ("health.spike_deviations=-1", "health.spike_deviations=-1.0: must be at least 0"),
    ("health.max_skips=-1", "health.max_skips=-1: must be at least 0"),
    ("health.max_rollbacks=-1", "health.max_rollbacks=-1: must be at least 0"),
    ("train.max_minutes=0", "train.max_minutes=0.0: must be greater than 0"),
    ("train.seed=-1", "train.seed=-1: must be at least 0"),
    ("train.budget_flops=null", "train.steps and train.budget_flops are both null.*train.steps=1000"),
    ("train.budget_flops=-1", "train.budget_flops=-1.0: must be greater than 0"),
    ("train.budget_flops=1e12", r"train.budget_flops=1e\+12 does not pay for one step \(3.91e\+14 FLOPs\); raise it"),
    # optimizer
    ("optimizer.name=moun", "optimizer.name='moun' is unknown; did you mean 'muon'"),
    ("optimizer.table_lr=-1", "optimizer.table_lr=-1.0: must be at least 0"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1.0: must be at least 0"),
    ("optimizer.clip_grad=-1", "optimizer.clip_grad=-1.0: must be at least 0"),
    ("optimizer.eps=0", "optimizer.eps=0.0: must be greater than 0"),
    ("optimizer.warmdown_ratio=65", "optimizer.warmdown_ratio=65.0: must lie between 0 and 1.0"),
    ("optimizer.momentum_peak=1", "optimizer.momentum_peak=1.0: must lie between 0 and 1.0 .exclusive"),
    ("optimizer.newton_schulz_steps=0", "optimizer.newton_schulz_steps=0: must be at least 1"),
    ("optimizer.adamw_matrix_betas=[0.9]", r"adamw_matrix_betas=\[0.9\]: must be two numbers"),
    ("optimizer.adamw_matrix_betas=[0.9, 1]", "adamw_matrix_betas=1.0: must lie between 0 and 1.0"),
    ("optimizer.reference_parameters=0", "reference_parameters=0: must be at least 1 .null turns"),
    # data
    ("data.streams=[{path: a}]", "data.path='data/pretrain' and data.streams .1. are both set"),
    ("data.path=''", "data.path='': must name a folder"),
    ("data.path=null data.remote=s3://b/c", "data.remote='s3://b/c' needs data.path"),
    ("data.path=null data.streams=[{weight: 1}]", r"data.streams\[0\].path is empty"),
    ("data.path=null data.streams=[{path: a, weight: 0}]", r"data.streams\[0\].weight=0.0: must be greater than 0"),
    ("data.path=null data.streams=[{path: a}, {path: a}]", r"data.streams\[1\].path='a' is listed twice"),
    ("data.num_canonical_nodes=3", "global_batch_size=256 is not divisible by data.num_canonical_nodes=3"),
    ("data.shuffle_block_size=0", "data.shuffle_block_size=0: must be at least 1"),
    ("data.num_workers=-1", "data.num_workers=-1: must be at least 0"),
    # the rest
    ("validation.interval=-1", "validation.interval=-1: must be at least 0"),
    ("validation.tokens=100", "validation.tokens=100: must be at least 2048 .one sequence"),
    ("validation.micro_batch_size=0", "validation.micro_batch_size=0: must be at least 1"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last=0: must be at least 1"),
    ("checkpoint.keep_every=-1", "checkpoint.keep_every=-1: must be at least 0"),
    ("logging.interval=0", "logging.interval=0: must be at least 1"),
    ("logging.wandb=onlin", "logging.wandb='onlin' is unknown; did you mean 'online'"),
    ("logging.peak_flops=0", "logging.peak_flops=0.0: must be greater than 0"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE, ids=[overrides for overrides, _ in IMPOSSIBLE])
def test_impossible_recipe(overrides, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(BANK, re.split(r" (?=\w+\.\w+=|\w+\.value\.)", overrides))


def test_possible_recipes_near_the_impossible_ones():
    for overrides in (
        ["model.value.source=first_layer", "model.value.target_layers=every"],  # layer 0 is left out silently
        [PP2],
        ["deepspeed.zero_stage=3", TP2],  # another engine's
        [*ZERO.split(), "deepspeed.zero_stage=2", TP2, "parallel.sequence_parallel=true"],
        [PP2, "model.value.source=gated_value_embedding"],
        [PP2, "model.value.source=projection", "model.value.table=shared"],  # no table to share
        [TP2, "model.num_query_groups=2", "model.value.table_partition=head", "parallel.sequence_parallel=true"],
        ["train.steps=20"],  # shorter than the warmup, and beside a budget
        ["data.path=null"],  # plan and benchmark need no data
    ):
        load_recipe(BANK, overrides)


def test_world_size():
    recipe = load_recipe(RECIPES / "780m_bov.yaml", [TP2, PP2])  # 2 × 2 ranks a copy, 512 = 16 × 32
    assert [data_parallel_size(recipe, world) for world in (4, 16, 128)] == [1, 4, 32]
    with pytest.raises(RecipeError, match=r"world size 6 is not a multiple of 4 \(tensor 2 × pipeline 2 × context 1\)"):
        data_parallel_size(recipe, 6)
    interleaved = load_recipe(RECIPES / "780m_bov.yaml", [TP2, PP2, VPP2])
    assert data_parallel_size(interleaved, 64) == 16
    with pytest.raises(RecipeError, match="takes micro-batches in groups of .*=2, but a step has 1 on each data-paral"):
        data_parallel_size(interleaved, 128)
    with pytest.raises(RecipeError, match="world size 0 is not a multiple of 4"):
        data_parallel_size(recipe, 0)
    message = "global_batch_size=512 is not a multiple of train.micro_batch_size=16 × 64 .* = 1024; .* 1, 2, 4, 8$"
    with pytest.raises(RecipeError, match=message):
        data_parallel_size(recipe, 256)
    with pytest.raises(RecipeError, match="train.global_batch_size must be a multiple of 3$"):
        data_parallel_size(recipe, 12)


@pytest.mark.parametrize(
    "world, per_node, layout, batch, parts",
    [
        (1, 1, {}, 12, 1),
        (16, 8, {}, 64, 2),
        (8, 4, {"tensor_model_parallel_size": 4}, 64, 2),
        (16, 8, {"tensor_model_parallel_size": 4, "context_parallel_size": 4}, 64, 1),
        (32, 8, {"pipeline_model_parallel_size": 2}, 64, 2),
        (10, 4, {}, 20, 1),
    ],
)
def test_a_node_reads_one_part_of_the_data(world, per_node, layout, batch, parts):
    sizes = ("tensor_model_parallel_size", "context_parallel_size", "pipeline_model_parallel_size")
    overrides = [f"parallel.{size}={layout.get(size, 1)}" for size in sizes]
    overrides += [f"train.global_batch_size={batch}", "train.micro_batch_size=1"]
    recipe = load_recipe(RECIPES / "780m_bov.yaml", overrides)
    assert parts_of_data(recipe, world, per_node) == parts
    copies, ranks_of_stage = data_parallel_size(recipe, world), math.prod(layout.get(size, 1) for size in sizes[:2])
    for first in range(0, world, per_node):
        data_ranks = {rank // ranks_of_stage % copies for rank in range(first, min(first + per_node, world))}
        assert len({batch // copies * rank * parts // batch for rank in data_ranks}) == 1


def test_every_number_field_is_guarded():
    """A new numeric field must get a check: none accepts -1."""
    unguarded = []
    for section in dataclasses.fields(Recipe):
        if section.name in ("name", "output_dir", "engine"):
            continue
        values = getattr(load_recipe(BANK, ["train.steps=5"]), section.name)
        for field in dataclasses.fields(values):
            kind = str(typing.get_type_hints(type(values))[field.name])
            if "int" in kind or "float" in kind or "Literal[1" in kind:
                try:
                    value = "[-1]" if "list" in kind else "-1"
                    load_recipe(BANK, [f"{section.name}.{field.name}={value}"])
                    unguarded.append(f"{section.name}.{field.name}")
                except RecipeError as error:
                    assert field.name in str(error)
    assert unguarded == []
