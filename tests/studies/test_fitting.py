"""Fits recover the law that made the runs, agree with other optimisers, and refuse what the runs don't determine."""

import dataclasses
import re

import numpy as np
import pytest
from scipy.optimize import dual_annealing, minimize

from benchmarks.coverage import TRUTH
from bov_megatron.errors import StudyError
from bov_megatron.studies.fitting import fit_runs, law_of
from bov_megatron.studies.objective import HUBER_DELTA, Objective, huber
from tests.support.tables import make_runs, make_table

EXPONENTS = ("alpha", "beta")


def objective_of(runs):
    return Objective(runs.n, runs.d, runs.loss, runs.variant, runs.variants)


def test_without_noise_the_law_comes_back():
    law = law_of(make_runs(make_table(run=0.0)))
    for name in ("E", "A", "B", *EXPONENTS):
        assert getattr(law, name) == pytest.approx(getattr(TRUTH, name), rel=1e-5)
    assert law.n_factors["bank"] == pytest.approx(1.2, rel=1e-6)
    assert law.d_factors["bank"] == pytest.approx(1.1, rel=1e-6)


@pytest.mark.parametrize("alpha, beta, irreducible", [(0.15, 0.6, 0.5), (0.8, 0.2, 3.0), (0.5, 0.5, 1.0)])
def test_other_laws_come_back(alpha, beta, irreducible):
    table = make_table(run=0.0)
    law = dataclasses.replace(TRUTH, alpha=alpha, beta=beta, E=irreducible, A=0.5 * 1e8**alpha, B=0.7 * 1e9**beta)
    own = [float(law.loss(n, d, v)) for n, d, v in zip(table.n, table.d, table.variant, strict=True)]
    found = law_of(make_runs(table.assign(loss=own)))
    assert (found.alpha, found.beta, found.E) == pytest.approx((alpha, beta, irreducible), rel=1e-4)


def test_objective_is_the_published_one(runs):
    """Summed Huber loss of the difference of logarithms, written out for the law in its published form."""
    objective = objective_of(runs)
    theta = objective.minimise() + np.eye(objective.parameters)[1] * 2e-3
    law = objective.law(theta)
    predicted = np.array([float(law.loss(n, d, v)) for n, d, v in zip(runs.n, runs.d, runs.variant, strict=True)])
    difference = np.abs(np.log(runs.loss) - np.log(predicted))
    assert (difference > 1e-3).any() and (difference < 1e-3).any()
    expected = sum(x**2 / 2 if x <= 1e-3 else 1e-3 * (x - 5e-4) for x in difference)
    assert objective.value(theta) == pytest.approx(expected, rel=1e-9)


def test_derivative(runs):
    objective = objective_of(runs)
    theta = objective.minimise()
    derivative = objective.jacobian(theta[None])[0]
    for parameter in range(objective.parameters):
        step = np.zeros_like(theta)
        step[parameter] = 1e-6
        numeric = (objective.log_law((theta + step)[None]) - objective.log_law((theta - step)[None]))[0] / 2e-6
        assert derivative[:, parameter] == pytest.approx(numeric, abs=1e-8)


def test_minimum_of_heavy_tails_is_the_one_of_a_global_search():
    """Noise far beyond the Huber loss's square part, as in losses read off a figure."""
    runs = make_runs(make_table(run=5e-3, tails=3, seeds=1)).of("baseline")
    objective = objective_of(runs)
    theta = objective.minimise()
    bounds = list(zip(theta - 0.3, theta + 0.3, strict=True))
    searched = dual_annealing(objective.value, bounds, rng=1, maxiter=20)
    best = minimize(objective.value, searched.x, method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-16})
    assert objective.value(theta) <= best.fun * (1 + 1e-9)
    assert theta == pytest.approx(best.x, abs=0.02)


def test_both_methods_agree(fit):
    assert fit.checked.agrees
    assert fit.checked.objective == pytest.approx(fit.objective, rel=1e-5)


@pytest.mark.parametrize("noise", [3e-4, 5e-3])
def test_samples_fitted_at_once_are_those_that_scipy_fits_one_by_one(noise):
    runs = make_runs(make_table(run=noise))
    objective, rng = objective_of(runs), np.random.default_rng(0)
    theta = objective.minimise()
    weights = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=6).astype(float)
    log_loss = objective.log_loss + 1e-3 * rng.standard_normal((6, len(runs)))
    found = objective.minimise_samples(theta, log_loss, weights)

    def value(theta, sample):
        return (weights[sample] * huber(log_loss[sample] - objective.log_law(theta[None])[0])).sum() / HUBER_DELTA**2

    for sample in range(6):
        alone = minimize(value, found[sample], args=(sample,), method="BFGS")
        assert value(found[sample], sample) <= alone.fun * (1 + 1e-5)


def test_one_diverged_run_moves_little_and_is_named(runs, fit):
    loss = runs.loss.copy()
    loss[42] *= 1.5
    diverged = fit_runs(dataclasses.replace(runs, loss=loss), bootstraps=200)
    assert diverged.law.alpha == pytest.approx(fit.law.alpha, abs=0.003)
    assert diverged.law.n_factors["bank"] == pytest.approx(fit.law.n_factors["bank"], rel=0.01)
    assert any("row 43 (+4" in text for text in diverged.warnings)
    assert not any("far off the law" in text for text in fit.warnings)
    # Nor is it taken for noise that its whole group shares.
    widths = [high - low for low, high in (diverged.intervals["alpha"], fit.intervals["alpha"])]
    assert widths[0] < 2 * widths[1]


def test_a_seed_that_is_off_widens_the_intervals(runs, fit):
    loss = runs.loss * np.where((runs.seed == "1") & (runs.size == "2"), 1.003, 1.0)
    shifted = fit_runs(dataclasses.replace(runs, loss=loss), bootstraps=200)
    widths = [high - low for low, high in (shifted.intervals["alpha"], fit.intervals["alpha"])]
    assert widths[0] > 1.3 * widths[1]
    low, high = shifted.intervals["n_factor.bank"]
    assert low < 1.2 < high


def test_lack_of_fit_sees_misfit_and_only_misfit(fit):
    assert fit.lack_of_fit.p_value > 0.01
    assert fit.lack_of_fit.seed_noise == pytest.approx(3e-4, rel=0.3)
    bent = fit_runs(make_runs(make_table(cell=1e-3)), bootstraps=100)
    assert bent.lack_of_fit.p_value < 1e-6
    assert bent.lack_of_fit.misfit == pytest.approx(1e-3, rel=0.35)
    assert any("the law misses cells" in text for text in bent.warnings)
    alone = fit_runs(make_runs(make_table(seeds=1)), bootstraps=100)
    assert alone.lack_of_fit is None and any("no lack-of-fit test" in text for text in alone.warnings)


def test_holdout_is_the_largest_budget_predicted_from_the_others(runs, fit):
    held = runs.flops > 0.99e20
    assert set(fit.holdout.runs) == set(runs.name[held])
    law = law_of(runs.where(~held))
    expected = [
        float(law.loss(n, d, v)) for n, d, v in zip(runs.n[held], runs.d[held], runs.variant[held], strict=True)
    ]
    assert fit.holdout.predicted == pytest.approx(expected)
    errors = np.log(np.array(expected) / runs.loss[held])
    assert fit.holdout.error == pytest.approx(np.sqrt((errors**2).mean()))
    assert fit.holdout.error < 1e-3


def test_separate_fits_are_those_of_each_variant_alone(runs, fit):
    assert set(fit.separate) == {"baseline", "bank"}
    assert fit.separate["bank"].alpha == pytest.approx(law_of(runs.of("bank")).alpha)
    assert fit.separate["bank"].alpha != fit.law.alpha


def test_a_missing_budget_costs_precision_only(runs, fit):
    budgets = np.unique(np.round(np.log(runs.flops), 3))
    rest = runs.where(np.round(np.log(runs.flops), 3) != budgets[2])
    partial = fit_runs(rest, bootstraps=200)
    assert partial.runs == 80
    for name in ("alpha", "beta", "n_factor.bank", "d_factor.bank"):
        low, high = partial.intervals[name]
        truth = {"alpha": 0.35, "beta": 0.37, "n_factor.bank": 1.2, "d_factor.bank": 1.1}[name]
        assert low - (high - low) < truth < high + (high - low)


@pytest.mark.parametrize(
    "kept, reason",
    [
        (lambda r: r.n < 1.5e8, "2 size"),
        (lambda r: r.flops < 4e17, "one budget"),
        (lambda r: np.isclose(r.flops, 3e17 * (r.n / 5e7) ** 2.1, rtol=0.5), "one line"),
        (lambda r: (r.variant == "baseline") | (r.n < 6e7), "variant bank has 10 run(s) at 1 size(s)"),
        (lambda r: (r.variant == "baseline") | (r.name == "row 51"), "variant bank has 1 run(s)"),
    ],
)  # fmt: skip
def test_what_the_runs_do_not_carry_is_refused_with_runs_that_would(runs, kept, reason):
    with pytest.raises(StudyError) as caught:
        fit_runs(runs.where(kept(runs)), bootstraps=100)
    message = str(caught.value)
    assert reason in message
    assert "; run ba" in message and "; in all " in message and "N=" in message
    flops, hours = map(float, re.search(r"in all (\S+) FLOPs, (\S+) GPU-hours of H100 at .* 40%", message).groups())
    assert hours == pytest.approx(flops / (0.4 * 989e12) / 3600, rel=0.1)
