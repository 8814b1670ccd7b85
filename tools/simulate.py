#!/usr/bin/env python
"""`bov simulate`, for a checkout where the package is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bov_megatron.commands import program

if __name__ == "__main__":
    program("simulate")
