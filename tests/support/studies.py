"""Studies whose law is known: results as runs would leave them, without running anything."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import pandas as pd

from bov_megatron.recipe import Recipe
from bov_megatron.studies.law import Law
from bov_megatron.studies.study import Cell, Study

LAW = Law(1.7, 420.0, 1100.0, 0.36, 0.37, {"bank": 1.25, "first_layer": 0.93}, {"bank": 1.1, "first_layer": 1.0})
SIZES = {"d4": 4.2e6, "d6": 9.6e6, "d8": 19.5e6, "d10": 35.1e6, "d12": 58.2e6}
BUDGETS = ("1e16", "3e16", "1e17")
SPEEDS = {"bank": 1.02, "first_layer": 1.03}
"""Tokens per second, of the baseline's."""


def make_study(folder: Path, variants=("baseline", "bank"), sizes=SIZES, budgets=BUDGETS, seeds=2) -> Study:
    """A study in `folder`, with a cell for each combination."""
    recipe = Recipe(output_dir=str(folder))
    cells = tuple(
        Cell(
            name := f"{variant}-{size}-{budget}-s{seed}", variant, size, budget, seed, recipe,
            Path("recipes/smoke.yaml"),
            (f"output_dir={folder}/cells/{name}", f"train.seed={seed}"), 1,
        )
        for variant in variants for size in sizes for budget in budgets for seed in range(seeds)
    )  # fmt: skip
    text = "Is a bank of values worth its memory?\n\nMade from a known law, to show what a page looks like."
    return Study("known-law", folder / "known-law.yaml", text, "baseline", folder, cells)


def make_results(study: Study, law: Law = LAW, noise: float = 0.0015, seed: int = 0) -> pd.DataFrame:
    """The results table of `study`: losses from `law` with relative noise, half of it shared by runs of one seed."""
    generator = np.random.default_rng(seed)
    shared: dict = {}
    rows = []
    for cell in study.cells:
        n = SIZES[cell.size]
        saved = 0.0 if cell.variant == "baseline" else 0.02 * n
        d = float(cell.budget) / (6 * (n - saved))
        common = shared.setdefault((cell.size, cell.budget, cell.seed), generator.normal())
        error = noise * (common + generator.normal()) / np.sqrt(2)
        loss = float(law.loss(n, d, cell.variant) * np.exp(error))
        tables = 4 * n if cell.variant == "bank" else 0.0
        speed = 4e12 / (6 * n) * SPEEDS.get(cell.variant, 1.0) * generator.normal(1, 0.01)
        rows.append(
            dict(
                cell=cell.name, variant=cell.variant, size=cell.size, budget=cell.budget, seed=cell.seed,
                steps=round(d / 65536), tokens=d, flops=float(cell.budget), n_all=1.3 * n + tables,
                n_without_embeddings=n + tables, n_without_tables=1.3 * n, n_matrices=0.9 * n - saved,
                n_matrices_and_head=n - saved, loss=loss, bits_per_byte=loss / np.log(2) / 4.3,
                tokens_per_second=speed, seconds=d / speed, restarts=int(generator.poisson(0.1)),
                commit="3f2c9d1e8a", digest=f"{zlib.crc32(cell.name.encode()):016x}",
                run=str(study.output_dir / "cells" / cell.name),
            )
        )  # fmt: skip
    return pd.DataFrame(rows)


def write_runs(results: pd.DataFrame, lines: int = 300) -> None:
    """Run folders of `results` with metrics of curves that end at their losses."""
    generator = np.random.default_rng(1)
    for run in results.itertuples():
        folder = Path(run.run)
        folder.mkdir(parents=True, exist_ok=True)
        tokens = run.tokens * np.arange(1, lines + 1) / lines
        losses = run.loss + 5.5 * np.exp(-40 * tokens / run.tokens) + 0.5 * (1 - tokens / run.tokens)
        losses += generator.normal(0, 0.02, lines)
        records = [{"step": n + 1, "tokens": tokens[n], "loss": losses[n]} for n in range(lines)]
        records[-1]["validation_bits_per_byte"] = run.bits_per_byte
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "recipe.yaml").write_text("name: made\n")
