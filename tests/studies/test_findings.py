"""`study fit` as a user calls it: a table in, an answer and its JSON out; a study's results under every convention."""

import json

import numpy as np
import pandas as pd
import pytest

from bov_megatron.commands import main
from bov_megatron.studies import table as tables
from bov_megatron.studies.findings import as_json, findings_of_results
from bov_megatron.studies.findings_text import format_findings
from bov_megatron.studies.isoflop import cross_checks, parabolas
from bov_megatron.studies.law import Law
from tests.support.tables import make_runs, make_table

CONVENTIONS = tuple(tables.CONVENTIONS)
COLUMNS = ["--n", "n", "--c", "c", "--loss", "loss"]


@pytest.fixture(scope="module")
def csv(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "runs.csv"
    make_table().to_csv(path, index=False)
    return path


def fit(*arguments):
    return main(["study", "fit", *map(str, arguments)])


def results(table=None):
    """As a study's results: counts of parameters that differ by a constant, as embeddings do."""
    table = make_table() if table is None else table
    counts = {name: (table.n + 1e6 * i).round() for i, name in enumerate(CONVENTIONS)}
    size = table.n.rank(method="dense").astype(int).astype(str)
    return table.assign(
        **counts, cell=[f"cell{i}" for i in table.index], tokens=table.d, flops=table.c, size=size,
        tokens_per_second=1e12 * table.d / table.c,
    )  # fmt: skip


def test_table_to_json(csv, tmp_path, capsys):
    options = [*COLUMNS, "--d", "d", "--variant", "variant", "--seed", "seed", "--bootstraps", 200]
    assert fit("--table", csv, *options, "--json", tmp_path / "fit.json") == 0
    text, found = capsys.readouterr().out, json.loads((tmp_path / "fit.json").read_text())
    assert {"A", "B", "E", "alpha", "beta", "objective", "intervals", "level", "multiplier"} <= set(found)
    assert found["level"] == 0.9 and found["runs"] == 100
    for name, truth in {"E": 1.8, "A": 480, "B": 2085, "alpha": 0.35, "beta": 0.37}.items():
        low, high = found["intervals"][name]
        assert low < found[name] < high
        assert low - (high - low) < truth < high + (high - low)
    bank = found["multiplier"]["bank"]
    assert bank["interval"][0] < bank["estimate"] < bank["interval"][1]
    assert bank["estimate"] == pytest.approx(1.2 * 1.1 * 6 / 5.6, rel=0.01)
    curve = bank["curve"]
    assert bank["carried_flops"][1] == bank["at"] < curve["flops"][-1]
    assert len(curve["flops"]) == len(curve["low"]) == len(curve["carried"])
    assert f"{bank['estimate']:.3f}" in text and "second method" in text and "hold-out: 20 runs" in text
    # The same call gives the same numbers.
    assert fit("--table", csv, *options, "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == found


def test_level_and_bootstraps(csv, tmp_path):
    widths = {}
    for level in (0.5, 0.95):
        path = tmp_path / f"{level}.json"
        assert (
            fit("--table", csv, *COLUMNS, "--variant", "variant", "--bootstraps", 150, "--level", level, "--json", path)
            == 0
        )
        low, high = json.loads(path.read_text())["intervals"]["alpha"]
        widths[level] = high - low
    assert widths[0.95] / widths[0.5] == pytest.approx(1.96 / 0.674, rel=0.4)


@pytest.mark.parametrize(
    "arguments, remedy",
    [
        ([], "give a study file or --table FILE"),
        (["--table", "CSV", "--n", "n", "--loss", "loss"], "give --c COLUMN"),
        (["--table", "CSV", "--loss", "loss", "--c", "c"], "needs --n COLUMN"),
        (["--table", "CSV", *COLUMNS[:-1], "lost"], "did you mean 'loss'?"),
        (["--table", "CSV", *COLUMNS, "--level", "95"], "--level 95"),
        (["--table", "CSV", *COLUMNS, "--bootstraps", "3"], "--bootstraps 3"),
        (["--table", "CSV", *COLUMNS, "--drop-highest", "97"], "don't carry a fit"),
        (["--table", "none.csv", *COLUMNS], "no such file"),
    ],
)  # fmt: skip
def test_refusals_are_one_line(csv, arguments, remedy, capsys):
    assert fit(*(csv if argument == "CSV" else argument for argument in arguments)) == 2
    captured = capsys.readouterr()
    assert remedy in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_results_of_a_study_under_every_convention():
    found = findings_of_results(results(), "baseline", bootstraps=100)
    assert list(found.fits) == list(CONVENTIONS) and not found.refusals
    assert [(m.n_column, m.clock) for m in found.multipliers] == [(n, c) for n in CONVENTIONS for c in (False, True)]
    first, second = (found.fits[name].law for name in CONVENTIONS[:2])
    assert first.alpha != second.alpha, "counts that differ must fit differently"
    assert found.fits[CONVENTIONS[0]].clusters == 10
    values = as_json(found)
    assert values["fits"][CONVENTIONS[1]]["alpha"] == second.alpha
    assert values["wall_clock_multiplier"]["bank"]["clock"] is True
    json.dumps(values, allow_nan=False)
    assert format_findings(found).count("compute ×") == len(CONVENTIONS)


def test_a_study_without_enough_runs_says_which_it_needs():
    table = make_table()
    found = findings_of_results(results(table[table.n < 1.5e8]), "baseline", bootstraps=100)
    assert not found.fits and set(found.refusals) == {"baseline", "bank"}
    assert "2 size(s)" in found.refusals["bank"] and "GPU-hours of H100" in found.refusals["bank"]
    assert format_findings(found).count("No fit: these runs don't carry a fit") == 1
    json.dumps(as_json(found), allow_nan=False)


def test_failed_runs_of_a_study_are_left_out_and_named():
    table = make_table()
    table.loc[17, "loss"] = np.nan
    found = findings_of_results(results(table), "baseline", conventions=CONVENTIONS[:1], bootstraps=100)
    assert found.fits[CONVENTIONS[0]].runs == 99
    assert "cell17" in found.warnings[0]


def test_parabolas_are_least_squares_through_each_budget():
    runs = make_runs(make_table())
    found = parabolas(runs)
    assert [(p.variant, round(np.log10(p.flops), 2)) for p in found][:2] == [("baseline", 17.48), ("baseline", 18.11)]
    assert len(found) == 10
    for parabola in found:
        x = np.log(parabola.n)
        coefficients = np.linalg.lstsq(np.vander(x, 3, increasing=True), parabola.loss, rcond=None)[0]
        c0, c1, c2 = parabola.coefficients
        grid = np.linspace(x.min(), x.max(), 5)
        expected = np.polynomial.polynomial.polyval(grid, coefficients)
        assert c0 + c1 * grid + c2 * grid**2 == pytest.approx(expected, abs=1e-6)
        if np.isfinite(parabola.best_n):
            per_token = 6.0 if parabola.variant == "baseline" else 5.6
            assert parabola.best_d == pytest.approx(parabola.flops / per_token / parabola.best_n, rel=1e-6)
            assert parabola.n.min() <= parabola.best_n <= parabola.n.max()
            assert parabola.best_loss == pytest.approx(
                c0 + c1 * np.log(parabola.best_n) + c2 * np.log(parabola.best_n) ** 2
            )


def test_parabolas_are_biased_where_the_law_is_not():
    """Known bias, without any noise: off-centre sizes. What the cross-check says must not be read as an estimate."""
    law = Law(1.8, 480.0, 2085.0, 0.35, 0.55)
    n = np.geomspace(3e7, 3e10, 9)
    rows = [(size, c, c / 6 / size) for c in np.geomspace(1e19, 1e21, 4) for size in n]
    table = pd.DataFrame(rows, columns=["n", "c", "d"]).assign(variant="baseline", seed=0)
    table["loss"] = law.loss(table.n, table.d)
    (check,) = cross_checks(parabolas(make_runs(table)), law)
    assert check.law == pytest.approx(0.55 / 0.9)
    assert abs(check.parabolas - check.law) > 0.02
