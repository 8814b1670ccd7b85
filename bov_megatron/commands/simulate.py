"""A step of one rank in a world of any size, without a GPU: memory, collectives, kernels, waits, and its least time.

The code that trains runs once, on tensors without memory and among ranks that don't exist.

bov simulate recipes/780m_bov.yaml --world-size 64
bov simulate recipes/780m_bov.yaml parallel.tensor_model_parallel_size=4 --world-size 4096 --rank 7 --json step.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import warnings
from pathlib import Path

from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.gpus import DEFAULT_GPU, GPUS


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov simulate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="recipe file, e.g. recipes/780m_bov.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields to change, e.g. train.steps=100")
    parser.add_argument("--world-size", type=int, required=True, help="ranks (GPUs) in all")
    parser.add_argument("--rank", type=int, default=0, help="the rank to simulate (%(default)s)")
    parser.add_argument("--gpu", choices=GPUS, default=DEFAULT_GPU, help="for the step's time (%(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every number there, unrounded")
    options = parser.parse_intermixed_args(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # fake tensors stand for a GPU's, and take the CPU's place
    warnings.filterwarnings("ignore")  # of torch and Megatron, about a machine without a GPU
    from bov_megatron.simulation import format_simulation, simulate  # imports torch

    result = simulate(recipe, options.world_size, options.rank, GPUS[options.gpu])
    if options.json is not None:
        options.json.write_text(json.dumps(dataclasses.asdict(result), indent=2) + "\n", encoding="utf-8")
    print(format_simulation(result))
    return 0
