"""How often the intervals of `bov study fit` hold the truth: studies from a known law, with noise of several kinds.

Shapes: R runs of one study.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from bov_megatron.studies.intervals import bootstrap, percentiles
from bov_megatron.studies.law import Law
from bov_megatron.studies.multiplier import Costs, compute_multiplier
from bov_megatron.studies.objective import Objective
from bov_megatron.studies.table import Columns, Runs, runs_of

TRUTH = Law(1.8, 480.0, 2085.0, 0.35, 0.37, {"bank": 1.2}, {"bank": 1.1}, "baseline")
FLOPS_PER_PARAMETER = {"baseline": 6.0, "bank": 5.6}
"""A bank has no value projection to multiply by."""
LEVEL = 0.9
STUDIES, QUICK_STUDIES = 500, 4
BOOTSTRAPS, QUICK_BOOTSTRAPS = 400, 50


@dataclass(frozen=True)
class Scenario:
    """A design, and the relative standard deviation of each kind of noise."""

    sizes: int = 5
    budgets: int = 5
    seeds: int = 2
    run: float = 3e-4
    """Of every run by itself."""
    size_and_seed: float = 0.0
    """Shared by the runs of one size and seed, of both variants."""
    variant: float = 0.0
    """Shared by the runs of one size and seed of one variant."""
    cell: float = 0.0
    """Shared by the seeds of a cell: what the law misses."""
    tails: int = 0
    """Degrees of freedom of Student's t for a run's own noise; 0: normal."""


SCENARIOS = {
    "runs 5e-5": Scenario(run=5e-5),
    "runs 3e-4": Scenario(),
    "runs 1e-3": Scenario(run=1e-3),
    "runs 1e-3, heavy tails": Scenario(run=1e-3, tails=3),
    "4 sizes x 3 budgets, 1e-3": Scenario(sizes=4, budgets=3, run=1e-3),
    "3 seeds, 3e-4": Scenario(seeds=3),
    "one seed, 3e-4": Scenario(seeds=1),
    "seed and size share 3e-4": Scenario(size_and_seed=3e-4),
    "seed, size, variant share 3e-4": Scenario(variant=3e-4),
    "misfit 3e-4 by cell": Scenario(cell=3e-4, run=2e-4),
    "all kinds": Scenario(size_and_seed=2e-4, variant=1e-4, cell=2e-4, run=2e-4),
}


def make_study(scenario: Scenario, rng: np.random.Generator) -> pd.DataFrame:
    """A table with one row per run, the columns n, c, d, loss, variant, seed."""
    grid = [
        (variant, size, budget, seed)
        for variant in range(2)
        for size in range(scenario.sizes)
        for budget in range(scenario.budgets)
        for seed in range(scenario.seeds)
    ]
    variant, size, budget, seed = np.array(grid).T
    names = np.array([TRUTH.baseline, *TRUTH.n_factors])[variant]
    n = np.geomspace(5e7, 8e8, scenario.sizes)[size]
    c = np.geomspace(3e17, 1e20, scenario.budgets)[budget]
    d = c / n / np.vectorize(FLOPS_PER_PARAMETER.get)(names)
    loss = np.where(variant == 0, TRUTH.loss(n, d), TRUTH.loss(n, d, "bank"))
    own = (
        rng.standard_t(scenario.tails, len(n)) / (scenario.tails / (scenario.tails - 2)) ** 0.5
        if scenario.tails
        else rng.standard_normal(len(n))
    )
    shape = (2, scenario.sizes, scenario.budgets, scenario.seeds)
    noise = scenario.run * own
    noise += scenario.size_and_seed * rng.standard_normal(shape)[0, :, 0][size, seed]
    noise += scenario.variant * rng.standard_normal(shape)[:, :, 0][variant, size, seed]
    noise += scenario.cell * rng.standard_normal(shape)[..., 0][variant, size, budget]
    return pd.DataFrame({"n": n, "c": c, "d": d, "loss": loss * np.exp(noise), "variant": names, "seed": seed})


def make_runs(scenario: Scenario, rng: np.random.Generator) -> Runs:
    return runs_of(make_study(scenario, rng), Columns(n="n", c="c", d="d", loss="loss", variant="variant", seed="seed"))


def intervals_of(runs: Runs, level: float, bootstraps: int, rng: np.random.Generator) -> dict[str, tuple[float, float]]:
    """Those of the joint fit, as `fit_runs` makes them, and that of Sc at the largest budget."""
    objective = Objective(runs.n, runs.d, runs.loss, runs.variant, runs.variants)
    theta = objective.minimise()
    draws = objective.quantities(bootstrap(objective, theta, runs.noise_groups(), bootstraps, rng))
    costs = [Costs(runs.of(name)) for name in runs.variants]
    gain, _ = compute_multiplier(objective.names(), draws, "bank", runs.flops.max(keepdims=True), *costs)
    low, high = percentiles(np.column_stack([draws, gain]), level)
    return dict(zip((*objective.names(), "Sc"), zip(low.tolist(), high.tolist(), strict=True), strict=True))


def truth() -> dict[str, float]:
    """Under `names` of the intervals. With FLOPs in proportion to N, Sc is the product of the three factors."""
    n_factor, d_factor = TRUTH.n_factors["bank"], TRUTH.d_factors["bank"]
    per_flop = FLOPS_PER_PARAMETER[TRUTH.baseline] / FLOPS_PER_PARAMETER["bank"]
    exponents = {name: getattr(TRUTH, name) for name in ("E", "A", "B", "alpha", "beta", "compute_exponent")}
    factors = {"n_factor.bank": n_factor, "d_factor.bank": d_factor}
    return exponents | factors | {"Sc": n_factor * d_factor * per_flop}


def count_coverage(scenario: Scenario, studies: int, bootstraps: int, seed: int) -> dict[str, int]:
    """In how many of `studies` each interval of LEVEL holds the truth."""
    covered = dict.fromkeys(truth(), 0)
    for rng in np.random.default_rng(seed).spawn(studies):
        found = intervals_of(make_runs(scenario, rng), LEVEL, bootstraps, rng)
        for name, value in truth().items():
            covered[name] += found[name][0] <= value <= found[name][1]
    return covered


def bench_coverage(quick: bool, seed: int) -> dict:
    """Per scenario the share of studies whose interval holds the truth, and what chance alone makes of LEVEL."""
    studies, bootstraps = (QUICK_STUDIES, QUICK_BOOTSTRAPS) if quick else (STUDIES, BOOTSTRAPS)
    names = list(SCENARIOS)[:2] if quick else list(SCENARIOS)
    results = {}
    for name in names:
        print(f"  {name} …", file=sys.stderr, flush=True)
        counts = count_coverage(SCENARIOS[name], studies, bootstraps, seed)
        results[name] = {quantity: count / studies for quantity, count in counts.items()}
    chance = binomtest(round(LEVEL * studies), studies).proportion_ci(0.95)
    return {
        "level": LEVEL,
        "studies": studies,
        "bootstraps": bootstraps,
        "seed": seed,
        "chance": f"{chance.low:.3f} to {chance.high:.3f} (95%, of intervals that hold the truth as often as they say)",
        "coverage": results,
    }
