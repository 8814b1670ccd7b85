"""A checkpoint scored by what its run's recipe lists under `evaluation`, into the run's record."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.data.files import write_atomically
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.layout import Layout, open_engine
from bov_megatron.evaluation.suite import Suite
from bov_megatron.evaluation.target import Target
from bov_megatron.lifecycle import run_folder
from bov_megatron.parallel.agreement import on_first_rank
from bov_megatron.recipe import Recipe, recipe_from_dict


def record(target: Target, layout: Layout, dtype: str = "auto") -> dict[str, Any]:
    """Score a checkpoint and write `RUN/evaluations/step_….json`; collective over the processes of `layout`.

    Returns what is written: `step`, `tokens`, the scores as training names them in its metrics, and
    `evaluation_seconds`. Raises EvaluationError where the target isn't a run's checkpoint or its recipe lists nothing.
    """
    if target.is_export:
        raise EvaluationError(f"--record: {target.folder} is an export, without a run to record its scores in")
    run_dir, step = run_folder.run_dir_of(target.folder), run_folder.step_of(target.folder)
    recipe = _recipe_of(run_dir)
    if not recipe.evaluation.lists_anything:
        raise EvaluationError(
            f"--record: {run_dir / run_folder.RECIPE} lists nothing to evaluate: set held_out, tasks or core in its "
            "section `evaluation`, or give --core, --tasks or --packed"
        )
    with open_engine(target, layout, dtype) as engine:
        suite = Suite(recipe, target.tokenizer, together=True)
        started = time.monotonic()
        scores = suite.score(engine)
        assert step is not None and scores is not None
        line = {"step": step, "tokens": step * recipe.batch_tokens, **scores}
        line["evaluation_seconds"] = time.monotonic() - started
        on_first_rank(lambda: _write(run_folder.evaluation_path(run_dir, step), line))
    return line


def _recipe_of(run_dir: Path) -> Recipe:
    path = run_dir / run_folder.RECIPE
    try:
        return recipe_from_dict(yaml.safe_load(path.read_text()))
    except (OSError, yaml.YAMLError) as error:
        raise EvaluationError(f"--record: {path} cannot be read ({error}); it says what to evaluate") from None


def _write(path: Path, line: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    write_atomically(path, (json.dumps(line) + "\n").encode())
