"""Train a model: `bov train RECIPE [section.field=value …]`, or `bov torchrun --nproc-per-node 8 RECIPE …`.

The same under `srun`: rank and world size are taken from Slurm where torchrun's variables are absent.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import TYPE_CHECKING

from bov_megatron import errors
from bov_megatron.compat import quiet_megatron_imports
from bov_megatron.errors import BovError, ThisRankError
from bov_megatron.lifecycle import exit_status
from bov_megatron.lifecycle.interruption import StopSignals
from bov_megatron.lifecycle.program import run_program
from bov_megatron.lifecycle.signals import speaks
from bov_megatron.lifecycle.terminal import say

if TYPE_CHECKING:
    from bov_megatron.parallel.launch import World
    from bov_megatron.recipe import Recipe


def main(arguments: list[str] | None = None, signals: StopSignals | None = None) -> int:
    """Entry point; returns the exit status: see bov_megatron.errors.

    Rank 0 also reports it to a launcher that asks for it.

    Args:
        signals: heard already; None means to hear them during this call.
    """
    with contextlib.nullcontext(signals) if signals else StopSignals() as heard:
        status = _main(arguments, heard)
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        exit_status.report(status)
    return status


def _main(arguments: list[str] | None, signals: StopSignals) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bov_megatron.train",
        description="Train the model of a recipe. A run folder that holds a checkpoint is continued from it.",
        epilog="Several ranks are started by `bov torchrun --nproc-per-node N RECIPE …`, or by srun. "
        "Every field of a recipe is described in docs/use/recipes.md.",
    )
    parser.add_argument("recipe", help="recipe file, e.g. recipes/780m_bov.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="e.g. train.steps=20 optimizer.matrix_lr=0.01"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="say what a start would find (data, checkpoint, disk, devices, …) and cost, and train nothing",
    )
    parser.add_argument("--world-size", type=int, help="with --check: ranks of the start (default: of this one)")
    parser.add_argument("--nodes", type=int, default=1, help="with --check: nodes they run on (default %(default)s)")
    options = parser.parse_intermixed_args(arguments)
    if options.world_size and not options.check:
        parser.error("--world-size goes with --check: ranks are counted by the launcher, torchrun or srun")
    if options.check:
        with signals.nothing_begun():
            return _check(options)

    from bov_megatron.parallel.launch import detect_world, export_world
    from bov_megatron.recipe import data_parallel_size, load_recipe

    try:
        world = detect_world()
        recipe = load_recipe(options.recipe, options.overrides)
        data_parallel_size(recipe, world.world_size)
        export_world(world)
        quiet_megatron_imports()
    except BovError as error:
        return _refuse(error, speaks())  # on each node: a recipe may be missing on one alone
    return _train(recipe, world, signals)


def _check(options: argparse.Namespace) -> int:
    """Print the plan and what a start would find, on one rank; returns the status that the start would end with."""
    from bov_megatron.parallel.launch import detect_world
    from bov_megatron.plan import format_plan, plan
    from bov_megatron.recipe import load_recipe

    try:
        world = detect_world()
        if world.rank > 0:
            return errors.DONE
        recipe = load_recipe(options.recipe, options.overrides)
        costs = plan(recipe, options.world_size or world.world_size)
    except BovError as error:
        return _refuse(error, True)
    print(format_plan(costs), end="\n\n", flush=True)
    quiet_megatron_imports()
    from bov_megatron.preflight import format_preflight, preflight  # torch and Megatron: seconds

    done = preflight(recipe, costs, options.nodes)
    print(format_preflight(done), flush=True)
    return done.exit_status


def _train(recipe: Recipe, world: World, signals: StopSignals) -> int:
    if world.rank == 0:
        ranks = f"{world.world_size} ranks" if world.world_size > 1 else "one rank"
        say(f"{recipe.name}: {ranks}, run folder {recipe.run_dir}; loading torch and Megatron-core")
    with signals.nothing_begun() if world.world_size == 1 else contextlib.nullcontext():
        from bov_megatron.training import run  # up to half a minute, in which signals are heard

    try:
        stopped_by = run.train(recipe, world, signals)
    except ThisRankError as error:
        exit_status.report(error.exit_status)  # rank 0 may only see that this one has gone
        return _refuse(error, True, world.rank)
    except BovError as error:  # the same on every rank
        return _refuse(error, world.rank == 0)
    if stopped_by and world.rank == 0:
        say(f"stopped by {stopped_by.describe()}, all steps done are saved: start again to continue")
    return errors.INTERRUPTED if stopped_by else errors.DONE


def _refuse(error: BovError, speaks: bool, rank: int = 0) -> int:
    """One readable line instead of a traceback; every rank stops, one says why."""
    if speaks:
        where = f"rank {rank}: " if rank else ""
        say(f"error: {where}{error}")
    return error.exit_status


if __name__ == "__main__":
    heard = StopSignals()
    run_program(lambda: main(signals=heard), heard)
