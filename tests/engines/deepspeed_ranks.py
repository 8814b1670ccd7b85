"""What one rank does in tests of the DeepSpeed engine: trajectories of any engine, to be compared."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.recipe import DeepSpeedConfig, OptimizerConfig, Recipe, ValueConfig
from tests.parity import batch, gather_full, my_micro_batches, random_weights, small_model, small_recipe

# Large rates, so that five steps go somewhere; a warmup, so that they differ; clipping that bites.
ADAMW = OptimizerConfig(
    name="adamw",
    adamw_matrix_lr=0.01,
    reference_batch_tokens=None,
    reference_parameters=None,
    warmup_steps=3,
    clip_grad=0.5,
)


def adamw_recipe(precision: str = "fp32", source: str = "bank", **layout) -> Recipe:
    """Four sequences a step, one a micro-batch; a bank in the last two of four layers."""
    model = small_model(value=ValueConfig(source=source, target_layers=[2, 3]))
    return replace(small_recipe(model, precision=precision, **layout), optimizer=ADAMW)


def zero(recipe: Recipe, stage: int, offload: str = "none") -> Recipe:
    """The same run with DeepSpeed."""
    return replace(recipe, engine="deepspeed", deepspeed=DeepSpeedConfig(stage, offload))


@contextlib.contextmanager
def random_initial_weights():
    """Let engines start from weights with which no gradient vanishes."""
    from bov_megatron.engines import base
    from bov_megatron.model.naming import local_from_full, local_parameters

    @torch.no_grad()
    def fill(model):
        weights, group = random_weights(model.recipe.model), model.pg_collection.tp
        for local in local_parameters(model):
            local.parameter.copy_(local_from_full(local, weights, group.rank(), group.size()))

    original, base.initialize_weights = base.initialize_weights, fill
    try:
        yield
    finally:
        base.initialize_weights = original


def build(recipe: Recipe):
    """An engine of the recipe, whichever, from random weights, in new process groups of this world."""
    from megatron.core import parallel_state

    from bov_megatron.engines.base import build_engine
    from bov_megatron.parallel import process_groups

    parallel_state.destroy_model_parallel()
    rank = dist.get_rank() if dist.is_initialized() else None
    import os

    process_groups.initialize(
        recipe, int(os.environ["RANK"]) if rank is None else rank, int(os.environ["WORLD_SIZE"])
    )
    with random_initial_weights():
        return build_engine(recipe)


def whole(p, part: torch.Tensor | None) -> torch.Tensor:
    """A parameter's tensor from all data-parallel ranks' stretches."""
    full = torch.zeros(p.shape.numel())
    if part is not None:
        full[p.stretch.start : p.stretch.stop] = part
    dist.all_reduce(full, group=p.group)
    return full.view(p.shape)


def gradients(engine) -> dict[str, torch.Tensor]:
    """Mean gradients of the global batch, whole, by canonical name; between backward and step."""
    if hasattr(engine, "wrapped"):
        return gather_full(engine, lambda parameter: parameter.main_grad)
    by_id = {id(p.parameter): p for p in engine.zero_parameters}

    def read(parameter):
        p = by_id[id(parameter)]
        return whole(p, None if p.stretch is None else engine.optimizer.gradient(p).float())

    return gather_full(engine, read)


def weights(engine) -> dict[str, torch.Tensor]:
    """The weights that the model computes with, whole, by canonical name."""
    if hasattr(engine, "wrapped"):
        return gather_full(engine, lambda parameter: parameter.float())
    by_id = {id(p.parameter): p for p in engine.zero_parameters}

    def read(parameter):
        p = by_id[id(parameter)]
        return whole(p, None if p.stretch is None else engine._weights(p)(p.stretch).float())

    return gather_full(engine, read)


def trajectory(recipe: Recipe, steps: int = 5) -> dict[str, Any]:
    """Losses, gradient norms, first gradients and last weights of some steps, and what statistics say after them."""
    from bov_megatron.training.statistics import coefficient_values, table_statistics

    engine = build(recipe)
    first = engine.forward_backward(my_micro_batches(recipe, batch(0)))
    result = {"gradients": gradients(engine)}
    update = engine.optimizer.step()
    assert update.applied
    results = [engine.train_step(my_micro_batches(recipe, batch(step))) for step in range(1, steps)]
    result["losses"] = [first, *(r.loss for r in results)]
    result["norms"] = [update.grad_norm, *(r.gradient_norm for r in results)]
    result["weights"] = weights(engine)
    result["statistics"] = {**coefficient_values(engine), **table_statistics(engine)}
    score = engine.score(
        my_micro_batches(recipe, batch(9)), torch.ones(recipe.model.vocab_size), [torch.ones(1, dtype=torch.bool)] * 4
    )
    result["nats"] = score.nats
    return result


def trajectories(rank: int, world_size: int, recipes: dict[str, dict]) -> dict[str, dict]:
    """`trajectory` of each recipe, one after the other on the same ranks."""
    return {name: trajectory(Recipe.from_dict(recipe)) for name, recipe in recipes.items()}
