"""Every layout takes the step that one process takes."""

import functools
import math

import pytest
import torch

from bov_megatron.optim.groups import group_settings
from bov_megatron.optim.muon_sharded import assign_workers, consecutive_buckets, orthogonalisation_cost
from bov_megatron.optim.optimizer import assign_rows
from bov_megatron.optim.sharding import balance, group_rank
from bov_megatron.optim.weight_gatherer import WeightGatherer
from bov_megatron.recipe import load_recipe
from tests.support.distributed import run_ranks
from tests.support.fake_world import fake_parameters
from tests.support.sharded_model import advance, assemble, local_result, recipe, single_process, start_rank, weights

STEPS = 4


@functools.cache
def expected(bf16: bool = False, **optimizer):
    return single_process(recipe(bf16=bf16, **optimizer), STEPS)


def rank_weights(rank, world_size, recipe):
    model, optimizer = start_rank(rank, world_size, recipe)
    norms = advance(model, optimizer, STEPS)
    rows = {p.local.qualified_name: p.rows for p in optimizer.parameters}
    updated = [canonical for _, canonical, _ in optimizer.second_moments()]
    return local_result(model) | {"norms": norms, "rows": rows, "updated": updated}


def run(recipe, world_size):
    results = run_ranks(rank_weights, world_size, recipe)
    assert len({tuple(result["norms"]) for result in results}) == 1, "ranks must agree on the norm bit for bit"
    return assemble(results, recipe.parallel.tensor_model_parallel_size), results


def worst(found, wanted):
    assert found.keys() == wanted.keys()
    return max(float((found[k].float() - wanted[k].float()).norm() / wanted[k].float().norm()) for k in wanted)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("data", [2, 3, 4])
def test_data_parallel_sharding_changes_no_bit(data, bf16):
    weights, results = run(recipe(bf16=bf16), data)
    wanted, norms = expected(bf16)
    assert worst(weights, wanted) == 0
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-6)
    # Sharded in truth: a matrix has one owner, the table is split, small tensors are everybody's.
    rows = [result["rows"] for result in results]
    assert sorted(stop - start for start, stop in (r["up"] for r in rows)) == [0] * (data - 1) + [512]
    assert all(a["table"][1] == b["table"][0] for a, b in zip(rows, rows[1:], strict=False))
    assert all(r["gamma"] == (0, 1) for r in rows)


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor": 2},
        {"tensor": 4},
        {"tensor": 2, "bf16": True},
        {"tensor": 2, "world": 4},
        {"tensor": 2, "world": 4, "sharded": False},
        {"tensor": 2, "pipeline": 2},
        {"tensor": 2, "name": "adamw"},
        {"tensor": 2, "world": 4, "name": "adamw", "clip_grad": 0.5},
    ],
    ids=str,
)
def test_layout_equals_one_process(layout):
    layout = dict(layout)
    tensor, pipeline, bf16 = layout["tensor"], layout.get("pipeline", 1), layout.get("bf16", False)
    world = layout.pop("world", tensor * pipeline)
    optimizer = {key: layout[key] for key in ("name", "clip_grad") if key in layout}
    weights, results = run(recipe(**layout), world)
    wanted, norms = expected(bf16, **optimizer)
    assert results[0]["norms"] == pytest.approx(norms, rel=1e-6)
    if tensor > 1 and "name" not in layout and layout.get("sharded", True):  # a matrix that is split is updated once
        updated = [name for result in results for name in result["updated"] if "replicated" not in name]
        assert len(updated) == len(set(updated)) == 3 + 1 + 1 + 2 + 2  # qkv, out, gate, qk, up and down
    # The norm is summed in another order, so clipped gradients may differ in their last bit.
    assert worst(weights, wanted) <= (1e-6 if "clip_grad" in layout else 0)
    if "clip_grad" in layout:
        assert worst(weights, expected(bf16, name="adamw")[0]) > 1e-2


def test_balance_spreads_cost():
    costs = [8, 1, 1, 4, 4, 2, 2, 2]
    owners = balance(costs, 3)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == rank) for rank in range(3)]
    assert max(loads) == 8 and sum(loads) == sum(costs)


def work(rank, world_size, tensor, worlds):
    """Of each data-parallel size: the multiplications of every rank, over data- and tensor-parallel ranks."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    split = [f"parallel.tensor_model_parallel_size={tensor}", f"parallel.sequence_parallel={str(tensor > 1).lower()}"]
    recipe = load_recipe("recipes/780m_bov.yaml", split)
    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = fake_parameters(recipe)
    matrices = [local for local in parameters if local.kind == "matrix"]
    costs = [orthogonalisation_cost(local) for local in matrices]
    found = {}
    for data in worlds:
        assignments = assign_rows(matrices, group_settings(recipe), data, sharded=True)
        loads = [[0.0] * tensor for _ in range(data)]
        for number, load in enumerate(loads):
            owned = [i for i, a in enumerate(assignments) if a.ranges[number][1] > 0]
            workers = assign_workers([matrices[i] for i in owned], tensor)
            for i, worker in zip(owned, workers, strict=True):
                load[worker or 0] += costs[i]
        found[data] = [work for load in loads for work in load]
    return costs, found


@pytest.mark.parametrize("tensor", [1, 4])
def test_work_is_balanced_in_worlds_of_any_size(tensor):
    ((costs, found),) = run_ranks(work, 1, tensor, (16, 64, 512, 4096))
    for data, loads in found.items():
        ranks = data * tensor
        assert sum(loads) == sum(costs), "every matrix is updated once"
        assert max(loads) <= sum(costs) / ranks + max(costs)
        if ranks >= len(costs):  # a matrix is not divided: further ranks have nothing to do
            assert max(loads) == max(costs)


def rank_in_small_buckets(rank, world_size, recipe):
    """Weights and directions travel in several collectives, as those of a large model do."""
    model, optimizer = start_rank(rank, world_size, recipe)
    parameters = optimizer.parameters
    optimizer.gatherer = WeightGatherer(
        [p.local.parameter for p in parameters], [p.assignment for p in parameters], optimizer.groups.data, 50_000
    )
    optimizer.muon.buckets = consecutive_buckets([m.momentum.numel() for m in optimizer.muon.matrices], 10_000)
    advance(model, optimizer, STEPS)
    return local_result(model) | {"buckets": (len(optimizer.gatherer.buckets), len(optimizer.muon.buckets))}


def test_many_buckets_change_nothing():
    results = run_ranks(rank_in_small_buckets, 4, recipe(tensor=2))
    assert all(buckets > 1 for result in results for buckets in result["buckets"])
    assert len({result["buckets"][0] for result in results}) == 1
    assert worst(assemble(results, 2), expected()[0]) == 0


def rank_refuses(rank, world_size, recipe):
    model, optimizer = start_rank(rank, world_size, recipe)
    advance(model, optimizer, 1)
    before = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    state = [tensor.clone() for _, _, tensor in optimizer.state_tensors()]
    applied = False
    for number in range(len(weights())):  # replicated ones too: no other rank sees this rank's copy
        model.set_gradients(1)
        shard = optimizer.parameters[number % len(optimizer.parameters)]
        owner = max(r for r, (start, stop) in enumerate(shard.assignment.ranges) if start < stop)
        if group_rank(optimizer.groups.data) == owner and model.tensor_rank == 1:  # one rank of each stage
            shard.row_gradient().view(-1)[-1] = (math.nan, math.inf)[number % 2]
        applied |= optimizer.step().applied
    unchanged = all(torch.equal(before[key], parameter) for key, parameter in model.named_parameters())
    unchanged &= all(torch.equal(a, t) for a, (_, _, t) in zip(state, optimizer.state_tensors(), strict=True))
    return applied, unchanged, optimizer.step_count


def test_all_ranks_refuse_a_gradient_that_is_not_finite():
    assert run_ranks(rank_refuses, 4, recipe(tensor=2, pipeline=1)) == [(False, True, 1)] * 4
    assert run_ranks(rank_refuses, 4, recipe(tensor=2, pipeline=2)) == [(False, True, 1)] * 4
