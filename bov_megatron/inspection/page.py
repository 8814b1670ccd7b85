"""The page: one HTML file that needs no other, and its figures as PNGs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np

from bov_megatron.inspection import figures
from bov_megatron.inspection.findings import Findings, Inspected, clustered_error
from bov_megatron.inspection.tables import TableRows
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.studies.report.pictures import Picture, draw_picture
from bov_megatron.studies.report.style import STYLE
from bov_megatron.studies.report.tables import fixed, significant

PAGE = "index.html"


def write_page(found: Findings, out: Path) -> Path:
    """Write index.html and figures/*.png to `out`; returns the page's path."""
    folder = out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        drawn = {picture.name: draw_picture(picture, folder) for picture in _pictures(found)}
    loader = jinja2.ChoiceLoader(
        [jinja2.PackageLoader("bov_megatron.inspection", "."), jinja2.PackageLoader("bov_megatron.studies.report", ".")]
    )
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
    css = "\n".join(loader.get_source(environment, name)[0] for name in ("page.css", "inspection.css"))
    text = environment.get_template("inspection.html.j2").render(
        title=f"Inside {found.runs[0].name}", css=css, pictures=drawn, facts=_facts(found), answers=_answers(found),
        warnings=_warnings(found), rows=_rows(found), nearest=found.nearest, neighbours_of=found.neighbours_of,
        shared=_shared(found), significant=significant, contents=_contents(found, drawn),
    )  # fmt: skip
    path = out / PAGE
    path.write_text(text, encoding="utf-8")
    return path


def _pictures(found: Findings) -> list[Picture]:
    tables, frequencies = found.tables, found.frequencies
    pictures = []
    if found.coefficients:
        last = ", ".join(f"layer {curve.layer} {curve.values[-1]:.3f}" for curve in found.coefficients)
        pictures.append(
            Picture(
                "coefficients",
                "Learned coefficients of each layer over the run: how much of the values the source contributes.",
                f"Coefficients at the end: {last}.",
                lambda layout: figures.gammas(found.coefficients, layout),
            )
        )
    if tables:
        low, high = np.nanpercentile(tables[-1].norms[frequencies.counts > 0], [5, 95])
        pictures.append(
            Picture(
                "row_norms",
                f"Norms of the tables' rows over how often their token occurs: every row of {tables[-1].label}, "
                "darker where there are more; dashed, the median norm at the start; and the median of each table.",
                f"Row norms of {tables[-1].label}: 90% between {low:.3g} and {high:.3g}.",
                lambda layout: figures.row_norms(tables, frequencies, layout),
            )
        )
    if tables and found.has_initial:
        pictures.append(
            Picture(
                "distances",
                "Distance of the tables from where they began, W_V · rms(embedding), in units of the initial norm. "
                "Of whole tables, and of the median row over how often its token occurs.",
                "Distances: " + ", ".join(f"{table.label} {table.distance:.3f}" for table in tables) + ".",
                lambda layout: figures.distances(tables, frequencies, layout),
            )
        )
    if any(run.behaviour for run in found.runs):
        words = "; ".join(f"{run.name}: {_norms(run)}" for run in found.runs)
        pictures.append(
            Picture(
                "attention",
                "Norm of what each layer's attention adds to the residual stream, root mean square over the tokens of "
                "held-out samples.",
                f"By layer: {words}.",
                lambda layout: figures.attention(found.runs, layout),
            )
        )
    if found.losses:
        names = [run.name for run in found.runs]
        text = "Loss of held-out targets by how often the target occurs in training."
        if len(names) > 1:
            text += f" The difference has intervals of 95%; below 0, {names[0]} is better."
        pictures.append(Picture("losses", text, text, lambda layout: figures.losses(found.losses, names, layout)))
    return pictures


def _norms(run: Inspected) -> str:
    assert run.behaviour is not None
    return ", ".join(f"{norm:.3g}" for norm in np.sqrt(run.behaviour.attention))


def _facts(found: Findings) -> list[str]:
    run = found.runs[0]
    model = run.recipe.model
    facts = [
        f"step {run.step:,} of {total_steps(run.recipe):,}",
        f"{significant(run.step * run.recipe.batch_tokens)} tokens",
        f"{model.value.source.replace('_', ' ')}, {model.num_layers} layers, width {model.hidden_size}",
        f"{len(found.tables)} tables of {model.vocab_size:,} × {model.kv_dim}" if found.tables else "no tables",
        f"frequencies from {found.frequencies.total:,} training tokens",
    ]
    if len(found.runs) > 1:
        facts.append(f"beside {found.runs[1].name} at step {found.runs[1].step:,}")
    return facts


def _answers(found: Findings) -> list[list[str]]:
    """What the figures say, in sentences; the first is the headline."""
    answers = []
    if len(found.losses) > 1:
        answers.append(_losses_answer(found))
    run, seen = found.runs[0], found.frequencies.counts > 0
    sentences = []
    if found.tables:
        untouched = [float(table.untouched[seen].mean()) for table in found.tables]
        never = [float(table.untouched.mean()) for table in found.tables]
        sentences.append(
            f"{min(never):.1%} to {max(never):.1%} of a table's rows were never updated"
            if max(never) - min(never) > 5e-4
            else f"{max(never):.1%} of the tables' rows were never updated"
        )
        sentences[-1] += f"; of rows whose token occurs in the sampled training text, {max(untouched):.1%}."
        if not found.has_initial:
            sentences = []
        else:
            far, near = (pick(found.tables, key=lambda table: table.distance) for pick in (max, min))
            sentences.append(
                f"Tables have moved by {near.distance:.2f} ({near.label}) to {far.distance:.2f} ({far.label}) times "
                f"their initial norm; their cosine with the start is {min(t.cosine for t in found.tables):.2f} to "
                f"{max(t.cosine for t in found.tables):.2f}."
            )
    if run.behaviour is not None and run.source_layers and run.recipe.model.value.facts.has_table:
        sentences.append(
            f"{len(run.source_layers)} of {run.recipe.model.num_layers} layers take their values from the bank; they "
            f"make {run.source_share:.0%} of attention's squared output norm."
        )
    if sentences:
        answers.append(sentences)
    return answers


def _losses_answer(found: Findings) -> list[str]:
    first, second = found.losses
    gains = first.losses - second.losses
    error = clustered_error(gains, first.samples)
    names = [run.name for run in found.runs]
    better = "better" if gains.mean() < 0 else "worse"
    differences, errors = first.difference_to(second)
    clear = np.flatnonzero(np.abs(differences) > 1.96 * errors)
    interval = f"± {1.96 * error:.4f} over " if np.isfinite(error) else ""  # none of one sample
    sentences = [
        f"{names[0]} is {better} than {names[1]} by {abs(gains.mean()):.4f} nats a token ({interval}"
        f"{len(gains):,} targets in {first.samples[-1] + 1} held-out samples)."
    ]
    if len(clear):
        most = clear[np.argmax(np.abs(differences[clear]))]
        sentences.append(
            "The difference is largest for targets that occur about "
            f"{significant(first.centres[most], 2)} times per million, where {names[0]} is "
            f"{'better' if differences[most] < 0 else 'worse'} by {fixed(abs(differences[most]), 3)} ± "
            f"{1.96 * errors[most]:.3f}."
        )
    else:
        sentences.append("In no bin of frequency does the difference exceed its interval.")
    return sentences


def _warnings(found: Findings) -> list[str]:
    warnings = []
    if not found.has_initial:
        warnings.append("The run was converted from elsewhere: where its tables began is not known, so distances and "
                        "rows never updated are left out.")  # fmt: skip
    if len(found.runs) > 1:
        steps = [run.step * run.recipe.batch_tokens for run in found.runs]
        if steps[0] != steps[1]:
            warnings.append(f"The runs have not seen equally many tokens: {steps[0]:,} and {steps[1]:,}.")
    if not any(run.behaviour for run in found.runs):
        warnings.append("No model was built (--samples 0): attention and losses are left out.")
    return warnings


def _rows(found: Findings) -> list[dict[str, Any]]:
    """One for each table, for the table of tables."""
    kind = found.coefficients[0].kind if found.coefficients else ""
    gammas: dict[int | None, float] = {c.layer: c.values[-1] for c in found.coefficients if c.kind == kind}
    run = found.runs[0]
    return [
        {
            "label": table.label,
            "cells": [
                _cell(gammas.get(table.layer), "{:.3f}"),
                _cell(float(np.median(table.norms)), "{:.3g}"),
                *_initial_cells(table, found.has_initial),
                _cell(_share(run, table), "{:.1%}"),
            ],
        }
        for table in found.tables
    ]


def _initial_cells(table: TableRows, known: bool) -> list[tuple[float | None, str]]:
    if not known:
        return [(None, "–")] * 3
    return [
        _cell(table.distance, "{:.3f}"),
        _cell(table.cosine, "{:.3f}"),
        _cell(float(table.untouched.mean()), "{:.1%}"),
    ]


def _share(run: Inspected, table: TableRows) -> float | None:
    """Of the layer in attention's squared output norm."""
    if run.behaviour is None or table.layer is None:
        return None
    return float(run.behaviour.attention[table.layer] / run.behaviour.attention.sum())


def _cell(value: float | None, form: str) -> tuple[float | None, str]:
    return (None, "–") if value is None else (value, form.format(value))


def _shared(found: Findings) -> str:
    asked = sum(len(nearest.values) for nearest in found.nearest)
    return f"{sum(nearest.shared for nearest in found.nearest)} of {asked}"


def _contents(found: Findings, drawn: dict[str, Any]) -> list[tuple[str, str]]:
    sections = [
        ("losses", "Loss by frequency", "losses" in drawn), ("coefficients", "Coefficients", "coefficients" in drawn),
        ("tables", "Tables", bool(found.tables)), ("attention", "Attention", "attention" in drawn),
        ("neighbours", "Neighbours", bool(found.nearest)),
    ]  # fmt: skip
    return [(name, words) for name, words, shown in sections if shown]
