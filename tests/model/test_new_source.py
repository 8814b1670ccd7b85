"""Adding a value source takes a record and a class: everything else follows from the record."""

import dataclasses

import pytest
import torch

from bov_megatron.errors import RecipeError
from bov_megatron.exchange.export import hf_config
from bov_megatron.plan import plan
from bov_megatron.recipe import ValueConfig, recipe_from_dict
from bov_megatron.recipe.parameters import parameter_specs
from bov_megatron.recipe.quantities import parameter_counts
from bov_megatron.recipe.value_sources import VALUE_SOURCES, ValueSourceFacts
from tests.support.distributed import run_ranks
from tests.support.parity import (
    batch,
    gather_full,
    gather_gradients,
    load_weights,
    my_micro_batches,
    random_weights,
    small_model,
    small_recipe,
    worst_gradient,
)

NAME, FACTS = "projection_and_gamma_bank", ValueSourceFacts(projects=True, reads="table", coefficients=1)


def add_source():
    from bov_megatron.model.sources import SOURCE_CLASSES, ValueSource

    class ProjectionAndGammaBank(ValueSource):
        """`V + gamma · E_l[id]`"""

        def forward(self, projected_SBGD, hidden_SBH, carried, project):
            return projected_SBGD + self.scaled(self.looked_up(carried))

    VALUE_SOURCES[NAME], SOURCE_CLASSES[NAME] = FACTS, ProjectionAndGammaBank


def train_rank(rank, world_size, recipe_dict):
    """Initial weights, losses of two steps and the gradients of the first."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    add_source()
    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    initial = gather_full(engine, lambda parameter: parameter)
    load_weights(engine, random_weights(recipe.model))
    losses = [float(engine.forward_backward(my_micro_batches(recipe, batch(0))))]
    gradients = gather_gradients(engine)
    assert engine.optimizer.step().applied
    losses.append(engine.train_step(my_micro_batches(recipe, batch(1))).loss)
    return initial, losses, gradients


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setitem(VALUE_SOURCES, NAME, FACTS)
    return small_model(value=ValueConfig(source=NAME))


@pytest.mark.parametrize("table", ["per_layer", "shared"])
def test_it_trains_over_ranks_as_in_one_process_and_as_exported(model, table):
    model.value.table = table
    recipe = small_recipe(model, tensor_model_parallel_size=2, sequence_parallel=True)
    initial, losses, gradients = run_ranks(train_rank, 2, recipe.to_dict())[0]
    initial_alone, losses_alone, gradients_alone = run_ranks(train_rank, 1, small_recipe(model).to_dict())[0]
    assert initial.keys() == initial_alone.keys() == {spec.name for spec in parameter_specs(model)}
    assert all(torch.equal(initial[name], initial_alone[name]) for name in initial)
    assert losses == pytest.approx(losses_alone, rel=1e-5) and losses[0] != losses[1]
    error, worst = worst_gradient(gradients, gradients_alone)
    assert error < 1e-5, f"gradient of {worst} is off by {error:.1e}"
    gamma, tables = (
        [gradients[spec.name] for spec in parameter_specs(model) if spec.kind == kind]
        for kind in ("coefficient", "table")
    )
    assert all(gradient.abs().sum() > 0 for gradient in gamma + tables)

    from bov_megatron.exchange.hf.modeling_bov import BovForCausalLM

    exported = BovForCausalLM(type(hf_config(model)).from_dict(hf_config(model).to_dict())).eval()
    exported.load_state_dict(random_weights(model))
    ids = batch(0)
    with torch.no_grad():
        logits = exported(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert losses[0] == pytest.approx(loss.item(), rel=1e-5)


def test_it_is_counted_planned_and_checked(model):
    layers, plain = model.layers_from_source(), small_model()
    added = {name: count - parameter_counts(plain)[name] for name, count in parameter_counts(model).items() if count}
    tables = len(layers) * model.vocab_size * model.kv_dim
    assert {name: count for name, count in added.items() if count} == {"table": tables, "coefficient": len(layers)}
    small, large = (plan(small_recipe(m, tensor_model_parallel_size=2), 2) for m in (plain, model))
    assert large.memory_per_rank_bytes > small.memory_per_rank_bytes
    with pytest.raises(RecipeError, match=f"did you mean '{NAME}'"):
        recipe_from_dict({"model": {"value": {"source": NAME + "s"}}, "train": {"steps": 1}})
    shared = dataclasses.replace(model, value=ValueConfig(source=NAME, table="shared"))
    with pytest.raises(RecipeError, match="table=shared would put copies"):
        small_recipe(shared, pipeline_model_parallel_size=2)
