"""Measure this machine: training step, core attention, data loader, table lookups, checkpoints, generation.

    python tools/bench.py                        everything this machine can run
    OMP_NUM_THREADS=2 python tools/bench.py step attention --turns 15 --json bench.json
    python tools/bench.py step --set train.compile=true
    python tools/bench.py step --against COMMIT
    python tools/bench.py --quick                a few seconds, to see that it runs; its times mean nothing

Variants take turns, and what counts is their ratio within a turn: other programs disturb it little. Uses the GPU where
there is one (bf16), else the CPU (fp32).
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bov_megatron.lifecycle.interruption import CtrlC
from bov_megatron.lifecycle.program import run_program


def main(arguments: list[str] | None = None) -> int:
    # Not at the top: torch takes seconds, in which Ctrl-C is to be heard.
    from benchmarks.run import NAMES, PICTURE, TURNS, format_results, run
    from bov_megatron.compat import quiet_megatron_imports

    listing = "".join(f"\n  {name:<11}{text}" for name, text in NAMES.items())
    parser = argparse.ArgumentParser(
        description=__doc__ + f"\nbenchmarks:{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="benchmarks to run (default: all that can run here)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write every number to FILE")
    parser.add_argument("--quick", action="store_true", help="tiny models and one turn")
    parser.add_argument("--turns", type=int, help=f"how often each variant is timed (default {TURNS}; 1 with --quick)")
    parser.add_argument("--threads", type=int, help="torch's threads (default: OMP_NUM_THREADS, else one per core)")
    parser.add_argument("--against", metavar="COMMIT", help="with `step`: this tree's step against that of a commit")
    parser.add_argument(
        "--set", metavar="FIELD=VALUE", action="append", default=[], help="with `step`: a recipe field, of this tree"
    )
    parser.add_argument("--picture", metavar="FILE", type=Path, default=PICTURE, help="PNG that `generate` draws "
                        "(default %(default)s)")  # fmt: skip
    parser.add_argument(
        "--seed", type=int, default=0, help="of the studies that `coverage` draws (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes of measuring
    quiet_megatron_imports()
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # for the ranks of `lookup`, which start anew
    try:
        results = run(
            options.names,
            options.quick,
            options.turns,
            options.threads,
            options.against,
            options.set,
            options.picture,
            options.seed,
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    print(format_results(results))
    return 0


if __name__ == "__main__":
    run_program(main, CtrlC())
