"""Small studies, and run folders that look as if their cells had been trained."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from bov_megatron.studies.study import Cell
from tests.support.runs import SMOKE, TINY

DROPPED = ("train.steps", "model.num_layers", "model.hidden_size", "model.num_attention_heads")
"""Fields of TINY that a study sets itself."""


def tiny_study(parent: Path, data, steps: tuple[int, ...] = (2,), **changes) -> Path:
    """A study file with runs of `steps` steps of 1,024 tokens; `changes` replace its sections."""
    fields = dict(item.split("=", 1) for item in (*TINY, *data.overrides()))
    overrides = {key: yaml.safe_load(value) for key, value in fields.items() if key not in DROPPED}
    values = {
        "base": SMOKE,
        "output_dir": str(parent / "study"),
        "overrides": overrides,
        "variants": {"baseline": {"model.value.source": "projection"}, "bank": {"model.value.source": "bank"}},
        "sizes": {"d3": {"depth": 3, "aspect_ratio": 8, "head_dim": 8}},
        "budgets": {"tokens": [1024 * count for count in steps]},
        "seeds": [0],
    }
    path = parent / "tiny.yaml"
    path.write_text(yaml.safe_dump(values | changes, sort_keys=False))
    return path


def edit(path: Path, **changes) -> None:
    """Change fields of a study's overrides; `_` stands for `.`'s place: train__seed is train.seed."""
    values = yaml.safe_load(path.read_text())
    values["overrides"] |= {key.replace("__", "."): value for key, value in changes.items()}
    path.write_text(yaml.safe_dump(values))


def starts(cell: Cell) -> list[dict]:
    """Lines of a run's starts.jsonl."""
    return [json.loads(line) for line in (cell.run_dir / "starts.jsonl").read_text().splitlines()]


def write_starts(cell: Cell, *lines: dict) -> None:
    """Replace them."""
    (cell.run_dir / "starts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
