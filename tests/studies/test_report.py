"""The page of a study: complete in itself, with the numbers of its tables, whatever the runs can carry."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from bov_megatron.studies.findings import findings_of_results
from bov_megatron.studies.report.curves import LINES, read_curve
from bov_megatron.studies.report.page import write_report
from bov_megatron.studies.report.style import _spread
from bov_megatron.studies.report.tables import (
    interval,
    overall_differences,
    paired_differences,
    scientific,
    significant,
)
from tests.support.studies import LAW, make_results, make_study, write_runs

ATTRIBUTES = ("src", "srcset", "href", "data", "poster", "action", "background")


class Page(HTMLParser):
    """What a test asks of a page: references, images, sections, and the cells of its tables."""

    def __init__(self, path: Path):
        super().__init__()
        self.text = path.read_text()
        self.references: list[tuple[str, str, str]] = []
        self.images: list[dict] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list]] = {}
        """Table id -> rows; a cell is its text, or the values of its <data>."""
        self._table: list[list] = []
        self._cell: list | None = None
        self._value: str | None = None
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.references += [(tag, name, found[name]) for name in ATTRIBUTES if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "img":
            self.images.append(found)
        elif tag == "table":
            self._table = self.tables[found.get("id", "runs")] = []
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._cell = []
        elif tag == "data":
            self._value = found["value"]

    def handle_data(self, text):
        if self._cell is not None and text.strip(" ±[],\n"):
            self._cell.append(text.strip() if self._value is None else (float(self._value), text))

    def handle_endtag(self, tag):
        if tag in ("td", "th") and self._cell is not None:
            self._table[-1].append(self._cell)
            self._cell = None
        elif tag == "data":
            self._value = None


def report(folder: Path, results=None, **kwargs) -> tuple[Page, Path, pd.DataFrame]:
    """A page of results, by default of a whole study."""
    study = make_study(folder, **{"sizes": ("d4", "d6", "d8")} | kwargs)
    results = make_results(study) if results is None else results(make_results(study))
    out = folder / "report"
    write_report(study, results, findings_of_results(results, "baseline", bootstraps=100), out)
    return Page(out / "index.html"), out, results


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    study = make_study(folder)
    results = make_results(study)
    write_runs(results, lines=40)
    findings = findings_of_results(results, "baseline", bootstraps=100)
    write_report(study, results, findings, folder / "report", problems=("one cell <was> left out",))
    return Page(folder / "report/index.html"), folder / "report", results, findings


def test_the_page_needs_nothing_else(whole):
    page, out, _, _ = whole
    assert len(page.images) == 7 == len(list((out / "figures").glob("*.png")))
    for tag, name, value in page.references:
        if tag == "a":
            assert value.startswith("#") and value[1:] in page.ids or (out / value).exists(), value
        else:
            assert value.startswith("data:image/svg+xml;base64,"), (tag, name, value[:60])
            assert b"</svg>" in base64.b64decode(value.partition(",")[2])
    assert "://" not in re.sub(r"base64,[\w+/=]+", "", page.text) and "<script" not in page.text
    assert "@import" not in page.text and "url(" not in page.text


def test_everyone_can_read_it(whole):
    page, _, _, _ = whole
    assert all(len(image["alt"]) > 40 for image in page.images)
    assert '<html lang="en">' in page.text and 'name="viewport"' in page.text
    assert "one cell &lt;was&gt; left out" in page.text


def test_numbers_on_the_page_are_those_of_the_files(whole):
    page, out, results, findings = whole
    summary = pd.read_csv(out / "summary.csv", dtype={"budget": str})
    pd.testing.assert_frame_equal(summary.astype(pd.read_parquet(out / "summary.parquet").dtypes.to_dict()),
                                  pd.read_parquet(out / "summary.parquet"))  # fmt: skip
    shown = page.tables["results-table"][1:]
    assert len(shown) == len(summary) == 30
    for cells, row in zip(shown, summary.itertuples(), strict=True):
        assert [cell[0] for cell in cells[:3]] == [row.size, row.budget, row.variant]
        assert cells[8][0] == (pytest.approx(row.loss), f"{row.loss:.4f}")
        if row.variant == "bank":
            assert cells[9][0][0] == pytest.approx(row.loss_difference)
            assert cells[9][1][0] == pytest.approx(row.loss_standard_error)
    runs = pd.read_csv(out / "runs.csv").set_index("cell")
    for cells in page.tables["runs"][1:]:
        assert cells[6][0][0] == pytest.approx(runs.bits_per_byte[cells[0][0]])
    written = json.loads((out / "report.json").read_text())
    headline = written["multiplier"]["bank"]
    first = page.tables["multipliers"][1]
    assert [cell[0] for cell in first[:3]] == ["bank", "compute", "without tables"]
    assert [cell[0][0] for cell in first[3:6]] == pytest.approx([headline["estimate"], *headline["interval"]])
    assert f"bank is worth {first[3][0][1]} times the compute of baseline" in page.text
    law = {cells[0][0]: cells[1] for cells in page.tables["law-table"][1:]}
    assert law["k_N, bank"][0][0] == pytest.approx(written["fits"]["n_without_tables"]["n_factors"]["bank"])
    assert law["E"][1][0] == pytest.approx(written["fits"]["n_without_tables"]["intervals"]["E"][0])


def test_every_run_is_listed_with_recipe_commit_and_digest(whole):
    page, out, results, _ = whole
    listed = {cells[0][0]: cells for cells in page.tables["runs"][1:]}
    assert set(listed) == set(results.cell)
    run = results.iloc[0]
    assert [cell[0] for cell in listed[run.cell][-2:]] == [run.digest[:12], run.commit]
    links = [value for tag, _, value in page.references if tag == "a" and value.endswith("recipe.yaml")]
    assert len(links) == len(results) and (out / links[0]).read_text() == "name: made\n"
    assert f"bov train recipes/smoke.yaml output_dir={out.parent}/cells/{run.cell}" in page.text


@pytest.mark.parametrize(
    "change, kwargs, words",
    {
        "one variant": (None, {"variants": ("baseline",)}, "There is no variant to compare with baseline"),
        "one seed": (None, {"seeds": 1}, "which one seed can't give"),
        "cells missing": (lambda r: r[(r.budget != "1e17") | (r.seed == 0)].iloc[1:], {}, "have no result here"),
        "two cells": (None, {"sizes": ("d4",), "budgets": ("1e16",)}, "bank: these runs can't carry a compute"),
        "nothing": (lambda r: r.iloc[:0], {}, "No run of bank has finished"),
        "no baseline": (lambda r: r[r.variant == "bank"], {}, "bank: these runs can't carry a compute multiplier"),
        "diverged": (lambda r: r.assign(loss=r.loss.where(r.index != 3)), {}, "baseline-d4-3e16-s1"),
    }.values(),
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_runs_cannot_carry_is_said(tmp_path, change, kwargs, words):
    page, out, results = report(tmp_path, change, **kwargs)
    assert words in page.text.replace("&#39;", "'")
    assert "nan" not in re.sub(r"base64,[\w+/=]+", "", page.text).lower().replace("finance", "")
    assert len(page.tables.get("runs", [None])) == 1 + len(results)
    assert len(pd.read_parquet(out / "runs.parquet")) == len(results)


def test_differences_are_paired_by_seed():
    rows = [("d4", "b", seed, variant, loss + shift) for seed, shift in enumerate((0.0, 0.7, -0.4))
            for variant, loss in (("base", 3.0), ("bank", 2.9 + 0.01 * seed))]  # fmt: skip
    results = pd.DataFrame(rows, columns=["size", "budget", "seed", "variant", "loss"])
    row = paired_differences(results, "base", "loss").loc[("d4", "b", "bank")]
    differences = np.array([-0.1, -0.09, -0.08])
    assert row.difference == pytest.approx(differences.mean()) and row.pairs == 3
    assert row.standard_error == pytest.approx(differences.std(ddof=1) / 3**0.5)  # not the seeds' own spread of 0.55
    unpaired = results[(results.variant == "base") | (results.seed == 1)]
    assert paired_differences(unpaired, "base", "loss").pairs.tolist() == [1]


def test_intervals_of_differences_hold_the_truth(tmp_path):
    """A known law, without a term that depends on the cell: the mean difference is covered about as often as said."""
    study, held = make_study(tmp_path, sizes=("d4", "d6", "d8")), 0
    truth = overall_differences(make_results(study, LAW, noise=0.0), "baseline", "loss", 0.9).difference["bank"]
    for seed in range(100):
        row = overall_differences(make_results(study, LAW, seed=seed), "baseline", "loss", 0.9).loc["bank"]
        held += row.low <= truth <= row.high
    assert 80 <= held <= 99  # 90 expected; 3 standard deviations


def test_curves_of_long_runs_are_thinned_and_keep_every_validation(tmp_path):
    lines = [{"step": n, "tokens": n * 10, "loss": 5.0 - n / 1e4} for n in range(1, 5 * LINES)]
    for line in lines[::1001]:
        line["validation_bits_per_byte"] = 1.0
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 99999, "tok')
    curve = read_curve(tmp_path)
    assert len(curve.loss) <= 120 and len(curve.validation) == len(lines[::1001])
    assert np.allclose(curve.loss, 5.0 - curve.tokens / 1e5) and curve.tokens[-1] > 0.98 * lines[-1]["tokens"]
    assert read_curve(tmp_path / "none") is None


@pytest.mark.parametrize(
    "value, digits, text",
    [(1.5e18, 3, "1.50×10¹⁸"), (1234567, 3, "1.23M"), (999999, 3, "1.00M"), (1e8, 2, "100M"), (0.0123, 2, "0.012"),
     (-0.00012, 2, "−1.2×10⁻⁴"), (42, 3, "42.0"), (999.96, 4, "1.000K"), (0, 3, "0"), (float("nan"), 3, "–")],
)  # fmt: skip
def test_significant(value, digits, text):
    assert significant(value, digits) == text


def test_flops_of_any_size_are_written_alike():
    assert (scientific(4.99e11), scientific(2e12), scientific(-1.26e-5, 2)) == ("4.99×10¹¹", "2.00×10¹²", "−1.3×10⁻⁵")


def test_an_interval_has_the_decimals_that_it_warrants():
    assert interval(1.18234, 1.13, 1.231) == ("1.18", "1.13", "1.23")
    assert interval(1.18234, 1.1811, 1.1839) == ("1.182", "1.181", "1.184")


def test_labels_move_apart_as_little_as_needed():
    placed = _spread(np.array([0.0, 1.0, 50.0]), 10)
    assert placed.tolist() == [-4.5, 5.5, 50.0]


def test_commits_of_runs_started_again_are_named_once_and_whole(tmp_path):
    def results(table):
        return table.assign(commit=["a1b2c3d4e5f6, a1b2c3d4e5f6+changes", *["a1b2c3d4e5f6+changes"] * (len(table) - 1)])

    report(tmp_path, results)
    assert "commits a1b2c3d4e5f6, a1b2c3d4e5f6+changes<" in (tmp_path / "report/index.html").read_text()
