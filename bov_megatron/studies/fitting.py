"""Fitting the scaling law to runs: the joint fit, its intervals, and what tells how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import f

from bov_megatron.studies.identifiability import require_carried, shortcoming
from bov_megatron.studies.intervals import bootstrap, percentiles
from bov_megatron.studies.law import Law
from bov_megatron.studies.objective import HUBER_DELTA, Objective
from bov_megatron.studies.table import Runs

_AGREE, _ROUNDING = 1e-5, 1e-14
"""Two minima are the same within this share of the objective; a perfect fit has an objective of rounding alone."""
_HELD_OUT = 0.1
_SAME_BUDGET = 0.05
"""Computes closer than this (relative) are one budget: runs end on whole steps."""
_ODD = 10.0
"""In robust standard deviations of the residuals: a run further off the law is pointed out."""
_SMALL_SHARE = 1e-3


@dataclass(frozen=True)
class SecondMethod:
    """The same objective minimised in another way, from other starts."""

    method: str
    objective: float
    law: Law
    agrees: bool
    """Whether neither method found a point that is better than the other's by more than rounding."""


@dataclass(frozen=True)
class LackOfFit:
    """Is the misfit larger than what seeds explain? An F test of the law against one free mean per (variant, N, D)."""

    statistic: float
    degrees: tuple[int, int]
    """Of the numerator (misfit) and the denominator (between seeds)."""
    p_value: float
    seed_noise: float
    """Relative standard deviation of the loss between seeds of the same cell."""
    misfit: float
    """Relative root mean square by which the law misses the cells' means beyond seed noise; 0 if not beyond it."""


@dataclass(frozen=True)
class Holdout:
    """Runs at the largest budget, predicted by a fit to all others."""

    flops: float
    """The smallest compute among the runs held out."""
    runs: tuple[str, ...]
    measured: tuple[float, ...]
    predicted: tuple[float, ...]
    error: float
    """Root mean square of `log(predicted / measured)`."""
    bias: float
    """Mean of `log(predicted / measured)`: positive if the law expects too high a loss."""


@dataclass(frozen=True)
class Fit:
    """A fit to the runs of all variants, and what is known about how far to trust it."""

    law: Law
    """The joint fit: exponents shared, a factor on N and on D per variant."""
    objective: float
    """Sum over runs of the Huber loss (delta 1e-3) of `log(measured / predicted)`."""
    runs: int
    clusters: int
    """Groups of runs (same size, same seed) that are drawn together in the bootstrap."""
    n_column: str
    """Which count of parameters N is, e.g. `n_without_tables`."""
    loss_column: str
    level: float
    """Of the intervals, e.g. 0.9."""
    intervals: dict[str, tuple[float, float]]
    """By name: E, A, B, alpha, beta, compute_exponent, and n_factor.V and d_factor.V for each variant V."""
    draws: np.ndarray
    """The bootstrap's fits `[bootstraps, parameters]`, columns as in `names`; for bands around curves."""
    names: tuple[str, ...]
    separate: dict[str, Law]
    """One fit per variant, for comparison; a variant whose runs don't carry a fit of its own is not in it."""
    checked: SecondMethod
    residuals: np.ndarray
    """`log(measured / predicted)` per run, in the order of the table."""
    lack_of_fit: LackOfFit | None
    """None if no cell was run with several seeds."""
    holdout: Holdout | None
    """None if the runs without the largest budget don't carry a fit."""
    warnings: tuple[str, ...]
    """What a reader must know before using the numbers, one sentence each."""


def fit_runs(runs: Runs, *, level: float = 0.9, bootstraps: int = 1000, seed: int = 0) -> Fit:
    """Fit the law to `runs`, with intervals that hold the truth in a share `level` of studies.

    Raises StudyError if the runs don't determine the law; the message says which runs would.
    """
    require_carried(runs)
    rng = np.random.default_rng(seed)
    objective = _objective(runs)
    theta = objective.minimise()
    other = objective.minimise_otherwise(rng)
    checked = SecondMethod(
        "BFGS from random starts",
        objective.value(other),
        objective.law(other),
        agrees=bool(
            abs(objective.value(other) - objective.value(theta)) <= _AGREE * objective.value(theta) + _ROUNDING
        ),
    )
    if objective.value(other) < objective.value(theta):
        theta = other
    draws = objective.quantities(bootstrap(objective, theta, runs.noise_groups(), bootstraps, rng))
    low, high = percentiles(draws, level)
    intervals = dict(zip(objective.names(), zip(low.tolist(), high.tolist(), strict=True), strict=True))
    fit = Fit(
        law=objective.law(theta),
        objective=objective.value(theta),
        runs=len(runs),
        clusters=int(runs.clusters().max()) + 1,
        n_column=runs.n_column,
        loss_column=runs.loss_column,
        level=level,
        intervals=intervals,
        draws=draws,
        names=objective.names(),
        separate=_separate(runs),
        checked=checked,
        residuals=objective.residuals(theta),
        lack_of_fit=_lack_of_fit(runs, objective.residuals(theta), objective.parameters),
        holdout=_holdout(runs),
        warnings=(),
    )
    return replace(fit, warnings=tuple(_warnings(runs, fit)))


def law_of(runs: Runs) -> Law:
    """The law that fits `runs` best, without intervals. Raises StudyError as `fit_runs` does."""
    require_carried(runs)
    objective = _objective(runs)
    return objective.law(objective.minimise())


def _objective(runs: Runs) -> Objective:
    return Objective(runs.n, runs.d, runs.loss, runs.variant, runs.variants)


def _separate(runs: Runs) -> dict[str, Law]:
    laws = {}
    for variant in runs.variants:
        own = runs.of(variant)
        if not shortcoming(own)[0]:
            laws[variant] = law_of(own)
    return laws


def _lack_of_fit(runs: Runs, residuals: np.ndarray, parameters: int) -> LackOfFit | None:
    cells = runs.cells()
    counts = np.bincount(cells)
    between = len(runs) - len(counts)
    free = len(counts) - parameters
    if between < 1 or free < 1:
        return None
    means = np.bincount(cells, residuals) / counts
    noise = float(((residuals - means[cells]) ** 2).sum() / between)
    misfit = float((counts * means**2).sum() / free)
    if noise == 0:
        return None
    statistic = misfit / noise
    # Of a cell's mean of `len(runs) / len(counts)` seeds, noise explains noise / seeds.
    beyond = max(misfit - noise, 0) * len(counts) / len(runs)
    return LackOfFit(statistic, (free, between), float(f.sf(statistic, free, between)), noise**0.5, beyond**0.5)


def _holdout(runs: Runs) -> Holdout | None:
    """Whole budgets from the largest down, until they have a tenth of the runs."""
    least = np.sort(runs.flops)[-math.ceil(_HELD_OUT * len(runs))]
    held = runs.flops > least * (1 - _SAME_BUDGET)
    rest = runs.where(~held)
    if held.all() or set(runs.variant[held]) - set(rest.variants) or shortcoming(rest)[0]:
        return None
    law, left_out = law_of(rest), runs.where(held)
    predicted = np.array(
        [float(law.loss(n, d, v)) for n, d, v in zip(left_out.n, left_out.d, left_out.variant, strict=True)]
    )
    errors = np.log(predicted / left_out.loss)
    return Holdout(
        float(left_out.flops.min()),
        tuple(map(str, left_out.name)),
        tuple(left_out.loss.tolist()),
        tuple(predicted.tolist()),
        float(np.sqrt((errors**2).mean())),
        float(errors.mean()),
    )


def _warnings(runs: Runs, fit: Fit) -> Iterator[str]:
    if not fit.checked.agrees:
        yield (
            f"two methods found different minima (objective {fit.objective:.9g} and {fit.checked.objective:.9g}; the "
            "lower one is reported): the runs leave the law nearly undetermined"
        )
    if _SMALL_SHARE * runs.loss.min() > fit.law.E:
        yield "E is fitted as zero: these losses are too far from the irreducible one to tell it; don't extrapolate"
    spread = 1.4826 * float(np.median(np.abs(fit.residuals)))
    odd = np.abs(fit.residuals) > max(_ODD * spread, 10 * HUBER_DELTA)
    if odd.any():
        listed = ", ".join(f"{runs.name[i]} ({fit.residuals[i]:+.1%})" for i in np.flatnonzero(odd)[:5])
        yield (
            f"{odd.sum()} run(s) far off the law: {listed}; see whether they diverged. They pull little on the fit, "
            "but a run that failed should be run again or left out"
        )
    if fit.lack_of_fit is None:
        yield "no cell was run with several seeds, so that misfit can't be told from noise: no lack-of-fit test"
    elif fit.lack_of_fit.p_value < 0.01:
        yield (  # without numbers, which each count of parameters has its own of
            "the law misses cells by more than seeds differ (lack of fit, p < 0.01): it is not exact here; the "
            "intervals include what such scatter does"
        )
    if fit.holdout is None:
        yield "the runs below the largest budget don't carry a fit of their own: no hold-out"
    if runs.seed is not None and len(set(runs.seed)) == 1:
        yield "one seed: noise that runs of a size share can hardly be seen, and intervals may be too narrow"
