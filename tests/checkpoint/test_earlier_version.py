"""A checkpoint that commit 1b4a454 saved on two tensor-parallel ranks, and the losses of its next two steps there."""

import json
from pathlib import Path

import pytest
import torch

from bov_megatron.checkpoint.compatibility import without_retired_values
from bov_megatron.recipe import Recipe, TrainConfig, ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks

FOLDER = Path(__file__).parents[1] / "golden" / "checkpoint"


def batches(step):
    """The micro-batches of the global batch at a 0-based step, as they were then."""
    return list(torch.randint(0, 61, (4, 33), generator=torch.Generator().manual_seed(step)).split(2))


def going_on_rank(rank, world_size, tensor_parallel):
    from megatron.core import parallel_state

    from bov_megatron import checkpoint
    from bov_megatron.engines.build import build_engine
    from bov_megatron.parallel import process_groups

    path = FOLDER / "step_00000003"
    recipe = recipe_from_dict(checkpoint.read_run(path)["recipe"])
    recipe.parallel.tensor_model_parallel_size = tensor_parallel
    process_groups.initialize(recipe, rank, world_size)
    engine = build_engine(recipe)
    loaded = checkpoint.load(engine, path, contents=True)
    share = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    losses = [engine.train_step(batches(step)[share[0] :: share[1]]).loss for step in (3, 4)]
    return loaded.step, loaded.extra, losses


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_it_loads_and_trains_on(tensor_parallel):
    expected = json.loads((FOLDER / "losses.json").read_text())[3:]
    for step, extra, losses in run_ranks(going_on_rank, 2, tensor_parallel):
        assert step == 3 and extra["unfinished"]["step"] == 3, "the validation that it owes"
        assert losses == pytest.approx(expected, rel=1e-5)


def test_values_that_are_gone_do_not_keep_a_checkpoint_from_being_read():
    recipe = Recipe(name="old", train=TrainConfig(steps=1))
    recipe.data.path = "data"
    stored = recipe.to_dict()
    stored["model"]["core_attention"], stored["model"]["value"]["lookup"] = "megatron", "all_to_all"
    model = recipe_from_dict(without_retired_values(stored)).model
    assert model.core_attention == "auto" and model.value == ValueConfig()
    assert stored["model"]["value"]["lookup"] == "all_to_all", "it is a copy"
    assert without_retired_values(recipe.to_dict()) == recipe.to_dict()
