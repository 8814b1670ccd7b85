"""What simulations in tests need: a process that sees no GPU, a model's parameters without memory."""

from __future__ import annotations

import os

from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import Recipe
from bov_megatron.simulation.collectives import fake_world


def hide_gpus() -> None:
    """From this process, before it uses one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def fake_parameters(recipe: Recipe) -> list[LocalParameter]:
    """The parameters of the recipe's model on one rank of its tensor-parallel group, without memory. Enter
    `FakeTensorMode` first."""
    from bov_megatron.model.decoder import BovModel
    from bov_megatron.parallel import process_groups

    ranks = recipe.parallel.tensor_model_parallel_size
    with fake_world(0, ranks):
        process_groups.initialize(recipe, 0, ranks)
        return BovModel(recipe, pre_process=True, post_process=True).local_parameters
