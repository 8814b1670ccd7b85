"""The finished cells of a study as a table, one row each.

What was read from a run's metrics is kept in OUTPUT_DIR/results.json, with the sizes and times of the files that it
came from: the metrics of a finished run are read once.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import json as arrow_json

from bov_megatron.errors import StudyError
from bov_megatron.lifecycle import run_folder
from bov_megatron.recipe.quantities import flops_per_token, parameters_by_convention, total_steps
from bov_megatron.studies import folder
from bov_megatron.studies.study import Cell, Study

COLUMNS = {
    "cell": "object", "variant": "object", "size": "object", "budget": "object", "seed": "int64", "steps": "int64",
    "tokens": "int64", "flops": "float64", "n_all": "int64", "n_without_embeddings": "int64",
    "n_without_tables": "int64", "n_matrices": "int64", "n_matrices_and_head": "int64", "loss": "float64",
    "bits_per_byte": "float64", "tokens_per_second": "float64", "seconds": "float64", "restarts": "int64",
    "commit": "object", "digest": "object", "run": "object",
}  # fmt: skip
"""Columns of the table and their types; docs/use/studies.md says what is in them."""
_FIELDS = ("step", "tokens_per_second", "step_seconds", "validation_loss", "validation_bits_per_byte")
_SCHEMA = pa.schema([(name, pa.float64()) for name in _FIELDS])
_CACHE_VERSION = 1
READERS = 8
"""Run folders read at the same time."""


@dataclass(frozen=True)
class Results:
    """The finished cells, and what was found on the way."""

    table: pd.DataFrame
    """COLUMNS, a row per finished cell, in the study's order."""
    problems: tuple[str, ...]
    """Cells that are left out although they were run, and rows without a loss; each with the remedy."""


def without_speeds(results: Results) -> Results:
    """The same without what clocks have measured."""
    return dataclasses.replace(results, table=results.table.assign(tokens_per_second=math.nan, seconds=math.nan))


def read_results(study: Study) -> Results:
    """The results of all finished cells. Runs of another recipe than the study's are left out, and named."""
    path = study.output_dir / folder.RESULTS
    known = _read_cache(path)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda cell: _read(cell, known.get(cell.name)), study.cells))
    models: dict[str, dict[str, float]] = {}
    rows = []
    for cell, run in zip(study.cells, found, strict=True):
        if run.state is not None and run.kept is not None:
            model = repr(cell.recipe.model)
            if model not in models:
                models[model] = _model_numbers(cell)
            rows.append(_row(cell, run.state, models[model], run.kept["measured"]))
    kept = {cell.name: run.kept for cell, run in zip(study.cells, found, strict=True) if run.kept is not None}
    if kept != known:
        _write_cache(path, kept)
    table = pd.DataFrame(rows, columns=list(COLUMNS)).astype(COLUMNS)
    return Results(table, tuple(run.problem for run in found if run.problem))


@dataclass(frozen=True)
class _Read:
    """What was found of one cell."""

    state: folder.RunState | None = None
    kept: dict[str, Any] | None = None
    """For the file of results, if it is finished: `key` of the files read, and what was `measured`."""
    problem: str = ""


def _read(cell: Cell, known: dict[str, Any] | None) -> _Read:
    try:
        state = folder.read_state(cell)
        if state.edits and state.starts.starts:
            return _Read(
                problem=f"{cell.name} is left out: it was run with another recipe "
                f"({folder.describe_edits(state.edits)}); undo the change, or run it again with submit --set-aside"
            )
        if not state.finished:
            return _Read()
        key = _key(cell)
        if known is None or known["key"] != key:
            known = {"key": key, "measured": _measure(cell)}
    except StudyError as error:
        return _Read(problem=str(error))
    problem = ""
    if not math.isfinite(known["measured"]["loss"]):
        problem = (
            f"{cell.name} has no finite validation loss: it diverged, or was trained before runs wrote "
            "validation_loss; look at its metrics.jsonl, and start it anew in an empty folder"
        )
    return _Read(state, known, problem)


def _model_numbers(cell: Cell) -> dict[str, float]:
    counts = parameters_by_convention(cell.recipe.model)
    return {f"n_{name}": count for name, count in counts.items()} | {"flops": flops_per_token(cell.recipe.model)}


def _row(cell: Cell, state: folder.RunState, model: dict[str, float], measured: dict[str, float]) -> dict[str, Any]:
    steps = total_steps(cell.recipe)
    tokens = steps * cell.recipe.batch_tokens
    commits = list(dict.fromkeys(line["commit"] for line in state.starts.starts))
    return {
        "cell": cell.name,
        "variant": cell.variant,
        "size": cell.size,
        "budget": cell.budget,
        "seed": cell.seed,
        "steps": steps,
        "tokens": tokens,
        **model,
        "flops": model["flops"] * tokens,
        **measured,
        "restarts": state.restarts,
        "commit": ", ".join(commits),
        "digest": state.digest,
        "run": str(cell.run_dir),
    }


def _measure(cell: Cell) -> dict[str, float]:
    """Final validation, and speed over the whole run, from the run's metrics."""
    path = cell.run_dir / run_folder.METRICS
    metrics = _read_metrics(cell, path)
    columns = {name: metrics[name].to_numpy() for name in _FIELDS}
    steps = total_steps(cell.recipe)
    # A validation that is nan is one; lines without have null.
    validated = metrics["validation_bits_per_byte"].is_valid().to_numpy()
    (last,) = np.nonzero((columns["step"] == steps) & validated)
    if not len(last):
        raise StudyError(
            f"cell {cell.name} has finished, but {path} has no validation after step {steps}; restore the file, or "
            "move the run folder away and start the cell again"
        )
    seconds, rates = (values[~np.isnan(values)] for values in (columns["step_seconds"], columns["tokens_per_second"]))
    return {
        "loss": float(columns["validation_loss"][last[-1]]),
        "bits_per_byte": float(columns["validation_bits_per_byte"][last[-1]]),
        "tokens_per_second": float(np.median(rates)) if len(rates) else math.nan,
        # With logging.interval above 1 most steps have no line: the others stand for them.
        "seconds": steps * float(seconds.mean()) if len(seconds) else math.nan,
    }


def _read_metrics(cell: Cell, path: Path) -> pa.Table:
    """The complete lines of a metrics file, with the columns _FIELDS."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise StudyError(
            f"cell {cell.name} has finished, but {path} is missing; restore it, or move the run folder away and start "
            "the cell again"
        ) from None
    data = data[: data.rfind(b"\n") + 1]
    read = arrow_json.ReadOptions(use_threads=False, block_size=len(data) + 1)
    parse = arrow_json.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
    try:
        return arrow_json.read_json(io.BytesIO(data), read_options=read, parse_options=parse)
    except pa.ArrowInvalid as error:
        for line in data.splitlines():
            folder.parse_line(path, line)  # names the line that is damaged
        raise StudyError(f"{path} cannot be read: {error}; move the run folder away") from None


def _key(cell: Cell) -> list[int]:
    """Changes whenever the run has gone on."""
    key = []
    for name in (run_folder.METRICS, run_folder.STARTS):
        try:
            found = (cell.run_dir / name).stat()
            key += [found.st_size, found.st_mtime_ns]
        except FileNotFoundError:
            key += [0, 0]
    return key


def _read_cache(path: Path) -> dict[str, Any]:
    """Cell -> `key` and `measured`; empty where there is no file that this version wrote."""
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return stored["cells"] if isinstance(stored, dict) and stored.get("version") == _CACHE_VERSION else {}


def _write_cache(path: Path, cells: dict[str, Any]) -> None:
    part = path.with_suffix(f".{os.getpid()}.part")
    part.write_text(json.dumps({"version": _CACHE_VERSION, "cells": cells}))
    part.replace(path)
