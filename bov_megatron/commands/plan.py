"""What a recipe costs, before anything runs: parameters, FLOPs, steps, memory and messages per rank, checkpoint size,
time.

bov plan recipes/780m_bov.yaml --world-size 16
bov plan recipes/780m_bov.yaml parallel.tensor_model_parallel_size=4 --json
"""

from __future__ import annotations

import argparse
import dataclasses
import json

from bov_megatron.plan import DEFAULT_MFU, DEFAULT_PEAK_FLOPS, format_plan, plan
from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.gpus import DEFAULT_GPU, GPUS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="recipe file, e.g. recipes/780m_bov.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, e.g. train.steps=100")
    parser.add_argument("--json", action="store_true", help="machine-readable: every number, bytes and FLOPs unrounded")
    parser.add_argument("--world-size", type=int, help="ranks (GPUs) in all; default: one copy of the model")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU, help="for the least time of a step (%(default)s)")
    parser.add_argument("--mfu", type=float, default=DEFAULT_MFU, help="share of the peak to assume (%(default)s)")
    parser.add_argument(
        "--peak-flops",
        type=float,
        help=f"FLOP/s of one device (default: logging.peak_flops, else {DEFAULT_PEAK_FLOPS:.3g}, an H100 in bf16)",
    )
    options = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    result = plan(recipe, options.world_size, options.mfu, options.peak_flops, GPUS[options.gpu])
    print(json.dumps(dataclasses.asdict(result), indent=2) if options.json else format_plan(result))
    return 0
