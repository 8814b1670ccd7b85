"""Comparing a layout of ranks with one process: the same weights, the same batches, losses and gradients."""

from __future__ import annotations

import zlib

import torch

from bov_megatron.recipe import ModelConfig, ParallelConfig, Recipe, TrainConfig, check_recipe, recipe_from_dict
from bov_megatron.recipe.parameters import parameter_specs

from .distributed import run_ranks

VOCAB, LENGTH = 96, 256
"""The vocabulary pads to 128 or more; the length makes two of the four layers' windows (128 keys) bite."""


def small_model(**changes) -> ModelConfig:
    """Four layers, four heads, two query groups."""
    settings = {"num_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "num_query_groups": 4}
    return ModelConfig(**{**settings, "vocab_size": VOCAB, "sequence_length": LENGTH, **changes})


def small_recipe(model: ModelConfig, micro_batch_size: int = 1, precision: str = "fp32", **layout) -> Recipe:
    """Four sequences a step in the given layout."""
    train = TrainConfig(micro_batch_size=micro_batch_size, global_batch_size=4, steps=10, precision=precision)
    recipe = Recipe(model=model, parallel=ParallelConfig(**layout), train=train)
    recipe.data.path = "unused"
    check_recipe(recipe)
    return recipe


def random_weights(model: ModelConfig, scale: float = 0.3) -> dict[str, torch.Tensor]:
    """Every parameter away from its initial value, by name, so that no gradient vanishes."""
    specs = parameter_specs(model)
    return {spec.name: scale * torch.randn(spec.shape, generator=_generator(spec.name)) for spec in specs}


def batch(step: int, sequences: int = 4) -> torch.Tensor:
    """Token ids of one global batch, `[sequences, T+1]`."""
    return torch.randint(0, VOCAB, (sequences, LENGTH + 1), generator=_generator(f"batch {step}"))


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def train_on_layout(recipe: Recipe, world_size: int, steps: int = 2) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of `steps` optimizer steps, and the gradients of the first by canonical name, gathered from all ranks.

    Later gradients are no fair comparison: Muon orthogonalises in bf16, which turns rounding into visible change.
    """
    results = run_ranks(train_rank, world_size, recipe.to_dict(), steps)
    losses = results[0][0]
    assert all(result[0] == losses for result in results), "ranks disagree about the loss"
    gradients: dict[str, torch.Tensor] = {}
    for _, part in results:
        gradients.update(part)
    assert gradients.keys() == {spec.name for spec in parameter_specs(recipe.model)}
    return losses, gradients


def train_rank(
    rank: int, world_size: int, recipe_dict: dict, steps: int
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """One rank of `train_on_layout`."""
    from bov_megatron.engines import data_parallel, gradient_owners
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.optim import optimizer
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    optimizer.SMALL_TENSOR_ELEMENTS = 256  # tables and embedding are split by rows
    gradient_owners.MESSAGE_ELEMENTS = 1000  # gradients travel in several messages, as those of a large model do
    data_parallel.BUCKET_ELEMENTS = 1  # where reduction overlaps, every gradient is reduced by itself
    engine = MegatronEngine(recipe)
    load_weights(engine, random_weights(recipe.model))
    if engine.wrapped[0].ddp_config.overlap_grad_reduce:  # the first backward pass counts, and reduces at its end
        engine.forward_backward(my_micro_batches(recipe, batch(1)))
    losses = [float(engine.forward_backward(my_micro_batches(recipe, batch(0))))]
    gradients = gather_gradients(engine)
    assert engine.optimizer.step().applied
    losses += [engine.train_step(my_micro_batches(recipe, batch(step))).loss for step in range(1, steps)]
    return losses, gradients


def my_micro_batches(recipe: Recipe, ids: torch.Tensor) -> list[torch.Tensor]:
    """This data-parallel rank's contiguous share of a global batch, in micro-batches."""
    from megatron.core import parallel_state

    size, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    return list(ids.chunk(size)[rank].split(recipe.train.micro_batch_size))


def load_weights(engine, weights: dict[str, torch.Tensor]) -> None:
    """Put canonical full tensors into this rank's model, and into the optimizer's main weights."""
    from bov_megatron.model.naming import local_from_full

    group = engine.chunks[0].pg_collection.tp
    with torch.no_grad():
        for local in engine.local_parameters():
            local.parameter.copy_(local_from_full(local, weights, group.rank(), group.size()))
    if engine.optimizer is not None:
        engine.optimizer.reload_model_params()


def gather_gradients(engine) -> dict[str, torch.Tensor]:
    """This pipeline stage's gradients, whole, by canonical name; equal on all its tensor-parallel ranks."""
    from bov_megatron.optim.weight_gatherer import WeightGatherer

    shards = engine.optimizer.parameters
    whole = [p.gradient().clone() for p in shards]  # each rank has those of its own rows
    WeightGatherer(whole, [p.assignment for p in shards], engine.optimizer.groups.data).gather(
        [p.row_gradient() for p in shards]
    )
    by_parameter = {id(p.local.parameter): gradient for p, gradient in zip(shards, whole, strict=True)}
    return gather_full(engine, lambda parameter: by_parameter[id(parameter)])


def gather_full(engine, read) -> dict[str, torch.Tensor]:
    """What `read(parameter)` gives of each parameter of this pipeline stage, whole, by canonical name."""
    from bov_megatron.model.naming import full_from_gathered

    full, group = {}, engine.chunks[0].pg_collection.tp
    for local in engine.local_parameters():
        parts = [read(local.parameter).detach().clone()]
        if group.size() > 1:
            mine, parts = parts[0].contiguous(), [torch.empty_like(parts[0]) for _ in range(group.size())]
            torch.distributed.all_gather(parts, mine, group=group)
        if local.partition_dim >= 0:
            full.update(full_from_gathered(local, torch.cat(parts, local.partition_dim)))
        else:
            assert all(torch.equal(part, parts[0]) for part in parts), f"{local.names} differs between ranks"
            full.update(full_from_gathered(local, parts[0]))
    return full


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference over the norm of what was expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def worst_gradient(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest relative error over all parameters, and whose it is."""
    return max((relative_error(found[name], expected[name]), name) for name in expected)
