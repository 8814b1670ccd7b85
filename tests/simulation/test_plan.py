"""The plan's memory and messages against simulated steps of the shipped recipes and of many layouts."""

import pytest

from bov_megatron.recipe import load_recipe
from tests.support.distributed import run_ranks
from tests.support.fake_world import hide_gpus

TP, PP = (f"parallel.{name}_model_parallel_size=2" for name in ("tensor", "pipeline"))
CP = "parallel.context_parallel_size=2"
SP = "parallel.sequence_parallel=true"
HOST = "model.value.table_memory=host"
SHIPPED = ("135m_baseline", "135m_bov", "780m_baseline", "780m_bov", "smoke")
# Four layers of the 780M model, on 16 ranks: rank to simulate, overrides.
LAYOUTS = {
    "small micro-batch, tensor 4": (5, ["train.micro_batch_size=1", "parallel.tensor_model_parallel_size=4"]),
    "fp32": (0, ["train.precision=fp32"]),
    "tensor, sequence": (0, [TP, SP]),
    "tensor, lookups reduce-scattered": (0, [TP, "model.value.lookup=reduce_scatter"]),
    "tensor, tables by heads": (0, [TP, SP, "model.value.table_partition=head"]),
    "tensor, embedding projected": (0, [TP, SP, "model.value.source=embedding_projection"]),
    "last stage": (8, [PP]),
    "interleaved": (0, [PP, "parallel.virtual_pipeline_model_parallel_size=2", TP]),
    "context": (0, [CP]),
    "recomputed": (0, ["parallel.recompute=full"]),
    "partly recomputed, tensor": (0, ["parallel.recompute=full", "parallel.recompute_num_layers=2", TP, SP]),
    "attention recomputed": (0, ["parallel.recompute=selective", CP]),
    "host tables, tensor": (0, [HOST, TP, SP]),
    "overlapped": (0, ["parallel.overlap_param_gather=true"]),
    "unsharded": (0, ["parallel.use_distributed_optimizer=false"]),
    "AdamW": (0, ["optimizer.name=adamw"]),
    "grouped queries": (0, ["model.num_query_groups=4", TP]),
}
FOUR_LAYERS = ["model.num_layers=4", "train.micro_batch_size=4", "train.global_batch_size=64"]


def cases():
    for name in SHIPPED:
        yield name, f"recipes/{name}.yaml", 2 if name == "smoke" else 16, 0, []
    for name, (rank, overrides) in LAYOUTS.items():
        yield name, "recipes/780m_bov.yaml", 16, rank, [*FOUR_LAYERS, *overrides]
    yield "512 ranks", "recipes/780m_bov.yaml", 512, 0, ["train.micro_batch_size=1"]


def compared(rank, world_size):
    """Per case, planned and simulated: memory, host memory, bytes of messages, seconds of a step."""
    from bov_megatron.plan import plan
    from bov_megatron.recipe import pipeline, traffic
    from bov_megatron.simulation import simulate

    hide_gpus()
    found = {}
    for name, path, ranks, member, overrides in cases():
        recipe = load_recipe(path, overrides)
        step, planned = simulate(recipe, ranks, member), plan(recipe, ranks)
        stage = step.place["pipeline"]
        layers = pipeline.layers_of_chunks(recipe)
        messages = traffic.traffic_of_stage(recipe, layers, planned.data_parallel_size, stage)
        found[name] = {
            "memory": (sum(planned.memory_by_stage[stage].values()), step.peak_memory_bytes["total"]),
            "host": (planned.host_memory_per_rank_bytes, step.host_memory_bytes),
            "messages": (sum(m.bytes for m in messages), sum(entry["bytes"] for entry in step.collectives)),
            "seconds": (_seconds(recipe, layers, planned, stage), step.step_seconds),
        }
    return found


def _seconds(recipe, layers, planned, stage) -> float:
    """The plan's, of this pipeline stage; a plan prints the slowest."""
    from bov_megatron import plan

    return plan.least_time(recipe, layers, planned.data_parallel_size, stage)[1].seconds


@pytest.fixture(scope="module")
def found():
    (result,) = run_ranks(compared, 1)
    return result


@pytest.mark.parametrize("name", [case[0] for case in cases()])
def test_plan_is_within_five_percent_of_a_simulated_step(found, name):
    for what in ("memory", "host", "messages"):
        planned, simulated = found[name][what]
        assert planned == pytest.approx(simulated, rel=0.05), what
    planned, simulated = found[name]["seconds"]
    assert planned == pytest.approx(simulated, rel=0.1)
    assert found[name]["memory"][1] > 0 and found[name]["messages"][1] > 0
