"""A simulated step sends, computes and holds what a real one does, in real process groups."""

from collections import Counter

import pytest
import torch

from bov_megatron.recipe import ParallelConfig, Recipe, TrainConfig, ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks
from tests.support.fake_world import hide_gpus
from tests.support.parity import small_model

BANK = ValueConfig(source="bank", target_layers="last_two_thirds")


def make_recipe(sequences=4, value=BANK, precision="fp32", vocab_size=96, **layout) -> Recipe:
    model = small_model(value=value, hidden_size=64, vocab_size=vocab_size)
    train = TrainConfig(micro_batch_size=1, global_batch_size=sequences, steps=10, precision=precision, compile=False)
    return Recipe(model=model, parallel=ParallelConfig(**layout), train=train)


def counted(measured) -> dict:
    """What `Measured` has, by kind."""
    messages, sizes = Counter(), Counter()
    for message in measured.collectives:
        if len(message.group) > 1:
            messages[message.kind, message.group] += 1
            sizes[message.kind, message.group] += message.bytes
    return {"messages": messages, "bytes": sizes, "memory": measured.memory, "counts": vars(measured.counts)}


def really(rank, world_size, recipe_dict):
    """A step of this rank among real ones."""
    from bov_megatron.parallel import process_groups
    from bov_megatron.simulation.step import measured_step
    from bov_megatron.simulation.tracker import Tracker

    hide_gpus()
    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    with Tracker("buffers") as tracker:
        return counted(measured_step(recipe, tracker))


def simulated_ranks(rank, world_size, recipe_dict, simulated_world):
    from bov_megatron.simulation.step import simulated

    hide_gpus()
    recipe = recipe_from_dict(recipe_dict)
    return [counted(simulated(recipe, simulated_world, member, gpu=False)) for member in range(simulated_world)]


LAYOUTS = {
    "data": (2, make_recipe(8)),
    "tensor, sequence": (2, make_recipe(5, tensor_model_parallel_size=2, sequence_parallel=True, precision="bf16")),
    "tensor and data, recomputed": (4, make_recipe(4, tensor_model_parallel_size=2, recompute="full")),
    "pipeline and data": (4, make_recipe(10, pipeline_model_parallel_size=2)),
    "interleaved": (2, make_recipe(4, pipeline_model_parallel_size=2, virtual_pipeline_model_parallel_size=2)),
    "context, overlapped": (
        2,
        make_recipe(3, context_parallel_size=2, overlap_param_gather=True),
    ),
    "unsharded": (2, make_recipe(2, use_distributed_optimizer=False, value=ValueConfig())),
    "host tables": (2, make_recipe(8, value=ValueConfig(source="bank", table_memory="host"), vocab_size=512)),
}


def peaks(counted: dict) -> dict[str, int]:
    """Bytes by phase."""
    return {phase: sum(kinds.values()) for phase, kinds in counted["memory"].items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_simulated_step_is_what_a_real_one_is(name):
    world_size, recipe = LAYOUTS[name]
    (simulated,) = run_ranks(simulated_ranks, 1, recipe.to_dict(), world_size)
    # gloo's threads let go of a message's tensors when they get to it, and a real step's peak may have them still.
    for _ in range(5):
        real = run_ranks(really, world_size, recipe.to_dict())
        if [peaks(found) for found in simulated] == [pytest.approx(peaks(wanted), rel=0.01) for wanted in real]:
            break
    for found, wanted in zip(simulated, real, strict=True):
        assert found["messages"] == wanted["messages"]
        assert found["bytes"] == wanted["bytes"] and sum(found["bytes"].values()) > 0
        assert found["memory"].keys() == wanted["memory"].keys() == {"forward and backward", "update"}
        assert peaks(found) == pytest.approx(peaks(wanted), rel=0.01)
        for phase, kinds in wanted["memory"].items():
            for kind in ("weights", "gradients", "optimizer"):
                assert found["memory"][phase][kind] == kinds[kind] > 0
        assert found["counts"]["flops"] == wanted["counts"]["flops"] > 0
        # A real step on a CPU cannot tell the host's work from the device's.
        assert found["counts"]["launches"] == pytest.approx(wanted["counts"]["launches"], rel=0.1)
        assert found["counts"]["host_waits"] == 1


def kept_by_regions(rank, world_size):
    """Per region, bytes that its backward pass keeps: compiled, and as a simulation has it."""
    from bov_megatron.model.attention import rotary_cos_sin, rotate_and_normalise
    from bov_megatron.model.decoder import _smear
    from bov_megatron.model.norm import add_and_normalise, normalise
    from bov_megatron.model.spec import squared_relu
    from bov_megatron.parallel import regions
    from bov_megatron.simulation.as_gpu import Compiled
    from bov_megatron.simulation.tracker import Tracker

    hide_gpus()

    def tensor(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, requires_grad=True)

    cases = {
        "normalise": (normalise, tensor(64, 2, 128)),
        "add_and_normalise": (add_and_normalise, tensor(64, 2, 128), tensor(64, 2, 128)),
        "squared_relu": (squared_relu, tensor(64, 2, 512)),
        "rotate_and_normalise": (
            *(rotate_and_normalise, tensor(64, 2, 4, 32), tensor(64, 2, 4, 32)),
            *(rotary_cos_sin(torch.arange(64), 32, 1e5), 1.2),
        ),
        "smear": (_smear, tensor(64, 2, 128), tensor(1, 24), tensor(1)),
    }
    regions.BACKEND = _partitioned
    regions.enable(True)
    found = {}
    for name, (function, *arguments) in cases.items():
        compiled = _kept(function, arguments)
        with Tracker("activations") as tracker, regions.replaced_by(Compiled(tracker)):
            found[name] = compiled, _kept(function, arguments)
    return found


def _partitioned(graph, inputs):
    """Inductor's choice of what the backward pass keeps, without its code."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=lambda g, _: g, partition_fn=min_cut_rematerialization_partition)
    return compiler(graph, inputs)


def _kept(function, arguments) -> int:
    storages = {}

    def pack(saved):
        storages[saved.untyped_storage().data_ptr()] = saved  # held, so that no address is used again
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        results = function(*arguments)
    del results
    return sum(saved.untyped_storage().nbytes() for saved in storages.values())


def test_compiled_regions_keep_what_a_simulation_says():
    (found,) = run_ranks(kept_by_regions, 1)
    for name, (compiled, simulated) in found.items():
        assert simulated == pytest.approx(compiled, rel=0.1), name
