"""Tables that can't be used are refused with the row or column and the remedy; the others become the runs they hold."""

import numpy as np
import pandas as pd
import pytest

from bov_megatron.errors import StudyError
from bov_megatron.studies.table import Columns, read_table, runs_of
from tests.support.tables import COLUMNS, make_runs, make_table


@pytest.fixture
def table():
    return make_table()


def refusal(table, columns=COLUMNS, **options):
    with pytest.raises(StudyError) as caught:
        runs_of(table, columns, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_read_is_what_is_there(table):
    runs = make_runs(table)
    assert len(runs) == 100 and runs.variants == ("baseline", "bank")
    for values, column in ((runs.n, "n"), (runs.d, "d"), (runs.flops, "c"), (runs.loss, "loss")):
        assert np.array_equal(values, table[column])
    assert (runs.of("bank").loss == table.loss[table.variant == "bank"]).all()


def test_tokens_follow_from_flops_and_flops_from_tokens(table):
    by_flops = runs_of(table, Columns(n="n", c="c", loss="loss", variant="variant", seed="seed"))
    assert by_flops.d == pytest.approx(table.c / 6 / table.n)
    by_tokens = runs_of(table, Columns(n="n", d="d", loss="loss", variant="variant", seed="seed"))
    assert by_tokens.flops == pytest.approx(6 * table.n * table.d)
    with pytest.raises(StudyError, match="--c COLUMN"):
        Columns(n="n", loss="loss")


def test_missing_column_names_the_nearest(table):
    assert "--n N_all" in refusal(table, Columns(n="N_all", c="c", loss="loss"))
    message = refusal(table, Columns(n="n", c="c", loss="los"))
    assert "--loss los" in message and "did you mean 'loss'?" in message and "seed" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -2.0])
def test_unusable_losses_are_named_and_can_be_left_out(table, value):
    table.loc[6, "loss"] = value
    message = refusal(table)
    assert "row 7" in message and "--drop-failed" in message
    runs = runs_of(table, COLUMNS, drop_failed=True)
    assert len(runs) == 99 and "row 7" not in runs.name


@pytest.mark.parametrize(("column", "value"), [("n", 0.0), ("c", np.nan), ("d", -1.0)])
def test_sizes_and_computes_must_be_positive(table, column, value):
    table.loc[4, column] = value
    message = refusal(table)
    assert f"column {column}" in message and "row 5" in message


def test_words_where_numbers_belong(table):
    table["loss"] = table["loss"].astype(object)
    table.loc[3, "loss"] = "diverged"
    assert "row 4: 'diverged' is no number" in refusal(table)


def test_duplicates_are_named(table):
    twice = pd.concat([table, table.iloc[[10]]], ignore_index=True)
    message = refusal(twice)
    assert "row 11, row 101" in message and "--seed" in message
    # Without a seed column, equal N and D are seeds; equal losses as well are a copy.
    unseeded = Columns(n="n", c="c", d="d", loss="loss", variant="variant")
    assert len(runs_of(table, unseeded)) == 100
    assert "row 11, row 101" in refusal(twice, unseeded)


def test_drop_highest_leaves_the_others_in_their_order(table):
    runs = runs_of(table, COLUMNS, drop_highest=5)
    assert sorted(table.loss)[:-5] == sorted(runs.loss)
    assert list(runs.loss) == [loss for loss in table.loss if loss in set(runs.loss)]
    assert "--drop-highest 100" in refusal(table, drop_highest=100)


def test_baseline(table):
    assert runs_of(table, COLUMNS, baseline="bank").variants == ("bank", "baseline")
    assert "there are baseline, bank" in refusal(table, baseline="bnak")
    table["variant"] = table["variant"].replace("baseline", "plain")
    assert make_runs(table).baseline == "plain"


def test_empty_variant_is_refused(table):
    table.loc[2, "variant"] = None
    assert "column variant is empty in row 3" in refusal(table)


def test_groups_of_common_noise():
    runs = make_runs(make_table(sizes=4, budgets=3, seeds=2))
    seed_and_size, per_variant, cells = runs.noise_groups()
    assert [group.max() + 1 for group in (seed_and_size, per_variant, cells)] == [8, 16, 24]
    for group in np.unique(cells):
        assert len(set(runs.seed[cells == group])) == 2 and len(set(runs.d[cells == group])) == 1
    unseeded = runs_of(make_table(), Columns(n="n", c="c", d="d", loss="loss", variant="variant"))
    assert unseeded.noise_groups() == []


def test_files(tmp_path, table):
    with pytest.raises(StudyError, match="no such file"):
        read_table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").write_text('"')
    with pytest.raises(StudyError, match="cannot be read as a table"):
        read_table(tmp_path / "empty.csv")
    (tmp_path / "header.csv").write_text("n,c,loss\n")
    with pytest.raises(StudyError, match="no rows"):
        read_table(tmp_path / "header.csv")
    table.to_parquet(tmp_path / "runs.parquet")
    table.to_csv(tmp_path / "runs.csv", index=False)
    assert read_table(tmp_path / "runs.parquet").equals(table)
    assert np.array_equal(read_table(tmp_path / "runs.csv").n, table.n)
