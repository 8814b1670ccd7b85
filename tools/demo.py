#!/usr/bin/env python
"""The whole path on this machine, in minutes: train a tokenizer on Python's own sources, write shards, train a
Bank-of-Values model and its baseline on two tensor-parallel ranks, export both to Hugging Face, evaluate them,
and leave a table of results and a plot of the loss curves."""

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each model (default: the recipe's)")
    options = parser.parse_args()

    from bov_megatron.compat import quiet_megatron_imports, register_missing_torchvision_ops

    quiet_megatron_imports()
    register_missing_torchvision_ops()
    from bov_megatron.demo import run_demo

    try:
        run_demo(options.out.resolve(), options.steps)
    except subprocess.CalledProcessError as error:
        print(f"error: the command above ended with status {error.returncode}", file=sys.stderr)
        return error.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
