"""A checkpoint saved in one layout of ranks goes on in another as if it had never stopped."""

import functools

import pytest

from bov_megatron.recipe import OptimizerConfig, Recipe, ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks
from tests.support.parity import batch, load_weights, my_micro_batches, random_weights, small_model, small_recipe

SAVED_AT, MORE_STEPS = 2, 3
LAYOUTS = {
    "one rank": (1, {}),
    "tp2": (2, {"tensor_model_parallel_size": 2}),
    "tp4": (4, {"tensor_model_parallel_size": 4}),
    "pp2": (2, {"pipeline_model_parallel_size": 2}),
    "pp2-tp2": (4, {"pipeline_model_parallel_size": 2, "tensor_model_parallel_size": 2}),
    "dp2": (2, {}),
    "dp4": (4, {}),
    "tp2-dp2": (4, {"tensor_model_parallel_size": 2}),
    "pp2-uneven": (2, {"pipeline_model_parallel_size": 2, "pipeline_layers": [3, 1]}),
    "vpp2": (2, {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 2}),
    "cp2": (2, {"context_parallel_size": 2}),
    "cp2-tp2": (4, {"context_parallel_size": 2, "tensor_model_parallel_size": 2}),
}
"""The vocabulary of 96 pads to 128 · TP rows, so most pairs of these differ in their tensors' shapes."""


def recipe_of(layout: str, source: str, optimizer: str, precision: str = "fp32", groups: int = 4) -> Recipe:
    model = small_model(num_query_groups=groups, value=ValueConfig(source=source))
    recipe = small_recipe(model, precision=precision, **LAYOUTS[layout][1])
    recipe.optimizer = OptimizerConfig(
        name=optimizer, warmup_steps=0, reference_batch_tokens=None, reference_parameters=None
    )
    return recipe


def saving_rank(rank, world_size, recipe_dict, folder):
    """Losses of MORE_STEPS steps after the checkpoint, by the run that wrote it."""
    from bov_megatron import checkpoint
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    load_weights(engine, random_weights(recipe.model))
    train(engine, 0, SAVED_AT)
    checkpoint.save(engine, folder, SAVED_AT, keep_last=1, extra={"note": "kept"})
    return train(engine, SAVED_AT, MORE_STEPS)


def loading_rank(rank, world_size, recipe_dict, folder):
    from bov_megatron import checkpoint
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.lifecycle import run_folder
    from bov_megatron.parallel import process_groups

    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    loaded = checkpoint.load(engine, run_folder.latest_checkpoint(folder))
    assert (loaded.step, loaded.extra) == (SAVED_AT, {"note": "kept"})
    return train(engine, SAVED_AT, MORE_STEPS)


def train(engine, first: int, steps: int) -> list[float]:
    return [
        engine.train_step(my_micro_batches(engine.recipe, batch(step))).loss for step in range(first, first + steps)
    ]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(layout, source, optimizer, precision)`: folder of a checkpoint, and the losses that follow it."""

    @functools.cache
    def make(layout, *model):
        folder = tmp_path_factory.mktemp("run")
        losses = run_ranks(saving_rank, LAYOUTS[layout][0], recipe_of(layout, *model).to_dict(), folder)
        return folder, losses[0]

    return make


FROM_TP2_DP2 = [
    *[
        ("bank", "muon", "fp32", layout)
        for layout in ("one rank", "tp4", "pp2", "dp2", "dp4", "tp2", "cp2", "vpp2", "pp2-uneven")
    ],
    *[("projection", "muon", "fp32", layout) for layout in ("one rank", "tp4", "pp2")],
    *[("bank", "adamw", "fp32", layout) for layout in ("dp4", "pp2-tp2")],
    ("bank", "muon", "bf16", "pp2"),
    ("gated_value_embedding", "adamw", "fp32", "tp4"),
]


@pytest.mark.parametrize("source, optimizer, precision, layout", FROM_TP2_DP2)
def test_saved_over_four_ranks(saved, source, optimizer, precision, layout):
    check(saved, "tp2-dp2", source, optimizer, precision, layout)


@pytest.mark.parametrize("layout", ["one rank", "dp2"])
def test_saved_over_context_parallel_ranks(saved, layout):
    check(saved, "cp2-tp2", "bank", "muon", "fp32", layout)


@pytest.mark.parametrize("layout", ["one rank", "pp2-uneven"])
def test_saved_by_an_interleaved_pipeline(saved, layout):
    check(saved, "vpp2", "bank", "muon", "fp32", layout)


def test_saved_by_an_uneven_pipeline(saved):
    check(saved, "pp2-uneven", "bank", "muon", "fp32", "tp2")


@pytest.mark.parametrize("layout", ["one rank", "tp2-dp2"])
def test_saved_by_a_pipeline(saved, layout):
    check(saved, "pp2", "bank", "muon", "fp32", layout)


@pytest.mark.parametrize("layout", ["dp2", "tp4"])
def test_saved_by_a_pipeline_of_tensor_parallel_ranks(saved, layout):
    """From TP 2 · PP 2 on, with AdamW: three further steps to 1e-6."""
    check(saved, "pp2-tp2", "bank", "adamw", "fp32", layout)


@pytest.mark.parametrize("layout", ["one rank", "tp2-dp2"])
def test_saved_by_ranks_that_share_query_groups(saved, layout):
    check(saved, "tp4", "projection_plus_bank", "muon", "fp32", layout, groups=2)


def check(saved, layout, source, optimizer, precision, target, groups=4):
    model = (source, optimizer, precision, groups)
    folder, expected = saved(layout, *model)
    losses = run_ranks(loading_rank, LAYOUTS[target][0], recipe_of(target, *model).to_dict(), folder)[0]
    # The first loss shows the weights, later ones the optimizer's state. AdamW's updates agree to rounding; Muon's bf16
    # orthogonalisation turns another order of summation into visible change.
    first, later = TOLERANCES["bf16" if precision == "bf16" else optimizer]
    assert losses[0] == pytest.approx(expected[0], rel=first)
    assert losses == pytest.approx(expected, rel=later)


def test_table_split_by_rows_goes_on_split_by_heads(saved):
    folder, expected = saved("tp2-dp2", "bank", "adamw", "fp32")
    recipe = recipe_of("tp4", "bank", "adamw")
    recipe.model.value.table_partition = "head"
    losses = run_ranks(loading_rank, 4, recipe.to_dict(), folder)[0]
    assert losses == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-6), ("bf16", 1e-3)])
def test_tables_go_on_in_host_memory(saved, precision, tolerance):
    folder, expected = saved("tp2-dp2", "bank", "adamw", precision)
    recipe = recipe_of("dp2", "bank", "adamw", precision)
    recipe.model.value.table_memory = "host"
    losses = run_ranks(loading_rank, 2, recipe.to_dict(), folder)[0]
    assert losses == pytest.approx(expected, rel=tolerance)


TOLERANCES = {"adamw": (1e-6, 1e-6), "muon": (1e-6, 2e-4), "bf16": (1e-3, 1e-3)}


def forgetting_rank(rank, world_size, recipe_dict, folder):
    from bov_megatron.optim import sharded_state

    restore = sharded_state.restore

    def forgetting(optimizer, state_dict):
        restore(optimizer, state_dict)
        for _, _, tensor in optimizer.state_tensors():
            tensor.zero_()

    sharded_state.restore = forgetting
    return loading_rank(rank, world_size, recipe_dict, folder)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_lost_optimizer_state_would_show(saved, optimizer):
    folder, expected = saved("tp2-dp2", "bank", optimizer, "fp32")
    losses = run_ranks(forgetting_rank, 1, recipe_of("one rank", "bank", optimizer).to_dict(), folder)[0]
    assert losses[0] == pytest.approx(expected[0], rel=1e-6)
    assert max(abs(a - b) / b for a, b in zip(losses, expected, strict=True)) > 2e-3
