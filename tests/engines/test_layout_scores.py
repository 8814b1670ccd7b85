"""Validation sums are one process's in every layout, also where micro-batches don't fill an interleaved pipeline."""

import functools

import pytest
import torch

from bov_megatron.recipe import Recipe, ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks
from tests.support.layouts import LAYOUTS
from tests.support.parity import VOCAB, batch, load_weights, random_weights, small_model, small_recipe

SAMPLES = 6
"""Micro-batches over all data-parallel ranks: three on each of two, which two pipeline stages don't divide."""


def score_rank(rank: int, world_size: int, recipe_dict: dict) -> tuple[float, int, int]:
    from megatron.core import parallel_state

    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe, with_optimizer=False)
    load_weights(engine, random_weights(recipe.model))
    sizes = torch.arange(VOCAB) % 7  # every seventh id is special
    mine = slice(parallel_state.get_data_parallel_rank(), None, parallel_state.get_data_parallel_world_size())
    counted = [torch.tensor([number != 4]) for number in range(SAMPLES)]  # one row only fills the batch
    score = engine.score(list(batch(0, SAMPLES).split(1))[mine], sizes, counted[mine])
    return score.nats, score.bytes, score.tokens


@functools.cache
def one_process():
    return run_ranks(score_rank, 1, recipe_of({}).to_dict())[0]


def recipe_of(layout: dict) -> Recipe:
    return small_recipe(small_model(value=ValueConfig(source="bank")), **layout)


@pytest.mark.parametrize("layout", ["cp2", "cp2-tp2-sp", "vpp2-dp2", "vpp2-cp2"])
def test_scores(layout):
    world_size, parallel = LAYOUTS[layout]
    nats, size, tokens = one_process()
    assert tokens > 0.7 * 5 * 256
    for found in run_ranks(score_rank, world_size, recipe_of(parallel).to_dict()):
        assert found[0] == pytest.approx(nats, rel=1e-6)
        assert found[1:] == (size, tokens)
