"""A run's numbers as curves: against what they are drawn, and how many points are drawn of long runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

from bov_megatron.errors import BovError, RecipeError
from bov_megatron.lifecycle import run_folder
from bov_megatron.plotting.metrics import Columns, read_many
from bov_megatron.recipe import Recipe, recipe_from_dict
from bov_megatron.recipe.parameters import KINDS
from bov_megatron.recipe.quantities import flops_per_token

POINTS = 500
"""Horizontal places of a curve: longer runs are drawn by the lowest, highest and mean value in each place."""
X_AXES = {
    "steps": "optimizer steps",
    "tokens": "tokens",
    "flops": "training FLOPs",
    "hours": "hours of training (validation and saving left out)",
}
RATES = tuple(f"learning_rate/{kind}" for kind in KINDS)
KEYS = ("tokens", "loss", "gradient_norm", "validation_bits_per_byte", "tokens_per_second", "mfu")


@dataclass(frozen=True)
class Run:
    """What is drawn of a run."""

    label: str
    folder: Path
    columns: Columns
    recipe: Recipe | None
    """The one of its last start; None where it cannot be read."""
    x: np.ndarray
    """Of every line, on the axis that was asked for."""
    evaluations: list[dict[str, float]] = field(default_factory=list)
    """Scores of checkpoints that were evaluated on their own, by step."""

    def curve(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """x and values of the lines and evaluations that have `key`; training steps whose number was not finite are
        left out."""
        values = self.columns.numbers[key]
        known = np.isfinite(values)
        x, values = self.x[known], values[known]
        alone = [line for line in self.evaluations if key in line]
        if not alone:
            return x, values
        x = np.append(x, np.interp([line["step"] for line in alone], self.columns.numbers["step"], self.x))
        order = np.argsort(x, kind="stable")
        return x[order], np.append(values, [line[key] for line in alone])[order]

    def last(self, key: str) -> float | None:
        _, values = self.curve(key)
        return float(values[-1]) if len(values) else None

    @property
    def step(self) -> int:
        return int(self.columns.numbers["step"][-1])

    def not_finite(self) -> np.ndarray:
        """x of the steps whose loss was not finite."""
        return self.x[self.columns.is_step & ~np.isfinite(self.columns.numbers["loss"])]

    def rolled_back(self) -> np.ndarray:
        """x of the steps from which the run went back to a checkpoint."""
        steps, x = self.columns.numbers["step"], self.x
        return np.interp([rollback["from_step"] for rollback in self.columns.rollbacks], steps, x)


def read_runs(folders: Sequence[Path], x_axis: str = "steps") -> list[Run]:
    """Read the metrics of run folders; of one run all learning rates, of several those of block matrices.

    `x_axis` is one of X_AXES. Raises RunFolderError, and RecipeError where FLOPs cannot be counted.
    """
    recipes = [read_recipe(folder) for folder in folders]
    keys = [*KEYS, *(RATES if len(folders) == 1 else RATES[:1]), *(["step_seconds"] if x_axis == "hours" else [])]
    keys += dict.fromkeys(key for recipe in recipes if recipe for key in evaluation_keys(recipe))
    columns = read_many(folders, keys)
    return [
        Run(label, folder, table, recipe, _x(table, x_axis, recipe, folder), _read_evaluations(folder))
        for label, folder, table, recipe in zip(labels(folders), folders, columns, recipes, strict=True)
    ]


def evaluation_keys(recipe: Recipe) -> list[str]:
    """Fields of the scores that are drawn of an evaluation: bits per byte of held-out sets, and CORE."""
    e = recipe.evaluation
    held_out = [f"evaluation/bits_per_byte/{held_out.name}" for held_out in e.held_out]
    return [*held_out, *(["evaluation/core_subset" if e.core_tasks else "evaluation/core"] if e.core else [])]


def _read_evaluations(folder: Path) -> list[dict[str, float]]:
    return [json.loads(path.read_text()) for path in run_folder.list_evaluations(folder)]


def labels(folders: Sequence[Path]) -> list[str]:
    """A name for each run: the last part of its path that differs from the others', e.g. `bov/seed1`."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(set(parts)):
            break
    return names


def read_recipe(run_dir: Path) -> Recipe | None:
    """The recipe of a run's last start; None where there is none that this version reads."""
    try:
        return recipe_from_dict(yaml.safe_load((run_dir / run_folder.RECIPE).read_text()))
    except (OSError, BovError, yaml.YAMLError):
        return None


def _x(columns: Columns, x_axis: str, recipe: Recipe | None, folder: Path) -> np.ndarray:
    numbers = columns.numbers
    if x_axis == "steps":
        return numbers["step"]
    if x_axis == "tokens":
        return numbers["tokens"]
    if x_axis == "flops":
        if recipe is None:
            raise RecipeError(
                f"{folder / run_folder.RECIPE} cannot be read, so FLOPs cannot be counted; draw against --x tokens"
            )
        return numbers["tokens"] * flops_per_token(recipe.model)
    # Lines may be thinned out: one stands for the steps since the line before.
    steps = np.diff(numbers["step"], prepend=0)
    return np.cumsum(np.nan_to_num(numbers["step_seconds"]) * steps) / 3600


@dataclass(frozen=True)
class Envelope:
    """A curve of at most POINTS places; no value lies outside of it."""

    x: np.ndarray
    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray

    @property
    def is_thinned(self) -> bool:
        """Whether a place stands for several values."""
        return bool((self.low != self.high).any())


def envelope(x: np.ndarray, values: np.ndarray, points: int = POINTS) -> Envelope:
    """Lowest, highest and mean value of equal stretches of `x` (ascending), so that a spike of one step is drawn."""
    if len(x) <= points:
        return Envelope(x, values, values, values)
    place = np.minimum((x - x[0]) / (x[-1] - x[0]) * points, points - 1).astype(int)
    first = np.flatnonzero(np.diff(place, prepend=-1))
    counts = np.diff(np.append(first, len(x)))
    return Envelope(
        np.add.reduceat(x, first) / counts,
        np.minimum.reduceat(values, first),
        np.maximum.reduceat(values, first),
        np.add.reduceat(values, first) / counts,
    )


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Centred moving average over `window` values (odd), over fewer at both ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    begin, end = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[end] - sums[begin]) / (end - begin)
