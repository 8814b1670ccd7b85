"""Multipliers are what the definition says, by the runs' own costs, and refused where no data are."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize_scalar

from benchmarks.coverage import FLOPS_PER_PARAMETER, TRUTH
from bov_megatron.studies.fitting import fit_runs
from bov_megatron.studies.multiplier import multipliers
from tests.support.tables import make_runs, make_table

PER_FLOP = FLOPS_PER_PARAMETER["baseline"] / FLOPS_PER_PARAMETER["bank"]


def test_with_flops_in_proportion_to_size_it_is_the_product_of_the_factors(runs, fit):
    (compute,), refused = multipliers(runs, fit)[0]["bank"], multipliers(runs, fit)[1]
    assert not refused and not compute.clock
    assert compute.estimate == pytest.approx(fit.law.n_factors["bank"] * fit.law.d_factors["bank"] * PER_FLOP, rel=1e-5)
    draws = np.prod([fit.draws[:, fit.names.index(f"{kind}_factor.bank")] for kind in "nd"], axis=0) * PER_FLOP
    assert compute.value[1:] == pytest.approx(np.quantile(draws, [0.05, 0.95]), rel=1e-4)
    assert compute.value[1] < 1.2 * 1.1 * PER_FLOP < compute.value[2]


def test_it_is_the_definition_at_the_best_sizes_by_measured_costs(runs, fit):
    """FLOPs per token that grow faster than N, as attention's do: no product of factors any more."""
    per_token = {"baseline": 6.0, "bank": 5.0}
    power = np.where(runs.variant == "bank", 1.15, 1.05)
    cost = np.vectorize(per_token.get)(runs.variant) * runs.n * (runs.n / 5e7) ** (power - 1)
    own = dataclasses.replace(runs, flops=cost * runs.d)
    (compute,) = multipliers(own, fit)[0]["bank"]
    law = fit.law

    def best(flops, variant, power):
        def loss(log_n):
            n = np.exp(log_n)
            return float(law.loss(n, flops / (per_token[variant] * n * (n / 5e7) ** (power - 1)), variant))

        return minimize_scalar(loss, bounds=np.log([5e7, 8e8]), method="bounded", options={"xatol": 1e-10}).fun - law.E

    for flops, estimate in zip(compute.flops[compute.carried], compute.estimate[compute.carried], strict=True):
        expected = (best(flops, "baseline", 1.05) / best(flops, "bank", 1.15)) ** (1 / law.compute_exponent)
        assert estimate == pytest.approx(expected, rel=1e-4)
    inside = compute.estimate[compute.carried]
    assert inside.max() / inside.min() > 1.02, "costs that differ by size must show in the curve"


def test_wall_clock_is_by_measured_speed(runs, fit):
    """The bank trains 10% more tokens per second, on fewer FLOPs each."""
    speed = 1e12 * runs.d / runs.flops * np.where(runs.variant == "bank", 1.1 * 5.6 / 6, 1.0)
    compute, clock = multipliers(dataclasses.replace(runs, tokens_per_second=speed), fit)[0]["bank"]
    assert clock.clock
    # Equal sizes and tokens: 1.1 times faster; so Sw is what the factors alone make of it.
    assert clock.estimate / compute.estimate == pytest.approx(1.1 * 5.6 / 6, rel=1e-6)
    assert np.array(clock.value) / compute.value == pytest.approx(1.1 * 5.6 / 6, rel=1e-6)
    unknown = np.where(runs.name == "row 3", np.nan, speed)
    assert len(multipliers(dataclasses.replace(runs, tokens_per_second=unknown), fit)[0]["bank"]) == 1


def test_noise_of_speeds_is_in_the_wall_clock_interval(runs, fit):
    """What it adds is the spread of the estimate over speeds measured anew."""
    fit = dataclasses.replace(fit, draws=fit.draws[:200])

    def measured_again(rng):
        speed = 1e12 * runs.d / runs.flops * np.exp(0.03 * rng.standard_normal(len(runs)))
        compute, clock = multipliers(dataclasses.replace(runs, tokens_per_second=speed), fit)[0]["bank"]
        widths = [np.log(m.value[2] / m.value[1]) / 2 / 1.645 for m in (compute, clock)]
        return np.log(clock.value[0]), (widths[1] ** 2 - widths[0] ** 2) ** 0.5

    found = np.array([measured_again(rng) for rng in np.random.default_rng(0).spawn(40)])
    assert np.median(found[:, 1]) == pytest.approx(found[:, 0].std(), rel=0.3)


def test_carried_range_is_where_both_best_sizes_ran(runs, fit):
    (compute,) = multipliers(runs, fit)[0]["bank"]
    law = fit.law
    for flops, carried in zip(compute.flops, compute.carried, strict=True):
        inside = flops <= runs.flops.max() * 1.001
        for variant in ("baseline", "bank"):
            grid = np.geomspace(1e6, 1e11, 40001)
            losses = law.loss(grid, flops / (FLOPS_PER_PARAMETER[variant] * grid), variant)
            inside &= runs.n.min() * 0.999 <= grid[losses.argmin()] <= runs.n.max() * 1.001
        assert carried == inside
    assert compute.at == compute.flops[compute.carried].max()
    assert not compute.carried[-1]


def test_no_shared_budget_is_refused(runs):
    apart = runs.where(np.where(runs.variant == "bank", runs.flops < 2e18, runs.flops > 2e18))
    found, refused = multipliers(apart, fit_runs(apart, bootstraps=100))
    assert not found
    assert "share no budget" in refused["bank"] and "run bank once more at" in refused["bank"]
    assert "GPU-hours of H100" in refused["bank"]


def test_best_sizes_that_did_not_run_are_refused(runs):
    large = runs.where((runs.n > 1.5e8) & (runs.flops < 1e19))
    large = dataclasses.replace(large, n=large.n * 3, d=large.d / 3)
    loss = np.array([float(TRUTH.loss(n, d, v)) for n, d, v in zip(large.n, large.d, large.variant, strict=True)])
    large = dataclasses.replace(large, loss=loss)
    found, refused = multipliers(large, fit_runs(large, bootstraps=100))
    assert not found and "outside the sizes that ran; run baseline at N=" in refused["bank"]
    assert "GPU-hours of H100" in refused["bank"]


def test_the_baseline_against_itself_is_one():
    table = make_table()
    copy = table[table.variant == "baseline"]
    noise = 1e-4 * np.random.default_rng(5).standard_normal(len(copy))
    twin = copy.assign(variant="bank", loss=copy.loss * np.exp(noise))
    runs = make_runs(pd.concat([copy, twin], ignore_index=True))
    (compute,) = multipliers(runs, fit_runs(runs, bootstraps=200))[0]["bank"]
    assert compute.value[1] < 1 < compute.value[2]
    assert compute.value[0] == pytest.approx(1, abs=0.003)
