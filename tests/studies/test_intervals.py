"""Intervals hold the truth about as often as they say. `python tools/bench.py coverage` counts it on many more studies.

Bounds are such that intervals with exactly the stated coverage fail once in a thousand runs of the test.
"""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom

from benchmarks.coverage import LEVEL, TRUTH, Scenario, make_runs, truth
from bov_megatron.studies.intervals import bootstrap, percentiles, split_noise
from bov_megatron.studies.objective import Objective

STUDIES, BOOTSTRAPS = 40, 120
FEWEST = int(binom.ppf(0.001, STUDIES, LEVEL))
DESIGN = {"sizes": 4, "budgets": 3, "seeds": 2}


def one_study(scenario, rng, clustered=True):
    """Estimates and the ends of their intervals, `[3, quantities]`."""
    runs = make_runs(scenario, rng)
    objective = Objective(runs.n, runs.d, runs.loss, runs.variant, runs.variants)
    theta = objective.minimise()
    groups = runs.noise_groups() if clustered else []
    draws = objective.quantities(bootstrap(objective, theta, groups, BOOTSTRAPS, rng))
    values = np.concatenate([objective.quantities(theta[None]), percentiles(draws, LEVEL)])
    gain = values[0, -2] * values[0, -1], *percentiles(draws[:, -2] * draws[:, -1], LEVEL)
    return np.column_stack([values, gain])


def many_studies(scenario, clustered=True):
    found = np.array([one_study(scenario, rng, clustered) for rng in np.random.default_rng(11).spawn(STUDIES)])
    true = np.array([*list(truth().values())[:-1], TRUTH.n_factors["bank"] * TRUTH.d_factors["bank"]])
    covered = ((found[:, 1] <= true) & (true <= found[:, 2])).sum(axis=0)
    # Half an interval in standard deviations of the estimate; 1.645 if estimates were normal.
    widths = np.median(found[:, 2] - found[:, 1], axis=0) / 2 / found[:, 0].std(axis=0)
    return covered, widths


@pytest.mark.parametrize(
    "noise", [{"run": 3e-4}, {"run": 2e-4, "size_and_seed": 3e-4}, {"run": 2e-4, "cell": 3e-4}],
    ids=["runs alone", "seed and size shared", "misfit"],
)  # fmt: skip
def test_coverage(noise):
    covered, widths = many_studies(Scenario(**DESIGN, **noise))
    names = [*list(truth())[:-1], "Sc"]
    assert (covered >= FEWEST).all(), dict(zip(names, covered, strict=True))
    assert (widths[:6] < 1.645 * 1.6).all(), dict(zip(names, widths, strict=True))
    # Wider for factors: with few groups, noise of both variants is hard to tell from noise of each.
    assert (widths < 1.645 * 2).all(), dict(zip(names, widths, strict=True))


def test_runs_that_share_noise_are_not_independent():
    """What coverage would be if the noise that a size and seed share were ignored: the test above would see it."""
    covered, _ = many_studies(Scenario(**DESIGN, run=1e-4, size_and_seed=5e-4), clustered=False)
    assert covered[:2].max() < FEWEST


def test_common_noise_is_told_from_the_runs_own():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(40), 5)
    other = np.tile(np.arange(5), 40)
    shared = 2e-3 * rng.standard_normal(40)
    residuals = 1e-3 * rng.standard_normal(200) + shared[group]
    design = np.ones((200, 1))
    residuals -= residuals.mean()
    noise = split_noise(residuals, design, [group, other])
    own, by_group, by_other = noise.deviations
    assert own == pytest.approx(1e-3, rel=0.15)
    assert by_group == pytest.approx(2e-3, rel=0.25)
    assert by_other < 5e-4
    assert np.corrcoef(residuals - noise.own, shared[group])[0, 1] > 0.9
    assert noise.degrees == pytest.approx([156, 39, 4])
    none = split_noise(1e-3 * rng.standard_normal(200), design, [group])
    assert none.deviations[1] < 5e-4


@pytest.mark.parametrize("noise", [{"variant": 3e-4}, {"size_and_seed": 3e-4}, {}])
def test_variances_are_those_of_restricted_maximum_likelihood(noise):
    """Also where one is zero: what one kind of noise is short of must not be taken from another."""
    runs = make_runs(Scenario(run=2e-4, **noise), np.random.default_rng(0))
    groups = runs.noise_groups()[:2]  # of size and seed, and of variant within them
    design = np.column_stack([runs.variant == name for name in runs.variants]).astype(float)
    values = np.log(runs.loss)
    values -= np.log([TRUTH.loss(n, d, v) for n, d, v in zip(runs.n, runs.d, runs.variant, strict=True)])
    residuals = values - design @ np.linalg.lstsq(design, values)[0]
    kinds = [np.eye(len(runs)), *(np.equal.outer(group, group).astype(float) for group in groups)]

    def restricted_likelihood(variances):
        covariance = sum(variance * kind for variance, kind in zip(variances, kinds, strict=True))
        inverse = np.linalg.inv(covariance)
        within = design.T @ inverse @ design
        rest = inverse - inverse @ design @ np.linalg.solve(within, design.T @ inverse)
        # Variances are in units of 1e-8, where the search's steps and tolerances are those of numbers about 1.
        return np.linalg.slogdet(covariance)[1] + np.linalg.slogdet(within)[1] + 1e8 * values @ rest @ values

    best = minimize(restricted_likelihood, np.full(3, 4.0), bounds=[(0.1, 99), (0, 99), (0, 99)])
    found = split_noise(residuals, design, groups).deviations
    assert 1e8 * found**2 == pytest.approx(best.x, rel=0.02, abs=0.05)


def test_every_draw_has_every_variant():
    runs = make_runs(Scenario(**DESIGN), np.random.default_rng(3))
    few = runs.where((runs.variant == "baseline") | (np.cumsum(runs.variant == "bank") % 6 == 1))
    assert len(few.of("bank")) == 4
    objective = Objective(few.n, few.d, few.loss, few.variant, few.variants)
    draws = bootstrap(objective, objective.minimise(), [], 300, np.random.default_rng(1))
    assert np.isfinite(objective.quantities(draws)).all()
