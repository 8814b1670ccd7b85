"""The layers that the plan counts on a stage are those that Megatron builds there."""

import itertools
import random
from pathlib import Path

import pytest

from bov_megatron.plan import Plan, plan
from bov_megatron.recipe import ValueConfig, load_recipe, recipe_from_dict
from bov_megatron.recipe.pipeline import balanced_sizes, layers_of_chunks
from tests.support.distributed import run_ranks
from tests.support.parity import small_model, small_recipe

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "780m_bov.yaml"

PP2, PP4 = {"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 4}
LAYOUTS = {
    "even": PP4,
    "interleaved": {**PP2, "virtual_pipeline_model_parallel_size": 4},
    "listed": {**PP4, "pipeline_layers": [1, 3, 2, 2]},
    "listed, interleaved": {**PP2, "virtual_pipeline_model_parallel_size": 2, "pipeline_layers": [1, 3, 2, 2]},
    "time": {**PP4, "pipeline_balance": "time"},
    "memory": {**PP4, "pipeline_balance": "memory"},
}


def built_rank(rank: int, world_size: int, recipe_dict: dict) -> list[tuple[list[int], list[str]]]:
    """Layers of each model chunk, by Megatron's own numbers and by the names of their parameters."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe, with_optimizer=False)
    return [
        (
            [layer.layer_number - 1 for layer in chunk.decoder.layers],
            sorted({spec.layer for local in chunk.local_parameters for spec in local.specs} - {None}),
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


@pytest.mark.parametrize("layers, count", [(4, 1), (5, 5), (7, 3), (9, 4)])
def test_no_split_has_a_cheaper_worst_part(layers, count):
    draw = random.Random(layers)
    for _ in range(5):
        costs = [[draw.uniform(1, 9) for _ in range(layers)] for _ in range(count)]

        def cost(part, first, stop, costs=costs):
            return sum(costs[part][first:stop])

        def worst(sizes, cost=cost):
            ends = [0, *itertools.accumulate(sizes)]
            return max(cost(part, *ends[part : part + 2]) for part in range(len(sizes)))

        splits = [s for s in itertools.product(range(1, layers + 1), repeat=count) if sum(s) == layers]
        sizes = balanced_sizes(layers, count, cost)
        assert tuple(sizes) in splits
        assert worst(sizes) == pytest.approx(min(map(worst, splits)))


def planned(*overrides: str) -> Plan:
    return plan(load_recipe(RECIPE, ["parallel.pipeline_model_parallel_size=4", *overrides]))


def test_balance_does_what_it_says():
    """Of 24 layers on four stages, 16-23 have banks and 23 is followed by the output matrix."""
    even = planned()
    assert even.layers_per_stage == [6, 6, 6, 6]
    time, memory = (planned(f"parallel.pipeline_balance={what}") for what in ("time", "memory"))
    assert max(time.flops_share_by_stage) < max(even.flops_share_by_stage)
    assert memory.memory_per_rank_bytes < even.memory_per_rank_bytes
    assert memory.layers_per_stage[0] < 6, "the first stage keeps most micro-batches"
    lean = planned("parallel.pipeline_balance=memory", "parallel.recompute=full", "train.micro_batch_size=1")
    assert lean.layers_per_stage[3] < lean.layers_per_stage[1], "without activations, tables weigh most"
    same = planned(f"parallel.pipeline_layers={memory.layers_per_stage}")
    assert same.memory_by_stage == memory.memory_by_stage


def test_memory_is_balanced_by_what_the_plan_says():
    from bov_megatron.recipe.memory import memory_by_stage, stage_bytes

    recipe = load_recipe(RECIPE, ["parallel.pipeline_model_parallel_size=4", "parallel.pipeline_layers=[3,9,7,5]"])
    count = stage_bytes(recipe, 3)
    assert [sum(stage.values()) for stage in memory_by_stage(recipe, layers_of_chunks(recipe), 3)] == [
        count(0, 0, 3), count(1, 3, 12), count(2, 12, 19), count(3, 19, 24)
    ]  # fmt: skip
