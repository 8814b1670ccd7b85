"""A model's parameters on one rank, without memory."""

from __future__ import annotations

from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import Recipe
from bov_megatron.simulation.collectives import fake_world


def fake_parameters(recipe: Recipe) -> list[LocalParameter]:
    """The parameters of the recipe's model on one rank of its tensor-parallel group, without memory. Enter
    `FakeTensorMode` first."""
    from bov_megatron.model.decoder import BovModel
    from bov_megatron.parallel import process_groups

    ranks = recipe.parallel.tensor_model_parallel_size
    with fake_world(0, ranks):
        process_groups.initialize(recipe, 0, ranks)
        return BovModel(recipe, pre_process=True, post_process=True).local_parameters
