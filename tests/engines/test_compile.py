"""`train.compile`: the same losses and gradients, whole graphs, and none compiled after the third step."""

from dataclasses import replace

import pytest
import torch

from bov_megatron.recipe import ValueConfig, recipe_from_dict
from tests.support.deepspeed_ranks import adamw_recipe, batch_of, build, zero
from tests.support.distributed import run_ranks
from tests.support.parity import (
    batch,
    gather_gradients,
    load_weights,
    my_micro_batches,
    random_weights,
    small_model,
    small_recipe,
    worst_gradient,
)

LAYOUTS = {
    "one": {},
    "full": {"recompute": "full"},
    "tp2-sp-selective": {"tensor_model_parallel_size": 2, "sequence_parallel": True, "recompute": "selective"},
}


def train_rank(rank, world_size, recipe_dict):
    """Losses of three steps and a score, gradients of the first step, and graphs compiled until then and afterwards."""
    from torch._dynamo.utils import counters

    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups, regions

    regions.BACKEND = "aot_eager"
    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    load_weights(engine, random_weights(recipe.model))

    def validate():
        micro_batches = my_micro_batches(recipe, batch(9))
        counted = [torch.ones(len(ids), dtype=torch.bool) for ids in micro_batches]
        return engine.score(micro_batches, torch.ones(recipe.model.vocab_size, dtype=torch.int64), counted).nats

    losses = [float(engine.forward_backward(my_micro_batches(recipe, batch(0))))]
    gradients = gather_gradients(engine)
    engine.update()
    losses += [validate()]
    losses += [engine.train_step(my_micro_batches(recipe, batch(step))).loss for step in (1, 2)]
    first = counters["stats"]["unique_graphs"]
    for step in (3, 4):
        engine.train_step(my_micro_batches(recipe, batch(step)))
        validate()
    engine.next_logits(batch(5)[:, :64], torch.tensor([3, 4, 5, 6]))  # a length of its own
    assert not counters["graph_break"]
    return losses, gradients, first, counters["stats"]["unique_graphs"] - first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_regions_compute_the_same_in_few_graphs(layout):
    model = small_model(value=ValueConfig("bank", "every"))
    recipe = small_recipe(model, **LAYOUTS[layout])
    ranks = recipe.parallel.tensor_model_parallel_size
    results = {}
    for compile in (False, True):
        recipe.train.compile = compile
        results[compile] = run_ranks(train_rank, ranks, recipe.to_dict())[0]
    losses, gradients, graphs, later = results[True]
    assert losses == pytest.approx(results[False][0], rel=1e-4)
    assert losses[0] == pytest.approx(results[False][0][0], rel=1e-6)
    error, worst = worst_gradient(gradients, results[False][1])
    assert error < 1e-5, f"gradient of {worst} is off by {error:.1e}"
    assert results[False][2:] == (0, 0), "without train.compile nothing is compiled"
    assert graphs > 0 and later == 0


def inductor_rank(rank, world_size):
    """Per region: the largest difference of results and gradients, compiled by Inductor, from the plain function's."""
    from bov_megatron.model import attention, norm, output
    from bov_megatron.parallel import regions

    regions.enable(True)
    torch.manual_seed(0)
    hidden, other = (torch.randn(6, 2, 32, requires_grad=True) for _ in range(2))
    query, key = (torch.randn(6, 2, 4, 8, requires_grad=True) for _ in range(2))
    angles = attention.rotary_cos_sin(torch.arange(6), 8, 1e4)
    differences = {}
    for function, arguments in (
        (norm.add_and_normalise, (hidden, other)),
        (attention.rotate_and_normalise, (query, key, angles, 1.2)),
    ):
        inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        found, expected = (
            (*results, *torch.autograd.grad([x.square().sum() for x in results], inputs))
            for results in (function(*arguments), function.__wrapped__(*arguments))
        )
        pairs = zip(found, expected, strict=True)
        differences[function.__name__] = max((a - b).abs().max().item() for a, b in pairs)
    logits, logsumexp, grad = 9 * torch.randn(6, 50), 9 + torch.rand(6), torch.rand(6)
    both = [logits.clone(), logits.clone()]
    output.overwrite_with_gradient(both[0], logsumexp, grad, 15.0)
    output.overwrite_with_gradient.__wrapped__(both[1], logsumexp, grad, 15.0)
    differences["overwrite_with_gradient"] = (both[0] - both[1]).abs().max().item()
    assert not torch.equal(both[0], logits)
    assert sum(torch._dynamo.utils.counters["stats"].values()) > 0, "nothing was compiled"
    return differences


def zero_rank(rank, world_size, *recipe_dicts):
    """Per recipe, losses of three steps with DeepSpeed, and how many graphs had been compiled by then."""
    from torch._dynamo.utils import counters

    from bov_megatron.parallel import regions

    regions.BACKEND = "aot_eager"
    results = []
    for recipe in map(recipe_from_dict, recipe_dicts):
        engine = build(recipe)
        losses = [engine.train_step(my_micro_batches(recipe, batch_of(step))).loss for step in range(3)]
        results.append((losses, counters["stats"]["unique_graphs"]))
    return results


def test_weights_that_zero_3_gathers_are_those_of_the_regions():
    recipe = zero(adamw_recipe(recompute="full"), 3)
    pair = [replace(recipe, train=replace(recipe.train, compile=compile)).to_dict() for compile in (False, True)]
    (expected, none), (found, graphs) = run_ranks(zero_rank, 2, *pair)[0]
    assert found == pytest.approx(expected, rel=1e-6)
    assert none == 0 < graphs


@pytest.mark.parametrize("compile, compiled", [(None, True), (False, False)])
def test_a_backend_in_the_environment_compiles_what_a_recipe_leaves_open(compile, compiled, monkeypatch):
    from bov_megatron.parallel import regions

    monkeypatch.setenv("BOV_COMPILE_BACKEND", "aot_eager")
    monkeypatch.setattr(regions, "_enabled", not compiled)
    with torch._dynamo.config.patch(disable=False):  # sets it back afterwards
        regions.enable(compile)
    assert regions._enabled == compiled


def test_a_missing_compiler_is_named(monkeypatch):
    from bov_megatron.errors import RecipeError
    from bov_megatron.parallel import regions

    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(regions, "_enabled", False)
    with pytest.raises(RecipeError, match="train.compile=true: .*no g.., gcc or clang in PATH.*train.compile=false"):
        regions.enable(True)


def test_inductor_computes_the_same():
    (differences,) = run_ranks(inductor_rank, 1)
    assert max(differences.values()) < 1e-5, differences
