"""IsoFLOP parabolas: at one compute budget, loss as a quadratic in the logarithm of the size. A plot and a cross-check;
the law is what is reported, since the parabola's minimum is biased even without noise: the law is no parabola, and the
wider or the less centred the sizes, the further off (arXiv 2603.22339)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.stats import linregress

from bov_megatron.studies.law import Law
from bov_megatron.studies.table import Runs

_SAME_BUDGET = 0.05
"""Computes that follow each other more closely than this (relative) are one budget."""
_FEWEST_SIZES = 3
_SAME_SIZE = 0.02
BIAS = (
    "parabolas are biased even without noise, the more so the wider and the less centred the sizes "
    "(arXiv 2603.22339): a cross-check, not an estimate"
)


@dataclass(frozen=True)
class Parabola:
    """`loss = c0 + c1 x + c2 x^2` with `x = log N`, through the runs of one variant at one budget."""

    variant: str
    flops: float
    """Geometric mean of the runs' compute."""
    n: np.ndarray
    loss: np.ndarray
    coefficients: tuple[float, float, float]
    """c0, c1, c2."""
    best_n: float
    """Its minimum; NaN if the parabola opens downwards or the minimum lies outside the sizes that ran."""
    best_d: float
    """Tokens at `best_n`."""
    best_loss: float


@dataclass(frozen=True)
class CrossCheck:
    """How the best size of a variant grows with compute, `N ~ C ** exponent`: by parabolas and by the law."""

    variant: str
    parabolas: float
    standard_error: float
    """Of the line through the parabolas' minima; says nothing about their bias."""
    law: float
    """`beta / (alpha + beta)`, exact where FLOPs per token grow in proportion to N."""


def parabolas(runs: Runs) -> list[Parabola]:
    """One per variant and budget with at least three sizes, by variant and compute."""
    found = []
    for variant in runs.variants:
        own = runs.of(variant)
        for budget in _budgets(own.flops):
            group = own.where(budget)
            if _distinct(group.n) >= _FEWEST_SIZES:
                found.append(_parabola(variant, group))
    return found


def cross_checks(found: list[Parabola], law: Law) -> list[CrossCheck]:
    """Per variant whose parabolas have a minimum at three budgets or more."""
    checks = []
    for variant in law.variants:
        own = [p for p in found if p.variant == variant and np.isfinite(p.best_n)]
        if len(own) >= 3:
            line = linregress(np.log([p.flops for p in own]), np.log([p.best_n for p in own]))
            checks.append(CrossCheck(variant, float(line.slope), float(line.stderr), law.beta / (law.alpha + law.beta)))
    return checks


def _budgets(flops: np.ndarray) -> list[np.ndarray]:
    """A mask per budget, ascending."""
    order = np.sort(flops)
    edges = np.flatnonzero(np.diff(np.log(order)) > _SAME_BUDGET)
    firsts = order[np.r_[0, edges + 1]]
    number = np.searchsorted(firsts, flops, side="right")
    return [number == i for i in np.unique(number)]


def _distinct(n: np.ndarray) -> int:
    return 1 + int((np.diff(np.log(np.sort(n))) > _SAME_SIZE).sum())


def _parabola(variant: str, group: Runs) -> Parabola:
    x = np.log(group.n)
    fitted = np.polynomial.Polynomial.fit(x, group.loss, 2).convert()
    c0, c1, c2 = (float(c) for c in np.resize(np.append(fitted.coef, [0.0, 0.0]), 3))
    bottom = -c1 / (2 * c2) if c2 > 0 else np.nan
    inside = x.min() <= bottom <= x.max()
    best_n = float(np.exp(bottom)) if inside else np.nan
    # Compute per parameter and token, between the sizes that ran.
    order = np.argsort(x)
    per_token = np.interp(bottom, x[order], np.log(group.flops / group.d / group.n)[order]) if inside else np.nan
    compute = float(np.exp(np.log(group.flops).mean()))
    return Parabola(
        variant, compute, group.n, group.loss, (c0, c1, c2), best_n,
        float(compute / (best_n * np.exp(per_token))), float(fitted(bottom)) if inside else np.nan,
    )  # fmt: skip
