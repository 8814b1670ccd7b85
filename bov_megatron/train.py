"""Train a model: `torchrun --nproc-per-node 8 -m bov_megatron.train RECIPE [section.field=value …]`.

The same under `srun`: rank and world size are taken from Slurm where torchrun's variables are absent.
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0 done, 2 for a recipe, data set or checkpoint that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m bov_megatron.train",
        description="Train the model of a recipe. A run folder that holds a checkpoint is continued from it.",
        epilog="Start it with torchrun --nproc-per-node N -m bov_megatron.train …, or with srun. "
        "Every field of a recipe is described in docs/recipes.md.",
    )
    parser.add_argument("recipe", help="recipe file, e.g. recipes/780m_bov.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.field=value", help="e.g. train.steps=20 optimizer.matrix_lr=0.01"
    )
    options = parser.parse_args(arguments)

    from bov_megatron.compat import quiet_megatron_imports
    from bov_megatron.parallel.launch import LaunchError, detect_world, export_world
    from bov_megatron.recipe import RecipeError, load_recipe

    rank = "0"
    try:
        world = detect_world()
        rank = str(world.rank)
        recipe = load_recipe(options.recipe, options.overrides)
        recipe.data_parallel_size(world.world_size)
        export_world(world)
        quiet_megatron_imports()

        from bov_megatron.data.errors import DataError
        from bov_megatron.training import run
        from bov_megatron.training.checkpoint import CheckpointError
    except (RecipeError, LaunchError) as error:
        return _refuse(error, rank)
    try:
        run.train(recipe, world)
    except (RecipeError, DataError, CheckpointError) as error:
        return _refuse(error, rank)
    return 0


def _refuse(error: Exception, rank: str) -> int:
    """One readable line; every rank stops, the first one says why."""
    if rank == "0":
        print(f"error: {error}", file=sys.stderr, flush=True)
    return 2


if __name__ == "__main__":
    sys.exit(main())
