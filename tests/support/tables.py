"""Tables of runs from a known law."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.coverage import Scenario, make_study
from bov_megatron.studies.table import Columns, Runs, runs_of

COLUMNS = Columns(n="n", c="c", d="d", loss="loss", variant="variant", seed="seed")


def make_table(seed: int = 0, **scenario) -> pd.DataFrame:
    """Baseline and bank, see `benchmarks.coverage.Scenario`."""
    return make_study(Scenario(**scenario), np.random.default_rng(seed))


def make_runs(table: pd.DataFrame) -> Runs:
    return runs_of(table, COLUMNS)
