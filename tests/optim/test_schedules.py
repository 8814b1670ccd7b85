"""Schedules and settings, against the paper's numbers."""

from dataclasses import replace

import pytest

from bov_megatron.optim import schedules
from bov_megatron.optim.groups import group_settings
from bov_megatron.recipe import ModelConfig, OptimizerConfig, Recipe, TrainConfig, ValueConfig
from bov_megatron.recipe.parameters import KINDS

STEPS = 7998  # the 780M bank's
CONFIG = OptimizerConfig()


def test_learning_rate():
    warmdown = round(0.65 * STEPS)
    multiplier = [schedules.lr_multiplier(step, STEPS, CONFIG) for step in range(STEPS + 1)]
    assert multiplier[0] == 1 / 40 and multiplier[39] == 1
    assert set(multiplier[39 : STEPS - warmdown + 1]) == {1}
    assert multiplier[STEPS - warmdown // 2] == pytest.approx(0.525, abs=1e-3)
    assert multiplier[STEPS] == pytest.approx(0.05)
    falls = [a - b for a, b in zip(multiplier[STEPS - warmdown :], multiplier[STEPS - warmdown + 1 :], strict=False)]
    assert falls == pytest.approx([0.95 / warmdown] * warmdown)


def test_muon_momentum():
    momentum = [schedules.muon_momentum(step, STEPS, CONFIG) for step in range(STEPS + 1)]
    assert momentum[0] == 0.85 and momentum[200] == pytest.approx(0.91) and momentum[400] == 0.97
    start = STEPS - round(0.65 * STEPS)
    assert set(momentum[400:start]) == {0.97}
    assert momentum[STEPS] == pytest.approx(0.90)
    assert momentum[start + (STEPS - start) // 2] == pytest.approx(0.935, abs=1e-4)


def test_muon_decay():
    found = [schedules.muon_decay_multiplier(step, STEPS) for step in (0, STEPS // 2, STEPS, STEPS + 5)]
    assert found == pytest.approx([1, 0.5, 0, 0])


@pytest.mark.parametrize("ratio, warmup", [(0.0, 0), (1.0, 0), (0.65, 40)])
def test_short_runs_and_extremes_stay_in_bounds(ratio, warmup):
    config = replace(CONFIG, warmdown_ratio=ratio, warmup_steps=warmup)
    for total in (1, 2, 10):
        for step in range(total + 3):
            assert 0 < schedules.lr_multiplier(step, total, config) <= 1
            assert 0.85 <= schedules.muon_momentum(step, total, config) <= 0.97
    with pytest.raises(ValueError, match="total_steps=0"):
        schedules.lr_multiplier(0, 0, config)


def recipe_780m(**optimizer):
    model = ModelConfig(num_layers=24, hidden_size=1536, num_attention_heads=12, value=ValueConfig(source="bank"))
    return Recipe(model=model, train=TrainConfig(global_batch_size=512), optimizer=OptimizerConfig(**optimizer))


def test_780m_rates_are_the_paper_s():
    settings = group_settings(recipe_780m())
    assert set(settings) == set(KINDS)
    rates = {kind: settings[kind].lr for kind in ("matrix", "embedding", "table", "output", "coefficient")}
    assert rates == pytest.approx(
        {"matrix": 0.0283, "embedding": 0.30, "table": 0.15, "output": 0.008, "coefficient": 0.707}, rel=1e-3
    )
    assert settings["matrix"].weight_decay == pytest.approx(0.0597, rel=1e-3)
    assert settings["projection_coefficient"].lr == pytest.approx(settings["coefficient"].lr / 100)
    decays = {kind: settings[kind].weight_decay for kind in KINDS if kind != "matrix"}
    assert decays == {
        "embedding": 0.001,
        "output": 0.01,
        "table": 0.01,
        "coefficient": 0.0,
        "projection_coefficient": 0.05,
        "smear": 0.0,
    }


def test_muon_takes_matrices_alone():
    by_muon = {kind for kind, settings in group_settings(recipe_780m()).items() if settings.algorithm == "muon"}
    assert by_muon == {"matrix"}
    plain = group_settings(recipe_780m(name="adamw"))
    assert {settings.algorithm for settings in plain.values()} == {"adamw"}
    assert plain["matrix"].betas == (0.9, 0.95)
    assert plain["matrix"].lr == pytest.approx(0.0006 * 2**0.5)
