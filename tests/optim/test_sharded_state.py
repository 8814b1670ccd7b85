"""Saved under one layout, loaded under another: the next steps are those of a run that never stopped."""

import queue

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.sharded_model import advance, assemble, local_result, recipe, single_process, start_rank

SAVED_AT, MORE_STEPS = 3, 3


def full_state(model, optimizer):
    model_state = model.sharded_state_dict()
    return {"model": model_state, "optimizer": optimizer.sharded_state_dict(model_state)}


def rank_saves(rank, world_size, recipe, folder):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.strategies.base import StrategyAction, get_default_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper

    filesystem_async._results_queue = queue.Queue()  # its default: one more process per rank that imports torch, 7 s
    model, optimizer = start_rank(rank, world_size, recipe)
    advance(model, optimizer, SAVED_AT)
    state = full_state(model, optimizer)
    strategy = get_default_strategy(StrategyAction.SAVE_SHARDED, "torch_dist", 1)
    dist_checkpointing.save(state, folder, FullyParallelSaveStrategyWrapper(strategy, optimizer.groups.data))
    state = state["optimizer"]["state"]
    return {"bytes": sum(tensor.data.nbytes for tensor in state.values()), "keys": {t.key for t in state.values()}}


def rank_loads(rank, world_size, recipe, folder):
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper

    model, optimizer = start_rank(rank, world_size, recipe)
    with torch.no_grad():  # nothing of the fresh start may survive
        for parameter in model.parameters():
            parameter.fill_(7.0)
        for _, _, tensor in optimizer.state_tensors():
            tensor.fill_(7.0)
    strategy = FullyParallelLoadStrategyWrapper(get_default_load_sharded_strategy(folder), optimizer.groups.data)
    loaded = dist_checkpointing.load(full_state(model, optimizer), folder, strategy)
    for key, parameter in model.named_parameters():
        parameter.data.copy_(loaded["model"][key])
    optimizer.load_state_dict(loaded["optimizer"])
    assert optimizer.step_count == SAVED_AT
    norms = advance(model, optimizer, MORE_STEPS)
    steps = [optimizer.adamw.state[p.main]["step"] for p in optimizer.adamw_parameters]
    assert len({step.data_ptr() for step in steps}) == len(steps), "one shared step tensor would count many times"
    assert {float(step) for step in steps} == {SAVED_AT + MORE_STEPS}
    return local_result(model) | {"norms": norms, "padding": padding_rows(model)}


def padding_rows(model):
    """Largest weight in this rank's padding rows."""
    largest = 0.0
    for key, weight in model.weights.items():
        if weight.vocabulary:
            parameter = getattr(model, key).detach()
            first = model.tensor_rank * parameter.size(0)
            padding = parameter[max(0, weight.shape[0] - first) :]
            largest = max(largest, float(padding.abs().max())) if padding.numel() else largest
    return largest


@pytest.mark.parametrize("bf16", [False, True])
def test_checkpoint_reshards(tmp_path, bf16):
    saved = run_ranks(rank_saves, 4, recipe(tensor=2, bf16=bf16), str(tmp_path))
    wanted, norms = single_process(recipe(bf16=bf16), SAVED_AT + MORE_STEPS)
    layouts = [({}, 1), ({"tensor": 4}, 4), ({}, 3)]
    if not bf16:
        layouts += [
            ({"tensor": 2}, 4),
            ({}, 4),
            ({"tensor": 2, "pipeline": 2}, 4),
            ({"tensor": 2, "sharded": False}, 4),
        ]
    for layout, world in layouts:
        target = recipe(**layout, bf16=bf16)
        results = run_ranks(rank_loads, world, target, str(tmp_path))
        weights = assemble(results, target.parallel.tensor_model_parallel_size)
        for key, tensor in wanted.items():
            torch.testing.assert_close(weights[key], tensor, rtol=0, atol=0, msg=f"{key} after loading at {layout}")
        assert results[0]["norms"] == pytest.approx(norms[SAVED_AT:], rel=1e-6)
        assert max(result["padding"] for result in results) == 0
    check_sizes(saved, bf16)


def check_sizes(saved, bf16):
    """No rank wrote more than its share and its replicas: state is nowhere whole."""
    total = sum(result["bytes"] for result in saved)
    assert max(result["bytes"] for result in saved) < 0.4 * total
    keys = set.union(*(result["keys"] for result in saved))
    assert ("optimizer.main_param.model.qkv" in keys) == bf16
    assert "optimizer.second_moment.model.layers.0.self_attn.k_proj.weight" in keys
    assert not any("step" in key for key in keys)


def rank_saves_whole(rank, world_size, recipe, folder):
    return rank_saves(rank, world_size, recipe, folder)["bytes"]


@pytest.mark.parametrize("world", [1, 3])
def test_checkpoint_of_other_layouts_loads_at_tensor_parallel_two(tmp_path, world):
    """From uneven row shares, and from a smaller padded vocabulary to a larger one."""
    run_ranks(rank_saves_whole, world, recipe(), str(tmp_path))
    results = run_ranks(rank_loads, 4, recipe(tensor=2), str(tmp_path))
    wanted, _ = single_process(recipe(), SAVED_AT + MORE_STEPS)
    for key, tensor in assemble(results, 2).items():
        torch.testing.assert_close(tensor, wanted[key], rtol=0, atol=0, msg=f"{key} from {world} ranks")
    assert max(result["padding"] for result in results) == 0
