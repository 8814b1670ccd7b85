"""What a run costs: the paper's numbers, the reference's counts, and a plan that starts without torch."""

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bov_megatron.errors import RecipeError
from bov_megatron.plan import format_plan, plan
from bov_megatron.recipe import ModelConfig, Recipe, ValueConfig, load_recipe
from bov_megatron.recipe.parameters import parameter_specs
from bov_megatron.recipe.quantities import flops_per_token, parameter_counts, reference_scaling, total_steps

ROOT = Path(__file__).resolve().parent.parent
TP2 = "parallel.tensor_model_parallel_size=2"
RECIPES = ROOT / "recipes"

# arXiv 2606.02780, as its reference implementation counts them:
# recipe -> parameters, in tables, FLOPs/token, steps, tokens (as printed, four digits).
PUBLISHED = {
    "135m_baseline": (135_266_329, 0, 759_693_312, 3_766, "1.974e+09"),
    "135m_bov": (135_266_333 - 4 * 768**2 + 100_663_296, 100_663_296, 745_537_536, 3_838, "2.012e+09"),
    "780m_baseline": (780_140_569, 0, 4_775_215_104, 7_809, "8.188e+09"),
    "780m_bov": (780_140_577 - 8 * 1536**2 + 402_653_184, 402_653_184, 4_661_968_896, 7_998, "8.387e+09"),
}

# What the reference implementation reports for its tiny models (6 layers, 2 heads, d 32, vocabulary 128, sequence
# 1024), from the metadata of the golden files:
# value source -> FLOPs/token, matrix + coefficient parameters, parameters in tables, unused value matrices it keeps.
REFERENCE = {
    "baseline": (ValueConfig("projection"), 1646592, 73728, 0, 0),
    "bov": (ValueConfig("bank"), 1634304, 73730, 8192, 2),
    "bov_every_layer": (ValueConfig("bank", "every"), 1609728, 73734, 24576, 6),
    "bov_fixed": (ValueConfig("bank", coefficient="fixed"), 1634304, 73728, 8192, 2),
    "bov_shared": (ValueConfig("bank", table="shared"), 1634304, 73730, 4096, 2),
    "v1": (ValueConfig("first_layer"), 1634304, 73730, 0, 2),
    "ve_add_every2": (ValueConfig("gated_value_embedding", "every_second"), 1647024, 73800, 12288, 0),
    "x0_wv": (ValueConfig("embedding_projection"), 1646592, 73730, 0, 0),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_numbers(name):
    p = plan(load_recipe(RECIPES / f"{name}.yaml"))
    assert (p.parameters, p.table_parameters, p.flops_per_token, p.steps, f"{p.tokens:.3e}") == PUBLISHED[name]
    assert p.flops_total == pytest.approx({"135": 1.5e18, "780": 3.91e19}[name[:3]], rel=2e-4)


@pytest.mark.parametrize("name", REFERENCE)
def test_counts_of_reference_implementation(name):
    value, flops, matrices, tables, unused = REFERENCE[name]
    model = ModelConfig(
        num_layers=6, hidden_size=32, num_attention_heads=2, vocab_size=128, sequence_length=1024, value=value
    )
    counts = parameter_counts(model)
    assert flops_per_token(model) == flops
    assert counts["table"] == tables
    # The reference keeps, and counts, the value matrices that nothing reads; it counts coefficients as matrices.
    assert counts["matrix"] + counts["coefficient"] == matrices - unused * 32 * 32
    assert (counts["embedding"], counts["output"], counts["smear"]) == (4096, 4096, 25)
    assert model.windows() == [256, 256, 256, 1024, 256, 1024]


def test_effective_rates_are_the_published_ones():
    published = {  # matrix, embedding, output, coefficient learning rates; matrix weight decay
        "135m_bov": (0.02, 0.30, 0.008, 0.50, 0.28),
        "780m_baseline": (0.0283, 0.30, 0.008, 0.707, 0.0597),
        "780m_bov": (0.0283, 0.30, 0.008, 0.707, 0.0597),
    }
    for name, wanted in published.items():
        rates = plan(load_recipe(RECIPES / f"{name}.yaml")).learning_rates
        found = [rates[kind]["lr"] for kind in ("matrix", "embedding", "output", "coefficient")]
        assert (*found, rates["matrix"]["weight_decay"]) == pytest.approx(wanted, rel=2e-3)
        assert rates["table"]["lr"] == pytest.approx(rates["embedding"]["lr"] / 2)


def test_scaling_is_that_of_the_projection_model_and_can_be_turned_off():
    bank = load_recipe(RECIPES / "780m_bov.yaml")
    assert reference_scaling(bank) == reference_scaling(load_recipe(RECIPES / "780m_baseline.yaml"))
    off = ["optimizer.reference_batch_tokens=null", "optimizer.reference_parameters=null"]
    assert reference_scaling(load_recipe(RECIPES / "780m_bov.yaml", off)) == (1.0, pytest.approx(0.5**0.5), 1.0)


def test_steps_win_over_budget():
    assert total_steps(load_recipe(RECIPES / "780m_bov.yaml", ["train.steps=20"])) == 20


def test_memory_by_hand():
    """A model small enough to add up on paper: bf16, TP=2, DP=4, no recomputation."""
    recipe = Recipe()
    recipe.model = ModelConfig(
        num_layers=3, hidden_size=64, num_attention_heads=2, vocab_size=500, sequence_length=128,
        value=ValueConfig("bank"),
    )  # fmt: skip
    recipe.parallel.tensor_model_parallel_size = 2
    recipe.train.micro_batch_size, recipe.train.global_batch_size, recipe.train.steps = 2, 8, 1
    p = plan(recipe, world_size=8)
    rows = 512  # 500 padded to a multiple of 128 × 2
    matrices = (2 * 12 + 11) * 64 * 64 // 2  # q, k, v, o and 8 d² of feed-forward; the last layer has no v
    variances = 4 * (11 * 64 + 6 * 256)  # 11 square matrices and 6 of 64 × 256
    vocabulary = rows * 64 // 2
    small = 25 + 1
    table = rows * 64 // 2
    assert p.padded_vocab_size == rows
    assert p.memory_per_rank["weights"] == 2 * (matrices + 2 * vocabulary + small)
    assert p.memory_per_rank["gradients"] == 4 * (matrices + 2 * vocabulary + small)
    assert p.memory_per_rank["optimizer"] == pytest.approx(
        (8 * matrices + variances + 12 * (2 * vocabulary + small)) / 4, abs=40
    )
    assert p.memory_per_rank["tables"] == table * (2 + 4 + 12 // 4)
    tokens = 2 * 128
    kept = 3 * tokens * 64  # the last norm's input and output, and its gradient
    assert p.memory_per_rank["logits"] == 2 * (tokens * rows // 2 + kept + rows // 2 * 64)
    assert p.memory_per_rank_bytes == sum(p.memory_per_rank.values())
    assert p.checkpoint_bytes == 2 * (10 * matrices + 14 * (2 * vocabulary + table)) + 14 * small + variances
    assert p.gradient_accumulation_steps == 1


def test_memory_follows_the_layout():
    def memory(*overrides, world_size=16):
        return plan(
            load_recipe(RECIPES / "780m_bov.yaml", [TP2, "parallel.sequence_parallel=true", *overrides]), world_size
        )

    whole = memory()
    assert whole.memory_per_rank_bytes < 80e9, "the recipe is meant for 80 GB devices"
    more_tensor = memory("parallel.tensor_model_parallel_size=4").memory_per_rank
    # Weights and gradients (6 bytes) are split by TP, optimizer state (12) by TP × DP = 16 either way.
    assert more_tensor["tables"] / whole.memory_per_rank["tables"] == pytest.approx(
        (6 / 4 + 12 / 16) / (6 / 2 + 12 / 16)
    )
    assert memory("parallel.recompute=full").memory_per_rank["activations"] < whole.memory_per_rank["activations"] / 5
    unsharded = memory("parallel.use_distributed_optimizer=false").memory_per_rank
    assert unsharded["optimizer"] == pytest.approx(8 * whole.memory_per_rank["optimizer"], rel=1e-6)
    stages = memory("parallel.pipeline_model_parallel_size=4").memory_by_stage
    # Layers 0-5, 6-11, 12-17 and 18-23; targets are 16-23.
    assert [round(stage["tables"] / stages[3]["tables"], 3) for stage in stages] == [0, 0, 0.333, 1]
    assert [stage["logits"] > 0 for stage in stages] == [False, False, False, True]
    assert stages[1]["activations"] / stages[2]["activations"] == pytest.approx(3 / 2, rel=0.05), "1F1B in flight"


def test_values_cached_while_decoding():
    cache = plan(load_recipe(RECIPES / "780m_bov.yaml")).value_cache_bytes_per_token
    assert cache == {"projection": 24 * 1536 * 2, "this_model": 16 * 1536 * 2}


def test_table_on_terminal_has_every_number():
    text = format_plan(plan(load_recipe(RECIPES / "780m_bov.yaml"), world_size=16))
    for expected in ("1,163,919,393", "402,653,184", "4.661969e+09", "7,998", "16-23", "estimate", "40%"):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 100


def test_time_scales_with_devices():
    recipe = load_recipe(RECIPES / "780m_bov.yaml")
    slow, fast = plan(recipe, 8).time_estimate, plan(recipe, 16).time_estimate
    assert slow["seconds"] == pytest.approx(2 * fast["seconds"])
    assert fast["seconds"] == pytest.approx(3.91e19 / (16 * 989e12 * 0.4), rel=1e-3)
    with pytest.raises(RecipeError, match="mfu=40"):
        plan(recipe, 16, mfu=40)


def test_command_is_fast_without_torch_and_prints_json():
    started = time.monotonic()
    command = [sys.executable, str(ROOT / "tools/plan.py"), str(RECIPES / "780m_bov.yaml"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 2
    values = json.loads(result.stdout)
    assert (values["parameters"], values["table_parameters"]) == PUBLISHED["780m_bov"][:2]
    assert (values["flops_per_token"], values["steps"]) == PUBLISHED["780m_bov"][2:4]
    assert values["tokens"] == 7_998 * 1_048_576
    assert values["memory_per_rank_bytes"] == sum(values["memory_per_rank"].values())
    code = "import sys, bov_megatron.plan, bov_megatron.recipe; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_command_explains_bad_input():
    command = [sys.executable, str(ROOT / "tools/plan.py"), str(RECIPES / "780m_bov.yaml")]
    result = subprocess.run([*command, "model.hiden_size=8"], capture_output=True, text=True)
    assert result.returncode == 2 and "did you mean 'model.hidden_size'" in result.stderr
    result = subprocess.run([*command, "--world-size", "3", TP2], capture_output=True, text=True)
    assert result.returncode == 2 and "world size 3 is not a multiple of 2" in result.stderr
    assert "Traceback" not in result.stderr


def test_table_rows_are_counted_without_padding():
    model = dataclasses.replace(load_recipe(RECIPES / "smoke.yaml").model, vocab_size=4001)
    assert parameter_counts(model)["table"] == 2 * 4001 * 128
    assert sum(spec.size for spec in parameter_specs(model)) == sum(parameter_counts(model).values())
