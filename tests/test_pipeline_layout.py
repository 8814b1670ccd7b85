"""The layers that the plan counts on a stage are those that Megatron builds there."""

import pytest

from bov_megatron.pipeline_layout import layers_of_chunks
from bov_megatron.recipe import Recipe, ValueConfig
from tests.distributed import run_ranks
from tests.parity import small_model, small_recipe

PP2, PP4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}
LAYOUTS = {
    "even": PP4,
    "interleaved": {**PP2, "virtual_pipeline_model_parallel_size": 4},
}


def built_rank(rank: int, world_size: int, recipe_dict: dict) -> list[tuple[list[int], list[str]]]:
    """Layers of each model chunk, by Megatron's own numbers and by the names of their parameters."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.model.naming import local_parameters
    from bov_megatron.parallel import process_groups

    recipe = Recipe.from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe, with_optimizer=False)
    return [
        (
            [layer.layer_number - 1 for layer in chunk.decoder.layers],
            sorted({spec.layer for local in local_parameters(chunk) for spec in local.specs} - {None}),
        )
        for chunk in engine.chunks
    ]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_planned_layers_are_built(layout):
    model = small_model(num_layers=8, value=ValueConfig(source="bank"))
    recipe = small_recipe(model, **LAYOUTS[layout])
    planned = [[list(chunk) for chunk in stage] for stage in layers_of_chunks(recipe)]
    assert sorted(layer for stage in planned for chunk in stage for layer in chunk) == list(range(8))
    built = run_ranks(built_rank, recipe.parallel.pipeline_model_parallel_size, recipe.to_dict())
    assert built == [[(layers, layers) for layers in stage] for stage in planned]


def test_chunks_of_an_interleaved_pipeline_go_round_the_stages():
    recipe = small_recipe(small_model(num_layers=8), **LAYOUTS["interleaved"])
    stages = [[list(chunk) for chunk in stage] for stage in layers_of_chunks(recipe)]
    assert stages == [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]
