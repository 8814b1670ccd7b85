"""The plan's activation memory against what autograd really keeps, on the real model."""

import dataclasses

import pytest

from bov_megatron.recipe import ModelConfig, Recipe, ValueConfig, recipe_from_dict
from bov_megatron.recipe.memory import (
    checkpoint_bytes,
    host_memory_by_stage,
    layer_activations,
    memory_by_stage,
    stage_bytes,
)
from bov_megatron.recipe.pipeline import layers_of_chunks
from bov_megatron.recipe.value_sources import VALUE_SOURCES
from tests.support.distributed import run_ranks


def kept_for_backward(rank, world_size, *recipe_dicts):
    """Per recipe, all of one layout: bytes that the forward pass of one micro-batch keeps."""
    from bov_megatron.parallel import process_groups

    recipes = [recipe_from_dict(values) for values in recipe_dicts]
    process_groups.initialize(recipes[0], rank, world_size)
    return [_kept(recipe) for recipe in recipes]


def _kept(recipe: Recipe) -> int:
    """Bytes of distinct tensors, parameters excluded, that autograd saves, and of rows that lookups keep."""
    import torch

    from bov_megatron.model import context_parallel
    from bov_megatron.model.bank import lookup_ahead
    from bov_megatron.model.decoder import BovModel

    model = BovModel(recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so that no address is reused
        return tensor

    shape = (recipe.train.micro_batch_size, recipe.model.sequence_length)
    ids = torch.randint(0, recipe.model.vocab_size, shape)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(ids, context_parallel.take(ids, 1, model.pg_collection.cp))
    lookups = [lookup for under_way in lookup_ahead._under_way.values() for lookup in under_way._lookups.values()]
    own_lookups = [lookup for lookup in lookups if lookup.table in set(model.modules())]
    rows = sum(lookup.rows_Uk.nbytes for lookup in own_lookups if lookup.rows_Uk is not None)
    del loss  # up to here it kept the lookups alive
    return rows + sum(size for size, _ in kept.values())


def stored_bytes(rank, world_size, recipe_dict):
    """This rank's bytes of weights, main gradients and optimizer state after one step."""
    import torch

    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    shape = (recipe.train.micro_batch_size, recipe.model.sequence_length + 1)
    engine.train_step([torch.randint(0, recipe.model.vocab_size, shape)])
    weights = sum(parameter.nbytes for parameter in engine.model.parameters())
    gradients = sum(parameter.main_grad.nbytes for parameter in engine.model.parameters())
    state = [*engine.optimizer.state_tensors(), *engine.optimizer.second_moments()]
    return weights, gradients, sum(entry[-1].nbytes for entry in state)


def make_recipe(layers: int, source: str = "projection", **layout) -> Recipe:
    recipe = Recipe()
    recipe.model = ModelConfig(
        num_layers=layers, hidden_size=128, num_attention_heads=4, vocab_size=256, sequence_length=256,
        window_pattern="L", value=ValueConfig(source, "every"),
    )  # fmt: skip
    recipe.parallel = dataclasses.replace(recipe.parallel, **layout)
    recipe.train.micro_batch_size, recipe.train.global_batch_size, recipe.train.steps = 2, 2, 1
    recipe.train.precision, recipe.train.compile = "fp32", False
    return recipe


LAYOUTS = {
    "one": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "tp2-sp": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


KEEPING_PROJECTED_VALUES = {"scaled_projection", "projection_plus_bank", "projection_plus_first_layer"}
CASES = [(source, "one", "learned") for source in VALUE_SOURCES]
CASES += [("bank", "tp2", "learned"), ("bank", "tp2-sp", "learned"), ("bank", "one", "fixed")]
CASES += [("bank", "cp2", "learned"), ("projection_plus_bank", "cp2", "learned")]
CASES += [("projection", "tp2-sp", "learned"), ("projection_plus_bank", "one", "fixed")]


@pytest.mark.parametrize(("source", "layout", "coefficient"), CASES)
def test_layer_keeps_what_the_plan_says(source, layout, coefficient):
    recipes = [make_recipe(layers, source, **LAYOUTS[layout]) for layers in (2, 4)]
    for recipe in recipes:
        recipe.model.value.coefficient = coefficient
    parallel = recipes[0].parallel
    tensor, context = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    planned = layer_activations(recipes[1], 1)
    if source == "projection" or (source in KEEPING_PROJECTED_VALUES and coefficient == "learned"):
        # Uncompiled, rotation copies q and k while their fused projection lives on: the kept values are a view into it.
        planned += 2 * 256 * 2 * 128 * 4 // tensor // context
    two, four = run_ranks(kept_for_backward, tensor * context, *(recipe.to_dict() for recipe in recipes))[0]
    assert (four - two) / 2 == pytest.approx(planned, rel=0.02)


def test_full_recomputation_keeps_layer_inputs_only():
    recipes = [make_recipe(layers, "bank", recompute="full") for layers in (2, 4)]
    two, four = run_ranks(kept_for_backward, 1, *(recipe.to_dict() for recipe in recipes))[0]
    residual = 2 * 256 * 128 * 4
    assert (four - two) / 2 == pytest.approx(residual, rel=0.05)
    planned = [memory_by_stage(recipe, layers_of_chunks(recipe), 1)[0]["activations"] for recipe in recipes]
    assert (planned[1] - planned[0]) / 2 == residual


def test_recomputed_layers_keep_the_rows_that_were_sent_ahead():
    recipes = [make_recipe(layers, "bank", recompute="full", **LAYOUTS["tp2"]) for layers in (2, 4)]
    two, four = run_ranks(kept_for_backward, 2, *(recipe.to_dict() for recipe in recipes))[0]
    planned = [memory_by_stage(recipe, layers_of_chunks(recipe), 1)[0]["activations"] for recipe in recipes]
    assert (planned[1] - planned[0]) / 2 == 2 * 256 * 128 * 4 + 256 * 64 * 4
    assert four - two == pytest.approx(planned[1] - planned[0], rel=0.05)  # a few of the 256 ids don't come up


def test_recomputation_of_some_layers_keeps_the_others_whole():
    recipes = [make_recipe(4, "bank", recompute="full", recompute_num_layers=number) for number in (1, 3)]
    one, three = run_ranks(kept_for_backward, 1, *(recipe.to_dict() for recipe in recipes))[0]
    planned = [memory_by_stage(recipe, layers_of_chunks(recipe), 1)[0]["activations"] for recipe in recipes]
    assert one - three == pytest.approx(planned[0] - planned[1], rel=0.02)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weights_gradients_and_optimizer_state_are_what_the_plan_says(precision):
    recipe = make_recipe(2, "bank")
    recipe.train.precision = precision
    weights, gradients, state = run_ranks(stored_bytes, 1, recipe.to_dict())[0]
    planned = memory_by_stage(recipe, layers_of_chunks(recipe), 1)[0]
    stored = planned["weights"] + planned["gradients"] + planned["optimizer"] + planned["tables"]
    assert weights + gradients + state == stored
    assert weights + state == checkpoint_bytes(recipe)


def test_tables_in_host_memory_leave_the_device():
    recipe = make_recipe(4, "bank", tensor_model_parallel_size=2, pipeline_model_parallel_size=2)
    on_device = memory_by_stage(recipe, layers_of_chunks(recipe), 2)
    recipe.model.value.table_memory = "host"
    found, host = (
        memory_by_stage(recipe, layers_of_chunks(recipe), 2),
        host_memory_by_stage(recipe, layers_of_chunks(recipe), 2),
    )
    for stage in (0, 1):
        assert found[stage] == {**on_device[stage], "tables": 0}
        # Two tables, half of the 256 rows each: fp32 weights and gradients, and half of AdamW's two moments.
        assert host[stage] == on_device[stage]["tables"] == 2 * 128 * 128 * (4 + 4 + 4)
    counts = [stage_bytes(recipe, 2)(stage, 2 * stage, 2 * stage + 2) for stage in (0, 1)]
    assert counts == [sum(stage.values()) for stage in found]


def test_distributed_optimizer_divides_the_state():
    recipe = make_recipe(4, "bank", tensor_model_parallel_size=2)
    recipe.train.micro_batch_size = 1
    ranks = run_ranks(stored_bytes, 4, recipe.to_dict())
    planned = memory_by_stage(recipe, layers_of_chunks(recipe), 2)[0]
    stored = planned["weights"] + planned["gradients"] + planned["optimizer"] + planned["tables"]
    for rank in ranks:  # whole matrices have one owner each, so shares are not quite equal
        assert sum(rank) == pytest.approx(stored, rel=0.02)


def test_weights_on_their_way_are_counted_where_nothing_else_takes_more():
    recipe = Recipe(model=ModelConfig(num_layers=4, hidden_size=128, num_attention_heads=4))
    recipe.parallel.overlap_param_gather = True
    alone, two = (memory_by_stage(recipe, layers_of_chunks(recipe), ranks)[0] for ranks in (1, 2))
    assert alone["buffers"] == two["buffers"] == 0 < two["activations"]
    recipe.model.sequence_length = 32
    alone, two = (memory_by_stage(recipe, layers_of_chunks(recipe), ranks)[0] for ranks in (1, 2))
    assert two["buffers"] == two["weights"] > alone["buffers"] and two["activations"] == two["logits"] == 0
