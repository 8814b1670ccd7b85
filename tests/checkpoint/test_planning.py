"""What ranks tell each other in a save: everything once, then a few numbers, unless what a rank holds has changed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bov_megatron.errors import CheckpointError
from tests.checkpoint.test_checkpoint import start_engine
from tests.support.distributed import run_ranks
from tests.support.parity import batch, my_micro_batches, small_model, small_recipe


class Traffic(TorchDispatchMode):
    """Collectives of this rank: (operator, bytes of the tensors that it is given)."""

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
            self.calls.append((function.__name__.split(".")[0], sum(tensor.nbytes for tensor in tensors)))
        return function(*args, **(kwargs or {}))


def saving_rank(rank, world_size, run_dir):
    """Traffic of three saves, and whether the last one holds the weights that were saved."""
    from bov_megatron import checkpoint

    recipe = small_recipe(small_model(num_layers=2), tensor_model_parallel_size=2)
    engine = start_engine(rank, world_size, recipe)
    traffic = []
    for step in (1, 2, 3):
        engine.train_step(my_micro_batches(recipe, batch(step)))
        with Traffic() as of_save:
            checkpoint.begin_save(engine, run_dir, step, 9, extra={"step": step}, asynchronous=step == 3).finish()
        traffic.append(of_save.calls)
    weights = [parameter.detach().clone() for parameter in engine.model.parameters()]
    with torch.no_grad():
        for parameter in engine.model.parameters():
            parameter.zero_()
    extra = checkpoint.load(engine, checkpoint.newest_valid(run_dir)).extra
    same = all(torch.equal(*pair) for pair in zip(weights, engine.model.parameters(), strict=True))
    return traffic, extra, same


def test_metadata_is_exchanged_once(tmp_path):
    """What later saves exchange depends neither on the model nor, but for two checksums a rank, on the world."""
    for traffic, extra, same in run_ranks(saving_rank, 4, tmp_path):
        assert same and extra == {"step": 3}
        first, second, third = ([number for _, number in calls] for calls in traffic)
        assert sum(first) > 10_000 and sum(second) < 1000
        assert [name for name, _ in traffic[1]] == [name for name, _ in traffic[2]]
        # The folder's name and the outcome are broadcast; ranks agree on the plan, on errors and on places, and send
        # two checksums each.
        numbers = [number for name, number in traffic[1] if name != "broadcast_"]
        assert numbers == [8, 8, 8, (4 + 1) * 2 * 8]
    index = [(tmp_path / "checkpoints" / f"step_0000000{step}" / ".metadata").read_bytes() for step in (1, 2, 3)]
    assert index[0] == index[1] == index[2]


def changing_rank(rank, world_size, folder):
    """Saves of a state that changes on the second rank alone, each read back, and traffic of each."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

    from bov_megatron.checkpoint import writing
    from bov_megatron.checkpoint.planning import Planner
    from bov_megatron.parallel import process_groups

    process_groups.initialize(small_recipe(small_model(num_layers=2)), rank, world_size)
    planner = Planner(torch.distributed.group.WORLD)

    def state(number, replicas, text):
        tensors = {
            name: ShardedTensor.from_rank_offsets(name, torch.full((8,), float(number)), replica_id=rank)
            for name in ("a", "b", "c")
            if rank == 0 or name in replicas
        }
        tensors["split"] = ShardedTensor.from_rank_offsets(
            "split", torch.full((4,), 10.0 * number + rank), (0, rank, 2)
        )
        tensors["text"] = ShardedObject("text", text, (2,), (rank,))
        return tensors

    found = []
    saves = [(1, "abc", "x"), (2, "abc", "x"), (3, "a", "x"), (4, "abc", "x"), (5, "abc", "longer" * rank * 99)]
    for arguments in saves:
        target = folder / str(arguments[0])
        target.mkdir(exist_ok=True)
        torch.distributed.barrier()
        with Traffic() as traffic:
            written = writing.write_share(planner.plan(state(*arguments), target))
            index, files = planner.collect(written)
        assert written.error is None
        if rank == 0:
            writing.write_index(target, index)
            assert sorted(files) == sorted(path.name for path in target.glob("*.distcp"))
        torch.distributed.barrier()
        loaded = dist_checkpointing.load(state(0, "abc", ""), str(target))
        expected = state(*arguments[:1], "abc", arguments[2])
        for name, wanted in expected.items():
            same = loaded[name] == wanted.data
            assert same if isinstance(same, bool) else same.all(), (arguments, name)
        found.append([name for name, _ in traffic.calls])
    with pytest.raises(CheckpointError, match="can't be saved: Invalid access pattern"):
        planner.plan({**state(6, "abc", "x"), **({"split": state(6, "", "")["a"]} if rank == 0 else {})}, folder / "6")
    return found


def test_a_change_on_one_rank_is_seen_by_all(tmp_path):
    for first, second, fewer, again, moved in run_ranks(changing_rank, 2, tmp_path):
        assert second == ["allreduce_", "allreduce_", "_allgather_base_"]
        assert first == fewer == again and len(first) > len(moved) > len(second)
