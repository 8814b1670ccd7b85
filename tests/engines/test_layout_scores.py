"""Scores are one process's in every layout: sums of validation, also where micro-batches don't fill an interleaved
pipeline, and those of tokens, of which the first are computed once for rows that begin alike."""

import functools

import pytest
import torch

from bov_megatron.recipe import Recipe, ValueConfig, recipe_from_dict
from bov_megatron.recipe.value_sources import VALUE_SOURCES
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


UNSCORED, ALIKE = 150, (3, 2)
"""Three rows begin alike, and two. The windows (128) hide some of that from some of what follows."""


def rows() -> torch.Tensor:
    ids = batch(0, sum(ALIKE))[:, :-20]
    heads = torch.arange(len(ALIKE)).repeat_interleave(torch.tensor(ALIKE))
    ids[:, :UNSCORED] = batch(1)[heads, :UNSCORED]
    return ids


def token_scores_rank(rank: int, world_size: int, recipe_dicts: list[dict], unscored: int) -> list[tuple]:
    """Per recipe: nats, and greedy tokens, and of how many positions this rank's first layer saw the queries."""
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.model.core_attention import SdpaCoreAttention
    from bov_megatron.parallel import process_groups

    recipes = [recipe_from_dict(each) for each in recipe_dicts]
    process_groups.initialize(recipes[0], rank, world_size)
    found = []
    for recipe in recipes:
        engine, seen = MegatronEngine(recipe, with_optimizer=False), []
        load_weights(engine, random_weights(recipe.model))
        attention = next(m for chunk in engine.chunks for m in chunk.modules() if isinstance(m, SdpaCoreAttention))
        attention.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].size(0) * args[0].size(1)))
        nats, greedy = engine.token_scores(rows(), unscored)
        found.append((nats, greedy, sum(seen)))
    return found


def check_token_scores(recipes: list[Recipe], whole: list[Recipe], world_size: int, positions: int) -> None:
    """`positions`: that a rank computes."""
    expected = run_ranks(token_scores_rank, 1, [recipe.to_dict() for recipe in whole], 1)[0]
    ranks = run_ranks(token_scores_rank, world_size, [recipe.to_dict() for recipe in recipes], UNSCORED)
    for found in ranks:
        for (nats, greedy, seen), (all_nats, all_greedy, _) in zip(found, expected, strict=True):
            torch.testing.assert_close(nats, all_nats[:, UNSCORED - 1 :], rtol=2e-5, atol=2e-5)
            assert torch.equal(greedy, all_greedy[:, UNSCORED - 1 :])
            assert seen == positions


@pytest.mark.parametrize(
    "layout, first, length",
    [
        ("tp2", 149, 236),
        ("pp2-tp2", 149, 236),
        ("vpp2-dp2", 149, 236),
        ("tp2-sp", 128, 256),  # multiples of 64
        ("cp2", 128, 256),
        ("cp2-tp2-sp", 128, 256),
    ],
)
def test_token_scores_behind_what_rows_have_in_common(layout, first, length):
    world_size, parallel = LAYOUTS[layout]
    micro_batches = 2 if "vpp2" in layout else 1  # an interleaved pipeline takes no fewer
    positions = len(ALIKE) * first + sum(ALIKE) * (length - first)
    check_token_scores(
        [recipe_of(parallel)],
        [recipe_of({})],
        world_size,
        micro_batches * positions // parallel.get("context_parallel_size", 1),
    )


def test_token_scores_of_every_value_source():
    values = [ValueConfig(source=source, target_layers="last_two_thirds") for source in VALUE_SOURCES]
    values += [ValueConfig(source="bank", table="shared"), ValueConfig(source="bank", lookup="reduce_scatter")]
    recipes = [small_recipe(small_model(value=value)) for value in values]
    check_token_scores(recipes, recipes, 1, len(ALIKE) * 149 + sum(ALIKE) * (236 - 149))
