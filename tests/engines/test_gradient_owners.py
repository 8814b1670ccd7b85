"""Gradients are reduced to the ranks that update with them, and to no others."""

from bov_megatron.recipe import ValueConfig, recipe_from_dict
from bov_megatron.simulation.collectives import Traffic
from tests.support.distributed import run_ranks
from tests.support.parity import (
    batch,
    gather_gradients,
    load_weights,
    my_micro_batches,
    random_weights,
    small_model,
    small_recipe,
)


def reduced(rank, world_size, recipe_dict):
    """Bytes of the gradients; what forward and backward pass receive from other ranks; of each table, the rows that
    have a gradient as the engine counts them, and in the whole gradient."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.optim import optimizer
    from bov_megatron.parallel import process_groups, regions

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    optimizer.SMALL_TENSOR_ELEMENTS = 256  # tables and embedding are split by rows
    engine = MegatronEngine(recipe)
    load_weights(engine, random_weights(recipe.model))
    micro_batches = my_micro_batches(recipe, batch(0))
    with regions.uncompiled(), Traffic() as traffic:  # torch does not compile under a dispatch mode
        engine.forward_backward(micro_batches)
    gradients = sum(p.gradient().nbytes for p in engine.optimizer.parameters)
    tables = [local for local in engine.local_parameters() if local.kind == "table"]
    touched = [engine.table_sums(local.parameter, local.shape[0])[1] for local in tables]
    whole = gather_gradients(engine)
    counted = [int((whole[local.names[0]] != 0).any(dim=1).sum()) for local in tables]
    return gradients, traffic.received, touched, counted


def test_a_rank_receives_less_than_an_all_reduce_takes():
    recipe = small_recipe(small_model(value=ValueConfig(source="bank")))
    for gradients, received, touched, counted in run_ranks(reduced, 4, recipe.to_dict()):
        assert 0.75 * gradients < received < 1.1 * gradients  # an all-reduce: 1.5
        assert touched == counted and min(touched) > 0
