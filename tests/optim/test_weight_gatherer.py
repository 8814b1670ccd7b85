"""What a rank receives to have all updated weights: about their size, in worlds of any size."""

import pytest
from torch._subclasses.fake_tensor import FakeTensorMode

from bov_megatron.optim import weight_gatherer
from bov_megatron.optim.groups import group_settings
from bov_megatron.optim.optimizer import assign_rows
from bov_megatron.optim.parameter_shard import ParameterShard
from bov_megatron.recipe import load_recipe
from bov_megatron.simulation.collectives import Traffic, fake_world
from tests.support.distributed import run_ranks
from tests.support.fake_world import fake_parameters

ONE_RANK = ["parallel.tensor_model_parallel_size=1", "parallel.sequence_parallel=false"]


def measured(rank, world_size, path, overrides, worlds, bucket_elements):
    """Per world, of its first and its last rank: traffic of `gather` and of `start`."""
    recipe = load_recipe(path, overrides)
    found = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = fake_parameters(recipe)
        for ranks in worlds:
            assignments = assign_rows(parameters, group_settings(recipe), ranks, sharded=True)
            for member in (0, ranks - 1):
                with fake_world(member, ranks) as group:
                    shards = [ParameterShard(*pair, member) for pair in zip(parameters, assignments, strict=True)]
                    gathered = [p for p in shards if not p.assignment.replicated]
                    gatherer = weight_gatherer.WeightGatherer(
                        [p.local.parameter for p in gathered],
                        [p.assignment for p in gathered],
                        group,
                        bucket_elements or weight_gatherer.BUCKET_ELEMENTS,
                        [p.local.forward_position for p in gathered],
                    )
                    with Traffic() as traffic:
                        gatherer.gather([p.main for p in gathered])
                    with Traffic() as started:
                        gatherer.start([p.main for p in gathered])
                    gatherer.finish()
                    found[ranks, member] = {
                        "weights": sum(p.local.parameter.nbytes for p in gathered),
                        "own": sum(p.main.numel() for p in gathered) * gathered[0].local.parameter.element_size(),
                        "item": gathered[0].local.parameter.element_size(),
                        "gather": [vars(message) for message in traffic.messages],
                        "start": [vars(message) for message in started.messages],
                        "all_gathers": sum(message.kind == "all_gather" for message in traffic.messages),
                        "copies": traffic.copies,
                    }
    return found


@pytest.mark.parametrize(
    ("recipe", "overrides", "worlds", "bucket_elements"),
    [
        ("780m_bov", ONE_RANK, (2, 16, 64, 512, 4096), None),
        ("135m_bov", ["train.precision=fp32"], (2, 512), 16_000_000),
        ("135m_bov", ["optimizer.name=adamw"], (2, 512), None),
    ],
    ids=str,
)
def test_a_rank_receives_the_size_of_the_weights_in_any_world(recipe, overrides, worlds, bucket_elements):
    (found,) = run_ranks(measured, 1, f"recipes/{recipe}.yaml", overrides, worlds, bucket_elements)
    bucket_elements = bucket_elements or weight_gatherer.BUCKET_ELEMENTS
    for (ranks, _), rank in found.items():
        for messages in (rank["gather"], rank["start"]):
            assert sum(message["received"] for message in messages) < 1.01 * rank["weights"]
            # Not less than what it lacks, either.
            assert sum(message["received"] for message in messages) >= rank["weights"] - rank["own"]
            assert max(message["buffer"] for message in messages) <= rank["item"] * (bucket_elements + ranks)
            buffers = [message["buffer"] for message in messages if message["kind"] == "all_gather"]
            assert sum(buffers) < 1.01 * rank["weights"], "held at once while `start` is under way"
            spread = [message for message in messages if message["kind"] == "all_to_all"]
            assert sum(message["sent"] for message in spread) <= rank["own"]
    for number in ("all_gathers", "copies"):
        of_two = max(rank[number] for (ranks, _), rank in found.items() if ranks == 2)
        assert max(rank[number] for rank in found.values()) <= of_two, f"{number} must not grow with the world"
