"""Which changes of a recipe make another run of it, and which don't."""

import dataclasses

import pytest

from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.fields import Recipe
from bov_megatron.recipe.identity import EXECUTION, deciding_differences, flatten, recipe_digest
from tests.support.runs import SMOKE

BASE = load_recipe(SMOKE)


@pytest.mark.parametrize(
    "change",
    ["train.seed=2", "optimizer.table_lr=0.1", "model.value.source=projection", "data.path=elsewhere", "train.steps=9"],
)
def test_another_run(change):
    other = load_recipe(SMOKE, [change])
    assert recipe_digest(other) != recipe_digest(BASE)
    (name,) = deciding_differences(BASE.to_dict(), other)
    assert change.startswith(f"{name}=")


@pytest.mark.parametrize(
    "change",
    [
        *("name=other", "output_dir=elsewhere", "parallel.tensor_model_parallel_size=1", "logging.interval=7"),
        *(
            "checkpoint.interval=3",
            "train.micro_batch_size=4",
            "data.num_workers=0",
            "model.value.lookup=reduce_scatter",
        ),
    ],
)
def test_the_same_run_elsewhere(change):
    other = load_recipe(SMOKE, [change])
    assert other != BASE
    assert recipe_digest(other) == recipe_digest(BASE)
    assert deciding_differences(BASE.to_dict(), other) == {}


def test_a_recipe_of_an_earlier_version_lacks_fields():
    stored = BASE.to_dict()
    del stored["health"]["spike_window"]
    assert deciding_differences(stored, BASE) == {}
    changed = dataclasses.replace(BASE, health=dataclasses.replace(BASE.health, spike_window=4))
    assert deciding_differences(stored, changed) == {"health.spike_window": (128, 4)}


def test_every_field_left_out_exists():
    known = flatten(Recipe().to_dict())
    assert [name for name in EXECUTION if not any(f"{field}.".startswith(f"{name}.") for field in known)] == []


def test_streams_of_a_mixture_count():
    mixed = ["data.path=null", "data.streams=[{path: a}, {path: b, weight: 2}]"]
    one, other = load_recipe(SMOKE, mixed), load_recipe(SMOKE, [mixed[0], mixed[1].replace("2", "3")])
    assert recipe_digest(one) != recipe_digest(other)
    assert list(deciding_differences(one.to_dict(), other)) == ["data.streams"]
    assert deciding_differences(one.to_dict(), one) == {}
