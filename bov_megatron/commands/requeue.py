"""Should a training job that has ended be started again? slurm/launch.sh asks after each start.

Exit status 0: yes; 1: no. Either way one line says why.
"""

import argparse
import sys

from bov_megatron.errors import RecipeError
from bov_megatron.lifecycle.restarts import LIMIT, decide
from bov_megatron.recipe import load_recipe


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov requeue",
        description=__doc__.splitlines()[0],
        epilog="Call it once after each start: starts that brought no new checkpoint are counted in restarts.json in "
        "the run folder. Exit status 0: start again; 1: don't. docs/use/failures.md lists the statuses.",
    )
    parser.add_argument("recipe", help="the recipe that was trained")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="as given to the training")
    parser.add_argument("--status", type=int, required=True, help="exit status of the training")
    parser.add_argument(
        "--limit", type=int, default=LIMIT, help=f"starts in a row without a new checkpoint before giving up ({LIMIT})"
    )
    options = parser.parse_intermixed_args(arguments)
    try:
        recipe = load_recipe(options.recipe, options.overrides)
    except RecipeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1  # as for any other reason not to start it again
    decision = decide(recipe.run_dir, options.status, options.limit)
    print(decision.reason)
    return 0 if decision.again else 1
