"""Intervals by bootstrap over runs, with the noise that runs of one size and seed, or one cell, have in common.

Drawing runs with replacement is right as long as every run has its own noise (and is what the published intervals of
arXiv 2404.10102 are). Runs that share a seed and a size start from the same weights and see the same batches; the runs
of a cell share what the law misses there. Treated as independent they make intervals half as wide as they should be;
drawn in whole clusters, of which a study has five or ten, they make intervals that are as wrong. So the noise is taken
apart: the variance of each group's common part is estimated, the common parts are taken out, runs are drawn with
replacement, and common parts of that variance are drawn anew. How often the intervals cover the truth is counted by
`python tools/bench.py coverage`.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import nnls

from bov_megatron.studies.objective import Objective

_OUTLIER = 4.0
"""In robust standard deviations: further out, a residual counts this much for the variances, so that one diverged run
is not taken for noise of its whole group."""
_CHANCE = 0.5
"""Standard errors by which variances of common noise are lowered; by the counted coverage."""


def bootstrap(
    objective: Objective, theta: np.ndarray, groups: list[np.ndarray], samples: int, rng: np.random.Generator
) -> np.ndarray:
    """`samples` refits `[samples, P]` of an objective with its minimum at `theta [P]`.

    `groups`: for each kind of common noise, the number of its group per run `[R]`; none: every run by itself.
    """
    residuals, runs = objective.residuals(theta), len(objective.log_loss)
    # Every run's number of copies. A draw that leaves the law undetermined is noise, not information: draw again.
    weights = np.array([_draw(objective.index, runs, rng) for _ in range(samples)])
    log_loss = np.repeat(objective.log_loss[None], samples, axis=0)
    if groups:
        jacobian = objective.jacobian(theta[None])[0]
        deviations, common = common_noise(residuals, jacobian, groups)
        log_loss -= common
        for deviation, group in zip(deviations[1:], groups, strict=True):
            log_loss += deviation * rng.standard_normal((samples, group.max() + 1))[:, group]
    return objective.minimise_samples(theta, log_loss, weights)


def _draw(variant: np.ndarray, runs: int, rng: np.random.Generator) -> np.ndarray:
    """How often each run is drawn, at least two distinct runs of every variant."""
    variants = variant.max() + 1
    while True:
        copies = np.bincount(rng.integers(0, runs, runs), minlength=runs).astype(float)
        if (np.bincount(variant[copies > 0], minlength=variants) > 1).all():
            return copies


def common_noise(
    residuals: np.ndarray, jacobian: np.ndarray, groups: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Standard deviations of each run's own noise and of each kind of common noise `[1 + len(groups)]`, and the common
    noise of every run as best predicted `[R]`, free of what the law's parameters could take up.

    Henderson's method of moments: each group sum of squares equals its expectation under the fit. None is negative,
    and each is lowered by half the standard error that runs without common noise would give it: chance makes variances
    that are cut off at zero too large on average.
    """
    spread = 1.4826 * np.median(np.abs(residuals))
    kept = np.clip(residuals, -_OUTLIER * spread, _OUTLIER * spread) if spread > 0 else residuals
    basis = np.linalg.qr(jacobian)[0]  # of what the parameters can take up
    members = [np.equal.outer(group, np.arange(group.max() + 1)).astype(float) for group in groups]
    free = [member - basis @ (basis.T @ member) for member in members]
    sums = np.array([(kept**2).sum()] + [((member.T @ kept) ** 2).sum() for member in members])
    expected = np.empty((len(sums), len(sums)))
    expected[0, 0] = len(residuals) - basis.shape[1]
    for i, member in enumerate(members):
        expected[0, i + 1] = expected[i + 1, 0] = (free[i] ** 2).sum()
        for j in range(len(members)):
            expected[i + 1, j + 1] = ((member.T @ free[j]) ** 2).sum()
    scale = max(sums[0], 1e-300)
    variances = nnls(expected, sums / scale)[0] * scale
    chance = variances[0] * np.sqrt(2 * np.diag(np.linalg.pinv(expected))[1:])
    variances[1:] = np.maximum(variances[1:] - _CHANCE * chance, 0)
    covariance = variances[0] * np.eye(len(residuals))
    shared = np.zeros_like(covariance)
    for variance, member in zip(variances[1:], members, strict=True):
        shared += variance * member @ member.T
    covariance += shared + 1e-9 * scale * np.eye(len(residuals)) / len(residuals)
    predicted = shared @ np.linalg.solve(covariance, kept)
    return np.sqrt(variances), predicted - basis @ (basis.T @ predicted)


def percentiles(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end per column of `draws [S, …]` that leave out the same share on either side."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
