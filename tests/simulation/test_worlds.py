"""What a step costs a rank doesn't grow with the world: messages, kernels, waits, memory."""

from bov_megatron.recipe import load_recipe
from tests.support.distributed import run_ranks
from tests.support.fake_world import hide_gpus

WORLDS = (16, 512, 4096)
OVERRIDES = ["model.num_layers=2", "train.micro_batch_size=1"]


def steps(rank, world_size):
    """Rank 0's, which owns the most, with one micro-batch in any world."""
    from bov_megatron.simulation import simulate

    hide_gpus()
    return [
        simulate(load_recipe("recipes/135m_bov.yaml", [*OVERRIDES, f"train.global_batch_size={ranks}"]), ranks)
        for ranks in WORLDS
    ]


def test_a_step_does_not_grow_with_the_world():
    ((smallest, *larger),) = run_ranks(steps, 1)
    for step in (smallest, *larger):
        peak = step.peak_memory_bytes
        sent = sum(entry["bytes"] for entry in step.collectives)
        # Every gradient and every weight once; little more for their way to and from owners.
        assert 0.9 < sent / (peak["gradients"] + peak["weights"]) < 1.05
        assert step.host_waits == 1
    for step in larger:
        for entry, least in zip(step.collectives, smallest.collectives, strict=True):
            assert entry["count"] <= least["count"], "gradients: fewer and larger buckets"
        assert step.launches <= smallest.launches
        for phase, size in step.phase_peak_bytes.items():
            assert size["total"] <= smallest.phase_peak_bytes[phase]["total"]
