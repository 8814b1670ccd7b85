"""Drawing twenty runs of a hundred thousand steps: `bov plot`, with the start of Python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.timing import Spread

ROOT = Path(__file__).resolve().parent.parent
RUNS, STEPS, QUICK_STEPS = 20, 100_000, 1_000


def bench_plot(turns: int, quick: bool) -> dict:
    """Seconds, and seconds of all processors, of one command over runs whose lines are as a trainer writes them."""
    steps = QUICK_STEPS if quick else STEPS
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folders = [folder / f"run{number:02}" for number in range(RUNS)]
        for number, run_dir in enumerate(folders):
            run_dir.mkdir()
            _write(run_dir / "metrics.jsonl", steps, number)
        size = (folders[0] / "metrics.jsonl").stat().st_size
        command = [sys.executable, ROOT / "tools/plot.py", *folders, "--out", folder / "out.png"]
        wall, processor = zip(*(_time(command) for _ in range(turns)), strict=True)
    return {
        "runs": RUNS,
        "steps": steps,
        "megabytes_a_run": size / 1e6,
        "seconds": Spread.of(wall),
        "processor_seconds": Spread.of(processor),
    }


def _time(command: list) -> tuple[float, float]:
    before, started = os.times(), time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    wall, after = time.perf_counter() - started, os.times()
    return wall, after.children_user + after.children_system - before.children_user - before.children_system


def _write(path: Path, steps: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    line = {"step": 0, "loss": 0.5, "gradient_norm": 0.25, "updated": True, "digest": "0123456789ab", "tokens": 1}
    rates = ("matrix", "embedding", "output", "table", "coefficient", "smear")
    line |= {f"learning_rate/{kind}": 0.0123456789 for kind in rates}
    line |= {"step_seconds": 0.5012345678, "tokens_per_second": 1046006.0123, "mfu": 0.4123456789}
    line |= {"data_rank": 3, "data_seconds": 0.000123456}
    form = json.dumps(line).replace('"step": 0', '"step": %d').replace("0.5,", "%r,", 1).replace("0.25", "%r", 1)
    losses, norms = random.normal(3, 0.1, steps).tolist(), random.normal(1, 0.1, steps).tolist()
    path.write_text("".join(form % (i + 1, losses[i], norms[i]) + "\n" for i in range(steps)))
