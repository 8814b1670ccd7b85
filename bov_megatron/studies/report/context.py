"""What the template is given: every number as (value, how it is written)."""

from __future__ import annotations

import datetime
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from bov_megatron import __version__
from bov_megatron.studies.findings import LEVEL, Findings
from bov_megatron.studies.multiplier import Multiplier
from bov_megatron.studies.report import sentences
from bov_megatron.studies.report.style import Look
from bov_megatron.studies.report.tables import CELL, SCORES, fixed, headline_score, interval, scientific, significant
from bov_megatron.studies.study import Study
from bov_megatron.studies.table import CONVENTIONS

Number = tuple[float | None, str]
LAW_NAMES = {"E": "E", "A": "A", "B": "B", "alpha": "α", "beta": "β", "compute_exponent": "α_C = αβ/(α+β)"}
_FILES = [
    ("runs.csv", "every run"), ("summary.csv", "means and differences"), ("report.json", "the answer and the fits"),
    ("runs.parquet", "typed"), ("summary.parquet", "typed"),
]  # fmt: skip


def context_of(
    study: Study, results: pd.DataFrame, summary: pd.DataFrame, findings: Findings, looks: Mapping[str, Look],
    out: Path, problems: Sequence[str],
) -> dict:  # fmt: skip
    """Variables of page.html.j2, without pictures."""
    others = [variant for variant in looks if variant != study.baseline]
    fits = list(findings.fits.values())
    level = fits[0].level if fits else LEVEL
    done = set(results.cell)
    cells = {cell.name: cell for cell in study.cells}
    groups = [group for _, group in summary.groupby(CELL, sort=False)]
    return {
        "title": study.name,
        "description": [text.strip() for text in study.description.split("\n\n") if text.strip()],
        "facts": _facts(study, results, others),
        "answers": _answers(study, others, findings),
        "warnings": [*problems, *findings.warnings],
        "multipliers": [_multiplier(m, looks) for m in in_order(findings.multipliers, looks)],
        "level": sentences.percent(level),
        "overall": sentences.overall(results, study.baseline, headline_score(results), level),
        "summary": [[_summary_row(row, study.baseline) for row in group.itertuples()] for group in groups],
        "summary_columns": _SUMMARY_COLUMNS,
        "summary_caption": _summary_caption(summary, study.baseline),
        "fits": [{"convention": CONVENTIONS[fit.n_column]} for fit in fits],
        "law_rows": _law_rows(fits),
        "separate": [_separate(fit, variant, law) for fit in fits[:1] for variant, law in fit.separate.items()],
        "isoflop_notes": sentences.isoflop(findings.cross_checks),
        "checks": sentences.checks(fits[0]) if fits else [],
        "missing": [name for name in cells if name not in done],
        "runs": [_run(run, cells.get(run.cell), study, out) for run in results.itertuples()],
        "run_columns": _RUN_COLUMNS,
        "files": _FILES,
        "colophon": f"Made {datetime.date.today().isoformat()} by bov_megatron {__version__} from {study.path.name}.",
    }


def _facts(study: Study, results: pd.DataFrame, others: list[str]) -> list[str]:
    counted = f"{len(results)} of {max(len(study.cells), len(results))} runs finished"
    # A run that was started again may have several.
    commits = sorted({one for own in results.commit.dropna() for one in own.split(", ")})
    facts = [counted, f"baseline: {study.baseline}", f"compared with it: {', '.join(others) or 'nothing'}"]
    if len(results):
        smallest, largest = significant(results.n_all.min()), significant(results.n_all.max())
        facts.append(f"{results['size'].nunique()} sizes, {smallest} to {largest} parameters")
        facts.append(f"{scientific(results.flops.min())} to {scientific(results.flops.max())} FLOPs a run")
        facts.append(f"seeds: {', '.join(str(seed) for seed in sorted(results.seed.unique()))}")
    if commits:
        facts.append(("commit " if len(commits) == 1 else "commits ") + ", ".join(commits))
    return facts


def _answers(study: Study, others: list[str], findings: Findings) -> list[dict]:
    if not others:
        text = f"There is no variant to compare with {study.baseline}: the law below is the baseline's alone."
        return [{"carried": True, "sentences": [text]}]
    found = []
    for variant in others:
        nothing = f"no run of {variant} has finished: start them with `bov study submit`"
        refusal = findings.refusals.get(variant, nothing)
        carried = any(m.variant == variant for m in findings.multipliers)
        lines = sentences.answer(variant, study.baseline, findings.multipliers, refusal)
        found.append({"carried": carried, "sentences": lines})
    return found


def in_order(multipliers: Sequence[Multiplier], looks: Mapping[str, Look]) -> list[Multiplier]:
    """By variant, compute before time; then as they came, the headline's count of parameters first."""
    variants = list(looks)
    return sorted(multipliers, key=lambda m: (variants.index(m.variant), m.clock))


def _multiplier(m, looks: Mapping[str, Look]) -> dict:
    return {
        "variant": m.variant,
        "colour": looks[m.variant].colour,
        "kind": "wall-clock" if m.clock else "compute",
        "convention": CONVENTIONS[m.n_column],
        "numbers": _plain([*zip(m.value, interval(*m.value), strict=True), (m.at, scientific(m.at))]),
        "carried": _carried(m),
    }


def _carried(m) -> str:
    inside = m.flops[m.carried]
    return f"{scientific(inside.min())} to {scientific(inside.max())}"


_SUMMARY_COLUMNS = [
    ("size", True), ("budget", True), ("variant", True), ("runs", False), ("parameters", False),
    ("FLOPs per token", False), ("steps", False), ("tokens", False), ("loss", False), ("difference", False),
    ("bits per byte", False), ("difference", False), ("tokens/s", False),
]  # fmt: skip
"""Words, and whether the column holds text."""


def _summary_row(row, baseline: str) -> dict:
    cells = [
        [(row.runs, str(row.runs))],
        [(row.parameters, significant(row.parameters, 4))],
        [(row.flops_per_token, significant(row.flops_per_token, 4))],
        [(row.steps, f"{row.steps:.0f}")],
        [(row.tokens, significant(row.tokens, 4))],
    ]
    for score in SCORES:
        mean, difference, error = (
            getattr(row, name) for name in (score, f"{score}_difference", f"{score}_standard_error")
        )
        cells += [[(mean, fixed(mean))], [(difference, fixed(difference, 4, True))]]
        if np.isfinite(error):
            cells[-1].append((error, fixed(error)))
    cells.append([(row.tokens_per_second, significant(row.tokens_per_second))])
    return {
        "is_baseline": row.variant == baseline,
        "labels": [row.size, row.budget, row.variant],
        "cells": [_plain(numbers) for numbers in cells],
    }


def _plain(numbers) -> list[Number]:
    """Values that a page can hold: Python's own numbers, None for NaN."""
    return [(None if np.isnan(float(value)) else float(value), text) for value, text in numbers]


def _summary_caption(summary: pd.DataFrame, baseline: str) -> str:
    text = (
        f"Final validation, means over seeds; difference to {baseline} over runs of the same size, budget and seed, "
        "and its standard error (±)"
    )
    degrees = summary.loss_degrees.dropna().unique()
    if not len(degrees) or degrees.max() == 0:
        return text + ", which one seed can't give."
    shown = ", ".join(f"{d:.0f}" for d in sorted(degrees))
    return text + f", from the spread between seeds pooled over a variant's cells ({shown} degrees of freedom)."


def _law_rows(fits) -> list[dict]:
    names = list(dict.fromkeys(name for fit in fits for name in fit.intervals))
    return [{"name": law_name(name), "cells": [_law_cell(fit, name) for fit in fits]} for name in names]


def law_name(name: str) -> str:
    """`n_factor.bank` as it is written in a table."""
    kind, dot, variant = name.partition(".")
    return f"{'k_N' if kind == 'n_factor' else 'k_D'}, {variant}" if dot else LAW_NAMES.get(name, name)


def law_value(law, name: str) -> float:
    """A parameter of a law by the name that `Fit.intervals` gives it."""
    kind, dot, variant = name.partition(".")
    return float(getattr(law, kind + "s")[variant] if dot else getattr(law, name))


def _law_cell(fit, name: str) -> dict | None:
    if name not in fit.intervals:
        return None
    low, high = map(float, fit.intervals[name])
    value = law_value(fit.law, name)
    return {
        "value": value, "low": low, "high": high, "text": significant(value, 4), "low_text": significant(low, 4),
        "high_text": significant(high, 4),
    }  # fmt: skip


def _separate(fit, variant: str, law) -> dict:
    values = (law.E, law.A, law.B, law.alpha, law.beta)
    return {
        "variant": variant,
        "convention": CONVENTIONS[fit.n_column],
        "numbers": _plain((value, significant(value, 4)) for value in values),
    }


_RUN_COLUMNS = [
    ("run", True), ("steps", False), ("tokens", False), ("FLOPs", False), ("parameters", False), ("loss", False),
    ("bits per byte", False), ("tokens/s", False), ("seconds", False), ("restarts", False), ("recipe", True),
    ("commit", True),
]  # fmt: skip


def _run(run, cell, study: Study, out: Path) -> dict:
    numbers = [
        (run.steps, f"{run.steps}"), (run.tokens, significant(run.tokens, 4)), (run.flops, scientific(run.flops, 4)),
        (run.n_all, significant(run.n_all, 4)), (run.loss, fixed(run.loss)),
        (run.bits_per_byte, fixed(run.bits_per_byte)),
        (run.tokens_per_second, significant(run.tokens_per_second)), (run.seconds, significant(run.seconds)),
        (run.restarts, f"{run.restarts}"),
    ]  # fmt: skip
    link = _link(Path(run.run), study, out)
    return {
        "cell": run.cell,
        "numbers": _plain(numbers),
        "digest": str(run.digest)[:12],
        "commit": run.commit,
        "link": link,
        "recipe_link": link and f"{link}/recipe.yaml",
        "command": cell and shlex.join(["bov", "train", str(cell.base), *cell.overrides]),
    }


def _link(run_dir: Path, study: Study, out: Path) -> str | None:
    """The run's folder relative to the page; None unless both lie in the study's folder and so move together."""
    root = study.output_dir.resolve()
    run_dir, out = run_dir.resolve(), out.resolve()
    if not (run_dir.is_relative_to(root) and out.is_relative_to(root)):
        return None
    return Path(os.path.relpath(run_dir, out)).as_posix()
