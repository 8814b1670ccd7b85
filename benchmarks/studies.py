"""Status and results of a study of many cells, from run folders that are written for it."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import yaml

from benchmarks.timing import Spread, take_turns
from bov_megatron import errors
from bov_megatron.lifecycle import run_folder
from bov_megatron.recipe.identity import recipe_digest
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.studies import folder
from bov_megatron.studies.results import read_results
from bov_megatron.studies.status import read_status
from bov_megatron.studies.study import Cell, load_study

SMOKE = Path(__file__).resolve().parent.parent / "recipes" / "smoke.yaml"
_DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
STEPS = 200
"""Of each run; every step has a line of metrics."""


def bench_studies(turns: int, quick: bool) -> dict:
    """Seconds to load a study of 2,000 finished cells, to tell their status, and to read their results: for the first
    time, and again with what was kept from it. Run folders lie in the page cache."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder_name:
        path = write_study(Path(folder_name), seeds=1 if quick else 10)
        study = load_study(path)
        for cell in study.cells:
            write_run(cell)
        kept = study.output_dir / folder.RESULTS

        def first(turn: int) -> None:
            kept.unlink(missing_ok=True)
            read_results(study)

        timings = take_turns(
            {
                "load": lambda turn: load_study(path),
                "status": lambda turn: read_status(study),
                "results_first": first,
                "results_again": lambda turn: read_results(study),
            },
            turns,
        )
        states = {status.state for status in read_status(study)}
        rows = len(read_results(study).table)
    if states != {"complete"} or rows != len(study.cells):
        raise RuntimeError(f"{rows} rows of {len(study.cells)} cells, states {states}")
    seconds = {f"{name}_seconds": Spread.of(timing.wall) for name, timing in timings.items()}
    return {"cells": len(study.cells), "lines_of_metrics": len(study.cells) * STEPS, **seconds}


def write_study(parent: Path, seeds: int) -> Path:
    """A study file of 200 cells per seed."""
    values = {
        "base": str(SMOKE),
        "output_dir": str(parent / "study"),
        "overrides": {"parallel.tensor_model_parallel_size": 1, "train.global_batch_size": 16},
        "variants": {"baseline": {"model.value.source": "projection"}, "bank": {"model.value.source": "bank"}},
        "sizes": {f"d{depth}": {"depth": depth, "aspect_ratio": 16, "head_dim": 32} for depth in range(2, 12)},
        "budgets": {"tokens": [STEPS * 16 * 256 + 4096 * number for number in range(10)]},
        "seeds": list(range(seeds)),
    }
    path = parent / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def write_run(cell: Cell, lines: int = STEPS) -> None:
    """The run folder of a finished run of `cell` with `lines` lines of metrics, as training leaves it, without
    checkpoints."""
    cell.run_dir.mkdir(parents=True, exist_ok=True)
    (cell.run_dir / run_folder.RECIPE).write_text(yaml.dump(cell.recipe.to_dict(), Dumper=_DUMPER))
    start = {"time": "2026-11-25T03:00:00+00:00", "start": 0, "commit": "0123456789ab", "version": "0.1.0"}
    start |= {"digest": recipe_digest(cell.recipe), "world_size": 1, "host": "node1", "job": None}
    steps = total_steps(cell.recipe)
    end = {"time": "2026-11-25T04:00:00+00:00", "end": steps, "status": errors.DONE}
    (cell.run_dir / run_folder.STARTS).write_text(f"{json.dumps(start)}\n{json.dumps(end)}\n")
    (cell.run_dir / run_folder.METRICS).write_text("".join(_metrics(cell, steps, lines)))


def _metrics(cell: Cell, steps: int, lines: int):
    for step in range(steps - lines + 1, steps + 1):
        line = {
            "step": step,
            "loss": 8 / step**0.1,
            "gradient_norm": 0.5,
            "updated": True,
            "digest": "0123456789abcdef",
        }
        line["tokens"] = step * cell.recipe.batch_tokens
        kinds = ("matrix", "embedding", "output", "table", "coefficient", "projection_coefficient", "smear")
        line |= {f"learning_rate/{kind}": 0.02 for kind in kinds}
        line |= {"step_seconds": 0.25, "tokens_per_second": 16384.0 + step, "data_rank": 0, "data_seconds": 0.0001}
        if step == steps:
            line |= {"validation_bits_per_byte": 1.5, "validation_loss": 4.2, "validation_seconds": 2.0}
        yield json.dumps(line) + "\n"
