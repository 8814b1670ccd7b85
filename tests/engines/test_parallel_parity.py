"""Every parallel layout computes what one process computes: losses of two steps and all gradients."""

import functools

import pytest

from bov_megatron.recipe import ValueConfig
from bov_megatron.recipe.value_sources import VALUE_SOURCES
from tests.support.layouts import CP2, CP4, LAYOUTS, PP2, SP, TP2, TP4, VPP2
from tests.support.parity import small_model, small_recipe, train_on_layout, worst_gradient


@functools.lru_cache(maxsize=32)
def one_process(source: str, **value):
    return train_on_layout(small_recipe(small_model(value=ValueConfig(source=source, **value))), 1)


def check(source: str, world_size: int, layout: dict, micro_batch_size: int = 1, **value):
    losses, gradients = train_on_layout(
        small_recipe(small_model(value=ValueConfig(source=source, **value)), micro_batch_size, **layout), world_size
    )
    for layout_only in ("lookup", "table_partition", "table_memory"):
        value.pop(layout_only, None)
    expected_losses, expected_gradients = one_process(source, **value)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    error, worst = worst_gradient(gradients, expected_gradients)
    assert error < 1e-5, f"gradient of {worst} is off by {error:.1e}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bank_in_every_layout(layout):
    check("bank", *LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["tp2-sp", "pp2-tp2", "dp2"])
def test_projection(layout):
    check("projection", *LAYOUTS[layout])


@pytest.mark.parametrize("source", [s for s in VALUE_SOURCES if s not in ("projection", "bank")])
def test_every_value_source_over_tensor_parallel_ranks(source):
    check(source, *LAYOUTS["tp2-sp"])


@pytest.mark.parametrize("source", [s for s in VALUE_SOURCES if s not in ("projection", "bank")])
def test_every_value_source_over_context_parallel_ranks(source):
    check(source, *LAYOUTS["cp2"])


@pytest.mark.parametrize("source", [s for s in VALUE_SOURCES if s not in ("projection", "bank")])
def test_every_value_source_recomputed(source):
    check(source, *LAYOUTS["full"])


LOOKUPS = [
    {"lookup": "reduce_scatter"},
    {"table_partition": "head"},
]


@pytest.mark.parametrize("value", LOOKUPS)
def test_lookup_variants(value):
    check("bank", *LAYOUTS["tp4"], **value)


@pytest.mark.parametrize("source", ["bank", "projection_plus_bank", "gated_value_embedding"])
def test_shared_table(source):
    check(source, *LAYOUTS["tp2-sp"], table="shared")


@pytest.mark.parametrize("layout", ["dp2", "dp2-replicated-optimizer", "tp2-sp", "dp2-tp2", "pp2-full", "cp2-dp2"])
def test_tables_in_host_memory(layout):
    check("bank", *LAYOUTS[layout], table_memory="host")


def test_shared_table_in_host_memory():
    check("gated_value_embedding", *LAYOUTS["dp2"], table="shared", table_memory="host")


def test_shared_table_over_context_parallel_ranks():
    check("bank", *LAYOUTS["cp2"], table="shared")


SHARED_GROUPS = [
    # query groups, layout, value source, its options
    (2, TP4, "bank", {}),
    (1, TP4, "bank", {}),
    (1, {**TP2, **SP}, "bank", {}),
    (1, {**TP2, **CP2}, "bank", {}),
    (2, CP2, "projection", {}),
    (1, CP4, "bank", {}),
    # No gamma: one of this model's gradients is a sum of terms that nearly cancel.
    (2, TP4, "bank", {"table": "shared", "coefficient": "fixed"}),
    (2, TP4, "projection", {}),
    (2, {**TP4, **SP}, "projection_plus_bank", {}),
    (2, TP4, "projection_plus_embedding", {}),
    (2, TP4, "projection_plus_first_layer", {}),
]


@pytest.mark.parametrize("groups, layout, source, value", SHARED_GROUPS)
def test_shared_query_groups(groups, layout, source, value):
    model = small_model(num_query_groups=groups, value=ValueConfig(source=source, **value))
    expected_losses, expected_gradients = train_on_layout(small_recipe(model), 1)
    recipe = small_recipe(model, **layout)
    losses, gradients = train_on_layout(recipe, recipe.parallel.model_parallel_size)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    error, worst = worst_gradient(gradients, expected_gradients)
    assert error < 1e-5, f"gradient of {worst} is off by {error:.1e}"


def test_uneven_interleaved_pipeline():
    model = small_model(num_layers=6, value=ValueConfig(source="bank"))
    expected_losses, expected_gradients = train_on_layout(small_recipe(model), 1)
    recipe = small_recipe(model, **PP2, **VPP2, pipeline_layers=[1, 2, 2, 1])
    losses, gradients = train_on_layout(recipe, 2)
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert worst_gradient(gradients, expected_gradients)[0] < 1e-5


@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_micro_batch_of_two(layout):
    check("bank", *LAYOUTS[layout], micro_batch_size=2)
