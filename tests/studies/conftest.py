"""Runs from a known law, and their fit, made once."""

import pytest

from bov_megatron.studies.fitting import fit_runs
from tests.support.tables import make_runs, make_table


@pytest.fixture(scope="session")
def runs():
    return make_runs(make_table())


@pytest.fixture(scope="session")
def fit(runs):
    return fit_runs(runs, bootstraps=200)
