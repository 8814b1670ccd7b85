"""Intervals by bootstrap over runs, with the noise that runs of one size and seed, or one cell, have in common.

Without seeds every run stands alone, and runs are drawn with replacement (as for the published intervals of
arXiv 2404.10102). With seeds that would be wrong: runs that share a seed and a size start from the same weights and see
the same batches, and the runs of a cell share what the law misses there. Treated as independent they make intervals
half as wide as they should be; drawn in whole clusters, of which a study has five or ten, they are as wrong. So the
noise is taken apart: the variance of each group's common part is estimated, and both common parts and the runs' own
residuals are drawn anew around the fitted law, at the sizes and budgets that ran. How often the intervals cover the
truth is counted by `python tools/bench.py coverage`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import nnls

from bov_megatron.studies.objective import Objective

_OUTLIER = 4.0
"""In robust standard deviations: further out, a residual counts this much for the variances, so that one diverged run
is not taken for noise of its whole group."""
_REWEIGHTED = 8
"""Rounds of the regression for variances, whose weights follow from its result."""


def bootstrap(
    objective: Objective, theta: np.ndarray, groups: list[np.ndarray], samples: int, rng: np.random.Generator
) -> np.ndarray:
    """`samples` refits `[samples, P]` of an objective with its minimum at `theta [P]`.

    `groups`: for each kind of common noise, the number of its group per run `[R]`; none: every run by itself.
    """
    runs = len(objective.log_loss)
    if groups:
        noise = _draw_noise(objective.residuals(theta), objective.jacobian(theta[None])[0], groups, samples, rng)
        return objective.minimise_samples(theta, objective.log_law(theta[None]) + noise, np.ones((samples, runs)))
    weights = np.array([_draw(objective.index, runs, rng) for _ in range(samples)])
    return objective.minimise_samples(theta, np.repeat(objective.log_loss[None], samples, axis=0), weights)


def _draw_noise(
    residuals: np.ndarray, jacobian: np.ndarray, groups: list[np.ndarray], samples: int, rng: np.random.Generator
) -> np.ndarray:
    """Noise of every run in every sample `[samples, R]`: its own with a random sign, and its groups' common parts.

    Every variance is drawn around its estimate as well, since few groups tell it badly: with normal noise that makes
    ends of intervals Student's t, not the normal's.
    """
    noise = split_noise(residuals, jacobian, groups)
    own = np.clip(noise.own, -_OUTLIER * noise.deviations[0], _OUTLIER * noise.deviations[0])
    scale = noise.deviations[0] / max(float(np.sqrt((own**2).mean())), 1e-300)
    signs = rng.choice([-1.0, 1.0], size=(samples, len(residuals)))
    spread = np.sqrt(noise.degrees / rng.chisquare(noise.degrees, size=(samples, len(noise.degrees))))
    drawn = signs * (scale * noise.own) * spread[:, :1]
    for i, group in enumerate(groups, start=1):
        common = rng.standard_normal((samples, group.max() + 1))
        drawn += noise.deviations[i] * spread[:, i : i + 1] * common[:, group]
    return drawn


def _draw(variant: np.ndarray, runs: int, rng: np.random.Generator) -> np.ndarray:
    """How often each run is drawn, at least two distinct runs of every variant."""
    # A draw that leaves the law undetermined is noise, not information: draw again.
    variants = variant.max() + 1
    while True:
        copies = np.bincount(rng.integers(0, runs, runs), minlength=runs).astype(float)
        if (np.bincount(variant[copies > 0], minlength=variants) > 1).all():
            return copies


@dataclass(frozen=True)
class Noise:
    """Residuals, taken apart. The first entry is the runs' own part, the others are the groups' common parts."""

    deviations: np.ndarray
    """Standard deviations `[1 + groups]`."""
    degrees: np.ndarray
    """Degrees of freedom that told them `[1 + groups]`."""
    own: np.ndarray
    """Each run's residual less the common parts as best predicted, as large as if the fit had not followed it `[R]`."""


def split_noise(residuals: np.ndarray, jacobian: np.ndarray, groups: list[np.ndarray]) -> Noise:
    """Take the residuals `[R]` of a fit with this jacobian `[R, P]` apart.

    The variances are those of restricted maximum likelihood (REML; Patterson and Thompson, Biometrika 58, 1971), none
    negative. Each kind of group in turn takes out of the residuals what the parameters and the kinds before it have
    left; REML is then the regression of these sums' means on what is expected of them, with weights of degrees of
    freedom / expectation squared. That is exact for nested kinds in a balanced study, and close where kinds cross.
    """
    spread = 1.4826 * np.median(np.abs(residuals))
    kept = np.clip(residuals, -_OUTLIER * spread, _OUTLIER * spread) if spread > 0 else residuals
    members = [np.equal.outer(group, np.arange(group.max() + 1)).astype(float) for group in groups]
    parameters = np.linalg.qr(jacobian)[0]  # what they can take up
    basis, sums, degrees, expected = parameters, [], [], []
    for member in members:
        stratum = _directions(member / np.sqrt(member.sum(axis=0)), basis)
        basis = np.hstack([basis, stratum])
        sums.append(((stratum.T @ kept) ** 2).sum())
        degrees.append(stratum.shape[1])
        expected.append([degrees[-1], *(((stratum.T @ other) ** 2).sum() for other in members)])
    sums.append(max((kept**2).sum() - ((basis.T @ kept) ** 2).sum(), 0.0))
    degrees.append(len(residuals) - basis.shape[1])
    expected.append([degrees[-1], *((member**2).sum() - ((basis.T @ member) ** 2).sum() for member in members)])
    variances = _restricted_likelihood(np.array(sums), np.array(degrees), np.array(expected))
    shared = np.zeros((len(residuals), len(residuals)))
    for variance, member in zip(variances[1:], members, strict=True):
        shared += variance * member @ member.T
    tiny = 1e-9 * max(float((kept**2).mean()), 1e-300)
    predicted = shared @ np.linalg.solve(shared + (variances[0] + tiny) * np.eye(len(residuals)), kept)
    # What a kind without noise has taken out tells of the runs' own.
    own_degrees = degrees[-1] + np.array(degrees[:-1])[variances[1:] == 0].sum()
    leverage = np.minimum((parameters**2).sum(axis=1), 0.95)
    own = (residuals - predicted) / np.sqrt(1 - leverage)
    return Noise(np.sqrt(variances), np.maximum([own_degrees, *degrees[:-1]], 1.0), own)


def _directions(member: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """Orthonormal directions `[R, K]` of a kind's groups (columns of length 1) of which `basis` leaves half or more."""
    free = member - basis @ (basis.T @ member)
    left, vectors = np.linalg.eigh(free.T @ free)
    return free @ (vectors[:, left > 0.5] / np.sqrt(left[left > 0.5]))


def _restricted_likelihood(sums: np.ndarray, degrees: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Variances `[K]`, none negative, of independent sums of squares whose expectations are `expected @ variances`."""
    # Means in units of their average, and weights relative to it: noise may be of any size.
    scale = max(float(sums.sum() / degrees.sum()), 1e-300)
    means, per_degree = sums / np.maximum(degrees, 1) / scale, expected / np.maximum(degrees, 1)[:, None]
    fitted = np.ones(len(sums))
    for _ in range(_REWEIGHTED):
        weights = np.sqrt(degrees) / np.maximum(fitted, 1e-6)
        variances = nnls(per_degree * weights[:, None], means * weights)[0]
        fitted = per_degree @ variances
    return variances * scale


def percentiles(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end per column of `draws [S, …]` that leave out the same share on either side."""
    low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high
