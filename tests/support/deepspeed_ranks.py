"""What one rank does in tests of the DeepSpeed engine: either engine's trajectories, whole, to be compared."""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.recipe import DeepSpeedConfig, OptimizerConfig, Recipe, ValueConfig, recipe_from_dict
from tests.support.parity import (
    gather_full,
    gather_gradients,
    my_micro_batches,
    random_weights,
    small_model,
    small_recipe,
)

VOCAB = 301
"""Odd, and without padding rows to speak of: stretches begin and end inside the rows of tables."""
ADAMW = OptimizerConfig(
    name="adamw",
    adamw_matrix_lr=0.01,
    reference_batch_tokens=None,
    reference_parameters=None,
    warmup_steps=3,
    clip_grad=0.5,
)
"""Rates with which five steps go somewhere, a schedule that changes them, and clipping at half the gradient norm."""


def adamw_recipe(precision: str = "fp32", **layout) -> Recipe:
    """Four sequences a step, one a micro-batch; a bank in the last two of three layers."""
    model = small_model(num_layers=3, value=ValueConfig(source="bank", target_layers=[1, 2]), vocab_size=VOCAB)
    recipe = small_recipe(model, precision=precision, make_vocab_size_divisible_by=1, **layout)
    return replace(recipe, optimizer=ADAMW)


def zero(recipe: Recipe, stage: int, offload: str = "none") -> Recipe:
    """The same run with DeepSpeed."""
    return replace(recipe, engine="deepspeed", deepspeed=DeepSpeedConfig(stage, offload))


def batch_of(step: int) -> torch.Tensor:
    """Token ids of one global batch `[4, T+1]`; some of the vocabulary does not occur."""
    return torch.randint(0, VOCAB, (4, 257), generator=torch.Generator().manual_seed(step))


def build(recipe: Recipe):
    """An engine of the recipe, whichever, in process groups of its own, with weights for which no gradient vanishes."""
    from megatron.core import parallel_state

    from bov_megatron.engines.build import build_engine
    from bov_megatron.engines.deepspeed import engine
    from bov_megatron.parallel import process_groups

    engine.PERSISTENT_ELEMENTS = 1000  # or ZeRO 3 would keep every weight of this model whole
    parallel_state.destroy_model_parallel()
    process_groups.initialize(recipe, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    with _random_initial_weights():
        return build_engine(recipe)


@contextlib.contextmanager
def _random_initial_weights():
    from bov_megatron.engines import base
    from bov_megatron.model.naming import local_from_full

    @torch.no_grad()
    def fill(model):
        weights, group = random_weights(model.recipe.model), model.pg_collection.tp
        for local in model.local_parameters:
            local.parameter.copy_(local_from_full(local, weights, group.rank(), group.size()))

    original, base.initialize_weights = base.initialize_weights, fill
    try:
        yield
    finally:
        base.initialize_weights = original


def step(engine, number: int):
    """`train_step` on the global batch of that number."""
    return engine.train_step(my_micro_batches(engine.recipe, batch_of(number)))


def gradients(engine) -> dict[str, torch.Tensor]:
    """Mean gradients of the global batch, whole, by canonical name; between backward and step."""
    if engine.recipe.engine == "megatron":
        return gather_gradients(engine)
    return _gather_stretches(engine, lambda p: engine.optimizer.gradient(p, p.stretch))


def weights(engine) -> dict[str, torch.Tensor]:
    """The weights that the model computes with, whole, by canonical name."""
    if engine.recipe.engine == "megatron":
        return gather_full(engine, lambda parameter: parameter.float())
    return _gather_stretches(engine, lambda p: engine.weights_of(p)(p.stretch))


def _gather_stretches(engine, read) -> dict[str, torch.Tensor]:
    """What all ranks' stretches add up to."""
    by_identity = {id(p.local.parameter): p for p in engine.zero_parameters}

    def whole(parameter):
        p = by_identity[id(parameter)]
        full = torch.zeros(p.shape.numel())
        if p.stretch is not None:
            full[p.stretch.start : p.stretch.stop] = read(p)
        dist.all_reduce(full, group=p.group)
        return full.view(p.shape)

    return gather_full(engine, whole)


def optimizer_state(engine) -> dict[str, torch.Tensor]:
    """This rank's rows of the optimizer's state, as checkpoints store them."""
    from bov_megatron.engines.deepspeed.optimizer import StateAsRows

    rows = StateAsRows(engine.optimizer).state_tensors()
    return {f"{name}/{p.local.qualified_name}": tensor.clone() for name, p, tensor in rows}


def stored_bytes(engine) -> dict[str, int]:
    """This rank's bytes of weights, and of what DeepSpeed's optimizer has: main weights and moments, on device or host,
    and gradients on the host."""
    if engine.recipe.engine == "megatron":
        return {}
    zero3 = engine.recipe.deepspeed.zero_stage == 3
    kept = [p.local.parameter.ds_tensor if zero3 else p.local.parameter for p in engine.zero_parameters]
    flats = engine.optimizer._flats()
    return {
        "weights": sum(tensor.numel() * tensor.element_size() for tensor in kept),
        "optimizer": sum(3 * flat.nbytes for flat in flats),
        "gradients on the host": sum(flat.grad.nbytes for flat in flats if flat.grad is not None),
    }


def trajectory(recipe: Recipe, steps: int = 5) -> dict[str, Any]:
    """Losses and gradient norms of some steps, the first gradients, the last weights, statistics and a score."""
    from bov_megatron.training.table_statistics import coefficient_values, table_statistics

    engine = build(recipe)
    losses = [float(engine.forward_backward(my_micro_batches(recipe, batch_of(0))))]
    first_gradients = gradients(engine)
    norms = [engine.optimizer.step().grad_norm]
    for number in range(1, steps):
        result = step(engine, number)
        losses.append(result.loss)
        norms.append(result.gradient_norm)
    held_out = my_micro_batches(recipe, batch_of(steps))
    score = engine.score(held_out, torch.ones(VOCAB), [torch.ones(1, dtype=torch.bool)] * len(held_out))
    return {
        "losses": losses,
        "norms": norms,
        "gradients": first_gradients,
        "weights": weights(engine),
        "statistics": {**coefficient_values(engine), **table_statistics(engine)},
        "nats": score.nats,
        "bytes": stored_bytes(engine),
        "rates": engine.optimizer.learning_rates(),
        "steps": engine.optimizer.step_count,
    }


def trajectories(rank: int, world_size: int, recipes: dict[str, dict]) -> dict[str, dict]:
    """`trajectory` of each recipe, one after the other on the same ranks."""
    return {name: trajectory(recipe_from_dict(recipe)) for name, recipe in recipes.items()}
