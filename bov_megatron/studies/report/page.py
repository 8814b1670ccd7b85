"""The report of a study: one HTML file that needs no other, its figures as PNGs, its numbers as CSV and Parquet."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import pandas as pd

from bov_megatron.studies.findings import LEVEL, Findings, as_json
from bov_megatron.studies.report import figures, sentences
from bov_megatron.studies.report.context import context_of, in_order
from bov_megatron.studies.report.curves import Curve, read_curve
from bov_megatron.studies.report.pictures import Picture, draw_picture
from bov_megatron.studies.report.style import STYLE, looks
from bov_megatron.studies.report.tables import (
    SCORES,
    fixed,
    headline_score,
    interval,
    scientific,
    significant,
    summarize,
)
from bov_megatron.studies.study import Study
from bov_megatron.studies.table import CONVENTIONS

PAGE = "index.html"
_VARIANTS_IN_FULL = 4
"""With more variants, the first figure shows one way of counting parameters; the table has all."""


def write_report(
    study: Study, results: pd.DataFrame, findings: Findings, out: Path, problems: Sequence[str] = ()
) -> Path:
    """Write index.html, figures/*.png, report.json, and runs and summary as .csv and .parquet to `out`.

    Returns the page's path.

    Args:
        results: one row per finished run, columns as in studies/results.py. May be empty.
        findings: of the same rows, `findings_of_results`.
        problems: sentences to be shown with the answer, such as runs that were left out.
    """
    variants = list(dict.fromkeys([study.baseline, *(c.variant for c in study.cells), *results.variant]))
    summary = summarize(results, study.baseline, variants)
    out.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        pictures = _pictures(study, results, summary, findings, variants)
        _write_numbers(out, results.assign(run=[_in_study(run, study) for run in results.run]), summary, findings)
        folder = out / "figures"
        folder.mkdir(exist_ok=True)
        drawn = {section: [draw_picture(picture, folder) for picture in group] for section, group in pictures.items()}
    page = _render(study, results, summary, findings, variants, drawn, out, problems)
    path = out / PAGE
    path.write_text(page, encoding="utf-8")
    return path


def _in_study(run: str, study: Study) -> str:
    """A run's folder, relative to the study's: the tables go to people who have it elsewhere."""
    return os.path.relpath(run, study.output_dir)


def _pictures(study, results, summary, findings, variants) -> dict[str, list[Picture]]:
    """The figures of each section; a section without data has none."""
    look = looks(variants, study.baseline)
    groups: dict[str, list[Picture]] = {"answer": [], "results": [], "curves": [], "isoflop": [], "law": []}
    if findings.multipliers:
        groups["answer"] = _answer_pictures(study, findings, look)
    score = headline_score(results)
    if summary[f"{score}_difference"].notna().any():
        words = f"Difference of {SCORES[score]} to {study.baseline}, runs paired by seed, with standard errors"
        groups["results"] = [
            Picture(
                "differences",
                f"{words}. Below 0 the variant is better.",
                f"{words}. " + " ".join(sentences.overall(results, study.baseline, score, LEVEL)),
                lambda layout: figures.differences(summary, score, look, layout),
            )
        ]
    curves = _read_curves(results)
    if curves:
        caption = (
            f"Training loss of {len(curves)} runs, averaged over steps that follow each other; one panel per size."
        )
        groups["curves"] = [
            Picture("loss_curves", caption, caption, lambda layout: figures.loss_curves(results, curves, look, layout))
        ]
    if findings.parabolas:
        caption = (
            "Loss over size at equal compute, with a parabola through each budget's runs and its minimum (star). A "
            "cross-check only: the minimum of such parabolas is biased even without noise (arXiv 2603.22339)."
        )
        alt = "Minima: " + "; ".join(
            f"{p.variant} at {scientific(p.flops)} FLOPs: N {significant(p.best_n)}, loss {fixed(p.best_loss)}"
            for p in findings.parabolas
        )
        groups["isoflop"] = [
            Picture("isoflop", caption, alt, lambda layout: figures.isoflop(findings.parabolas, look, layout))
        ]
    if findings.fits:
        fit = next(iter(findings.fits.values()))
        groups["law"] = _law_pictures(
            results[results[fit.loss_column].gt(0) & np.isfinite(results[fit.loss_column])], fit, look
        )
    return groups


def _answer_pictures(study, findings, look) -> list[Picture]:
    headline = findings.multipliers[0].n_column
    ordered = in_order(findings.multipliers, look)
    if len(look) > _VARIANTS_IN_FULL:
        ordered = [m for m in ordered if m.n_column == headline]
    alt = "; ".join(
        f"{m.variant}, {CONVENTIONS[m.n_column]}{', wall-clock' if m.clock else ''}: "
        + "{} ({} to {})".format(*interval(*m.value))
        for m in ordered
    )
    level = sentences.percent(findings.multipliers[0].level)
    shown = [m for m in findings.multipliers if m.n_column == headline]
    return [
        Picture(
            "multipliers",
            f"How many times the baseline's compute (circles) or time (diamonds) each variant is worth, with {level} "
            "intervals, by what N counts.",
            f"Multipliers over {study.baseline}: {alt}.",
            lambda layout: figures.answers(ordered, look, layout),
        ),
        Picture(
            "multiplier_over_compute",
            f"The same as a function of compute (N: {CONVENTIONS[headline]}), with {level} bands. Solid where the data "
            "carry it, dotted where it is extrapolated.",
            "Multipliers over compute: "
            + "; ".join(f"{m.variant} from {significant(m.estimate[0])} at {scientific(m.flops[0])} FLOPs to "
                        f"{significant(m.estimate[-1])} at {scientific(m.flops[-1])}" for m in shown) + ".",
            lambda layout: figures.multiplier_over_compute(shown, look, layout),
        ),
    ]  # fmt: skip


def _law_pictures(results, fit, look) -> list[Picture]:
    convention, level = CONVENTIONS[fit.n_column], sentences.percent(fit.level)
    fitted = "The joint fit (N: {}) and the runs it was made from, a line per size, with {} bands from the bootstrap."
    noise = " The grey band is one standard deviation between seeds." if fit.lack_of_fit else ""
    spread = 100 * float(abs(fit.residuals).max())
    return [
        Picture(
            "law", fitted.format(convention, level), fitted.format(convention, level),
            lambda layout: figures.fitted_losses(results, fit, look, layout),
        ),
        Picture(
            "residuals",
            f"What the law leaves over: measured loss against predicted.{noise} A slope or a bow here is a law that "
            "doesn't fit.",
            f"Residuals over parameters and tokens; the largest is {significant(spread, 2)}%.",
            lambda layout: figures.residuals(results, fit, look, layout),
        ),
    ]  # fmt: skip


def _read_curves(results: pd.DataFrame) -> dict[str, Curve]:
    found = {run.cell: read_curve(Path(run.run)) for run in results.itertuples()}
    return {cell: curve for cell, curve in found.items() if curve is not None}


def _write_numbers(out: Path, results: pd.DataFrame, summary: pd.DataFrame, findings: Findings) -> None:
    for name, table in (("runs", results), ("summary", summary)):
        table.to_csv(out / f"{name}.csv", index=False)
        table.to_parquet(out / f"{name}.parquet", index=False)
    (out / "report.json").write_text(json.dumps(as_json(findings), indent=2) + "\n")


def _render(study, results, summary, findings, variants, pictures, out, problems) -> str:
    loader = jinja2.PackageLoader("bov_megatron.studies.report", ".")
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    look = looks(variants, study.baseline)
    css = loader.get_source(environment, "page.css")[0]
    context = context_of(study, results, summary, findings, look, out, problems)
    sections = [
        ("results", "Results", context["summary"]), ("curves", "Loss curves", pictures["curves"]),
        ("isoflop", "Equal compute", pictures["isoflop"]), ("law", "The law", findings.fits), ("runs", "Runs", True),
    ]  # fmt: skip
    return environment.get_template("page.html.j2").render(
        **context, pictures=pictures, css=css, contents=[(name, words) for name, words, shown in sections if shown]
    )
