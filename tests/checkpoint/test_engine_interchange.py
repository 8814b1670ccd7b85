"""A checkpoint that one engine saved goes on in the other, in another layout, as if it had never stopped."""

from pathlib import Path

import pytest

from bov_megatron.recipe import Recipe
from tests.support.deepspeed_ranks import adamw_recipe, build, step, zero
from tests.support.distributed import run_ranks

SAVED_AT, MORE_STEPS = 2, 3
DP2, TP2 = adamw_recipe(), adamw_recipe(tensor_model_parallel_size=2)
BF16_DP2, BF16_TP2 = adamw_recipe("bf16"), adamw_recipe("bf16", tensor_model_parallel_size=2)
RECIPES = {
    "megatron-dp2": DP2,
    "megatron-tp2": TP2,
    "megatron-tp2-pp2": adamw_recipe(
        tensor_model_parallel_size=2, pipeline_model_parallel_size=2, pipeline_layers=[1, 2]
    ),
    "zero1-tp2": zero(TP2, 1),
    "zero1-dp2-offload": zero(DP2, 1, "cpu"),
    "zero2-dp2": zero(DP2, 2),
    "zero3-dp2": zero(DP2, 3),
    "bf16-megatron-tp2": BF16_TP2,
    "bf16-zero1-dp2": zero(BF16_DP2, 1),
    "bf16-zero3-dp2": zero(BF16_DP2, 3),
}
"""Vocabularies pad to 301 or 302 rows: shapes differ between layouts."""
ON_FOUR = {"megatron-tp2-pp2": ["zero1-tp2", "zero2-dp2", "zero3-dp2"]}
"""Twice the data-parallel ranks of those names."""
CONTINUED = {
    "megatron-tp2": ["zero1-dp2-offload", "zero2-dp2", "zero3-dp2"],
    "zero3-dp2": ["megatron-tp2", "zero3-dp2"],
    "zero1-tp2": ["megatron-dp2"],
    "bf16-megatron-tp2": ["bf16-zero1-dp2", "bf16-zero3-dp2"],
    "bf16-zero1-dp2": ["bf16-megatron-tp2"],
}


def interchange(rank, world_size, continued, folder):
    """Losses after the checkpoint: by the run that saved it under its own name, and by each that loaded it."""
    return {
        saved: {
            saved: save_and_go_on(RECIPES[saved], folder / saved),
            **{f"then {name}": go_on(RECIPES[name], folder / saved) for name in targets},
        }
        for saved, targets in continued.items()
    }


def save_and_go_on(recipe: Recipe, folder: Path) -> list[float]:
    from bov_megatron import checkpoint

    engine = build(recipe)
    for number in range(SAVED_AT):
        step(engine, number)
    checkpoint.save(engine, folder, SAVED_AT, keep_last=1, extra={})
    return more_steps(engine)


def go_on(recipe: Recipe, folder: Path) -> list[float]:
    from bov_megatron import checkpoint
    from bov_megatron.lifecycle import run_folder

    engine = build(recipe)
    step(engine, 7)  # the state that is loaded replaces another
    assert checkpoint.load(engine, run_folder.latest_checkpoint(folder)).step == SAVED_AT
    assert engine.optimizer.step_count == SAVED_AT
    return more_steps(engine)


def more_steps(engine) -> list[float]:
    return [step(engine, number).loss for number in range(SAVED_AT, SAVED_AT + MORE_STEPS)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interchange")
    return run_ranks(interchange, 2, CONTINUED, folder)[0] | run_ranks(interchange, 4, ON_FOUR, folder)[0]


@pytest.mark.parametrize(
    ("saved", "target"), [(saved, t) for saved, targets in (CONTINUED | ON_FOUR).items() for t in targets]
)
def test_goes_on(losses, saved, target):
    expected, found = losses[saved][saved], losses[saved][f"then {target}"]
    assert found == pytest.approx(expected, rel=1e-3 if "bf16" in saved else 1e-6)
    if saved == target:
        assert found == expected
    assert expected[0] > expected[-1] + 0.1
