"""Reducing gradients and gathering weights beside computing changes no bit, and nobody reads what isn't there yet."""

import dataclasses

import pytest
import torch

from bov_megatron.recipe import OptimizerConfig, Recipe, ValueConfig, recipe_from_dict
from tests.support.distributed import run_ranks
from tests.support.layouts import LAYOUTS
from tests.support.parity import batch, load_weights, my_micro_batches, random_weights, small_model, small_recipe

BOTH = {"overlap_grad_reduce": True, "overlap_param_gather": True}


def recipe_of(layout: str, **value) -> Recipe:
    """Rates high enough for each step to show in the next loss."""
    parallel = LAYOUTS[layout][1] | dict.fromkeys(BOTH, False)
    model = small_model(value=ValueConfig(**{"source": "bank", **value}))
    recipe = small_recipe(model, **parallel)
    recipe.optimizer = OptimizerConfig(warmup_steps=0, reference_batch_tokens=None, reference_parameters=None)
    return recipe


def weights(engine):
    return [local.parameter.detach().clone() for local in engine.local_parameters()]


def sharded_state(engine):
    from bov_megatron.checkpoint import writing

    state = writing.sharded_state(engine)["model"]
    return [parameter.detach().clone() for chunk in state.values() for parameter in _tensors(chunk)]


def score(engine):
    recipe = engine.recipe
    held_out = my_micro_batches(recipe, batch(100))
    sizes = torch.ones(recipe.model.vocab_size, dtype=torch.long)
    return engine.score(held_out, sizes, [torch.ones(len(b), dtype=torch.bool) for b in held_out]).nats


def statistics(engine):
    from bov_megatron.training.table_statistics import coefficient_values, table_statistics

    return sorted({**table_statistics(engine), **coefficient_values(engine)}.items())


def nothing(engine):
    """The next forward pass is the first to read."""


READERS = (nothing, score, statistics, sharded_state, weights)
"""What may happen between two steps; each meets weights that are still under way."""


def _tensors(sharded: dict) -> list[torch.Tensor]:
    return [
        sharded[key].data for key in sorted(sharded) if isinstance(getattr(sharded[key], "data", None), torch.Tensor)
    ]


def compared_rank(rank, world_size, recipe_dict, folder, trap="untouched"):
    """What differs between the run with and without overlap: names of the things seen, in order."""
    from bov_megatron.engines import data_parallel
    from bov_megatron.optim import optimizer
    from bov_megatron.parallel import process_groups

    data_parallel.BUCKET_ELEMENTS = 1  # every gradient is reduced by itself
    optimizer.SMALL_TENSOR_ELEMENTS = 256  # tables and embedding are split by rows
    recipe = recipe_from_dict(recipe_dict)
    process_groups.initialize(recipe, rank, world_size)
    plain = seen_in_run(recipe, folder / "plain")
    overlapping = dataclasses.replace(recipe, parallel=dataclasses.replace(recipe.parallel, **BOTH))
    globals()[trap]()
    found = seen_in_run(overlapping, folder / "overlapping")
    assert plain.keys() == found.keys()
    return [name for name in plain if not same(plain[name], found[name])]


def seen_in_run(recipe: Recipe, folder) -> dict:
    """Losses, gradients of every step, what the readers read, and the same of steps after a resume."""
    from bov_megatron import checkpoint
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.lifecycle import run_folder

    engine, seen = MegatronEngine(recipe), {}
    load_weights(engine, random_weights(recipe.model))
    for step, read in enumerate(READERS):
        take_step(engine, step, seen)
        seen[f"{step} {read.__name__}"] = read(engine)
    take_step(engine, len(READERS), seen)
    checkpoint.save(engine, folder, 1, keep_last=1, extra={})
    resumed = MegatronEngine(recipe)
    checkpoint.load(resumed, run_folder.latest_checkpoint(folder))
    for step in range(2):
        take_step(resumed, 10 + step, seen)
    checkpoint.load(resumed, run_folder.latest_checkpoint(folder))  # as a rollback does, over weights under way
    take_step(resumed, 20, seen)
    seen["weights"] = weights(resumed)
    return seen


def take_step(engine, step: int, seen: dict) -> None:
    result = engine.train_step(my_micro_batches(engine.recipe, batch(step)))
    assert result.updated
    assert bool(engine.optimizer.gatherer._under_way) == engine.recipe.parallel.overlap_param_gather
    seen[f"{step} loss"] = result.loss
    seen[f"{step} gradients"] = [p.row_gradient().clone() for p in engine.optimizer.parameters]


def same(one, other) -> bool:
    if isinstance(one, list) and one and isinstance(one[0], torch.Tensor):
        return all(map(torch.equal, one, other))
    return one == other


def untouched():
    pass


COMPARED = [
    ("dp2", {}),
    ("dp2", {"table": "shared"}),
    ("cp2", {"source": "projection_plus_bank"}),
    ("vpp2-dp2", {}),
    ("dp2-tp2-full-overlap", {}),
]


@pytest.mark.parametrize(
    "layout, value", COMPARED, ids=lambda one: one if isinstance(one, str) else "-".join(one.values())
)
def test_not_a_bit_differs(tmp_path, layout, value):
    differing = run_ranks(compared_rank, LAYOUTS[layout][0], recipe_of(layout, **value).to_dict(), tmp_path)
    assert differing == [[]] * LAYOUTS[layout][0]


def table_never_said_to_be_ready():
    """In a bucket with others. (One that is a bucket's only parameter is reduced at the end of each step.)"""
    from bov_megatron.engines import data_parallel
    from bov_megatron.engines.data_parallel import DataParallel

    make = DataParallel.__init__

    def forgetful(self, *arguments, **options):
        make(self, *arguments, **options)
        for parameter in self.module.parameters():
            if hasattr(parameter, "on_gradient_ready"):
                parameter.on_gradient_ready = None

    data_parallel.BUCKET_ELEMENTS = None
    DataParallel.__init__ = forgetful


def table_said_to_be_ready_before_it_is():
    """Its bucket is reduced without the last micro-batch's rows."""
    from bov_megatron.model.bank.table import _AccumulatingLookup

    backward = _AccumulatingLookup.backward

    def hasty(ctx, grad):
        ready = ctx.table.on_gradient_ready
        ready()
        if handle := ready.func.__self__.grad_reduce_handle:
            handle.wait()
        ctx.table.on_gradient_ready = None
        found = backward(ctx, grad)
        ctx.table.on_gradient_ready = ready
        return found

    _AccumulatingLookup.backward = staticmethod(hasty)


def forward_pass_does_not_wait():
    from bov_megatron.optim import optimizer

    optimizer.wait_before_forward = lambda *arguments: None


def rows_sent_before_they_are_there():
    """Lookups ahead of their layers read the tables before any module's forward pass."""
    from bov_megatron.model.bank import lookup_ahead

    lookup_ahead.await_weight = lambda parameter: None


def readers_do_not_wait():
    from bov_megatron.engines.megatron import MegatronEngine

    MegatronEngine.finish_gather = lambda self: None


@pytest.mark.parametrize(
    ("trap", "layout", "shows_in"),
    [
        (table_said_to_be_ready_before_it_is, "dp2", ["1 gradients"]),
        (forward_pass_does_not_wait, "dp2", ["1 loss"]),
        (rows_sent_before_they_are_there, "dp2-tp2", ["1 loss"]),
        (readers_do_not_wait, "dp2", ["2 statistics", "3 sharded_state", "4 weights", "10 loss"]),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_a_sprung_trap_is_noticed(tmp_path, trap, layout, shows_in):
    ranks, description = LAYOUTS[layout][0], recipe_of(layout).to_dict()
    differing = run_ranks(compared_rank, ranks, description, tmp_path, trap.__name__)
    assert set(shows_in) <= set(differing[-1]), differing


def test_a_table_never_ready_ends_the_run(tmp_path):
    with pytest.raises(AssertionError, match="len.self.per_param_grad_ready_counts. == len.self.params."):
        run_ranks(compared_rank, 2, recipe_of("dp2").to_dict(), tmp_path, table_never_said_to_be_ready.__name__)
