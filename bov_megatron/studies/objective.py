"""What is minimised: the Huber loss of `log(measured / law)`, summed over runs, and how it is minimised.

Shapes: R runs, V variants, P = 3 + 2V parameters, S samples (bootstrap draws) that are fitted at once.

The parameters `theta [P]` are log E, alpha, beta, log a_v, log b_v, where `a_v = A (k_N nbar)^-alpha` is what the size
costs a run of variant v at the geometric mean of all sizes, and b_v likewise for tokens. Around the means the
coefficients hardly depend on the exponents, which in A and B move by factors of ten; and each logarithm that the law
sums is linear in them. Factors follow: `k_N = (a_v / a_baseline) ** (-1 / alpha)`.
"""

from __future__ import annotations

import warnings

import numpy as np
from scipy.optimize import leastsq, minimize, nnls

from bov_megatron.studies.law import Law

HUBER_DELTA = 1e-3
"""Of `log(measured / law)`: deviations beyond a thousandth count linearly (Hoffmann et al., appendix D.3)."""
_START_EXPONENTS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
_REFINED_STARTS = 4
_FLOATS_AT_ONCE = 4_000_000
"""Of the Jacobian of one batch of samples: 32 MB."""


def huber(residuals: np.ndarray) -> np.ndarray:
    """Half the square up to HUBER_DELTA, linear beyond."""
    size = np.abs(residuals)
    return np.where(size <= HUBER_DELTA, size**2 / 2, HUBER_DELTA * (size - HUBER_DELTA / 2))


class Objective:
    """The summed Huber loss of R runs as a function of theta, and its minimum."""

    def __init__(self, n: np.ndarray, d: np.ndarray, loss: np.ndarray, variant: np.ndarray, variants: tuple[str, ...]):
        """`n`, `d`, `loss` and `variant` (names) per run `[R]`; `variants[0]` is the baseline."""
        self.variants = variants
        self.log_loss = np.log(loss)
        self.n_mean, self.d_mean = np.log(n).mean(), np.log(d).mean()
        self.x, self.z = np.log(n) - self.n_mean, np.log(d) - self.d_mean
        self.index = np.array([variants.index(name) for name in variant])
        self._member = np.eye(len(variants))[self.index]  # [R, V]

    @property
    def parameters(self) -> int:
        return 3 + 2 * len(self.variants)

    def _terms(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The three terms of the law per sample and run, for `theta [S, P]`: E `[S, 1]`, size and tokens `[S, R]`."""
        variants = len(self.variants)
        size = np.exp(theta[:, 3 + self.index] - theta[:, 1:2] * self.x)
        tokens = np.exp(theta[:, 3 + variants + self.index] - theta[:, 2:3] * self.z)
        return np.exp(theta[:, :1]), size, tokens

    def log_law(self, theta: np.ndarray) -> np.ndarray:
        """Logarithm of the law at every run, `[S, R]` for `theta [S, P]`."""
        irreducible, size, tokens = self._terms(theta)
        return np.log(irreducible + size + tokens)

    def jacobian(self, theta: np.ndarray) -> np.ndarray:
        """Derivative of `log_law` by theta, `[S, R, P]`: a term's share of the law, times what moves its logarithm."""
        irreducible, size, tokens = self._terms(theta)
        law = irreducible + size + tokens
        size, tokens, variants = size / law, tokens / law, len(self.variants)
        result = np.empty((*law.shape, self.parameters))
        result[..., 0] = irreducible / law
        result[..., 1], result[..., 2] = -self.x * size, -self.z * tokens
        result[..., 3 : 3 + variants] = size[..., None] * self._member
        result[..., 3 + variants :] = tokens[..., None] * self._member
        return result

    def value(self, theta: np.ndarray) -> float:
        """The objective at one `theta [P]`."""
        return float(huber(self.log_loss - self.log_law(theta[None])[0]).sum())

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """`log(measured / law)` per run `[R]`."""
        return self.log_loss - self.log_law(theta[None])[0]

    def minimise(self) -> np.ndarray:
        """The minimum's theta: every pair of exponents of a wide grid with the linear part eliminated (variable
        projection), and Levenberg-Marquardt from the best of them."""
        starts = [self._project(alpha, beta) for alpha in _START_EXPONENTS for beta in _START_EXPONENTS]
        starts.sort(key=self.value)
        return min((self._levenberg_marquardt(start) for start in starts[:_REFINED_STARTS]), key=self.value)

    def minimise_otherwise(self, rng: np.random.Generator, starts: int = 4) -> np.ndarray:
        """The minimum's theta by BFGS from random starts, sharing nothing with `minimise` but the objective."""

        def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
            # By 1e6: at the objective's own scale, about 1e-3, BFGS takes any slope for a flat one and stops early,
            # which is how the exponents first published for Chinchilla went wrong (arXiv 2404.10102).
            residuals = self.residuals(theta)
            slope = -np.clip(residuals, -HUBER_DELTA, HUBER_DELTA) @ self.jacobian(theta[None])[0]
            return 1e6 * float(huber(residuals).sum()), 1e6 * slope

        variants, level, found = len(self.variants), self.log_loss.min(), []
        for _ in range(starts):
            shares = rng.dirichlet(np.ones(3) * 2)
            start = np.repeat(level + np.log(shares), (1, variants, variants))
            start = np.insert(start, 1, rng.uniform(0.15, 0.7, size=2))
            with np.errstate(over="ignore", invalid="ignore"):  # a line search may go far before it comes back
                found.append(minimize(scaled, start, jac=True, method="BFGS", options={"gtol": 1e-7}).x)
        return min((theta for theta in found if np.isfinite(theta).all()), key=self.value)

    def _project(self, alpha: float, beta: float) -> np.ndarray:
        """theta with the best E, a and b for given exponents, in relative least squares; none of them negative."""
        variants = len(self.variants)
        design = np.concatenate(
            [np.ones((len(self.x), 1)), np.exp(-alpha * self.x)[:, None] * self._member,
             np.exp(-beta * self.z)[:, None] * self._member], axis=1
        )  # fmt: skip
        weights = np.exp(-self.log_loss)
        linear, _ = nnls(design * weights[:, None], np.ones(len(weights)))
        linear = np.log(np.maximum(linear, 1e-4 * np.exp(self.log_loss.min())))
        return np.concatenate([linear[:1], [alpha, beta], linear[1 : 1 + variants], linear[1 + variants :]])

    def _levenberg_marquardt(
        self,
        start: np.ndarray,
        log_loss: np.ndarray | None = None,
        weights: np.ndarray | float = 1.0,
        tolerance: float = 1e-15,
    ) -> np.ndarray:
        """scipy's (MINPACK): a sum of squares whose terms are the Huber losses."""
        target = self.log_loss if log_loss is None else log_loss
        root = np.sqrt(weights)

        def terms(theta: np.ndarray) -> np.ndarray:
            residuals = target - self.log_law(theta[None])[0]
            return root * np.sign(residuals) * np.sqrt(2 * huber(residuals))

        def slopes(theta: np.ndarray) -> np.ndarray:
            residuals = target - self.log_law(theta[None])[0]
            return -(root * np.sqrt(_curvature(residuals)))[:, None] * self.jacobian(theta[None])[0]

        with np.errstate(over="ignore", invalid="ignore"), warnings.catch_warnings():
            # Of calls used up: from a poor start it may wander along a valley, and other starts find the minimum.
            warnings.simplefilter("ignore", RuntimeWarning)
            return leastsq(terms, start, Dfun=slopes, ftol=tolerance, xtol=tolerance, gtol=0, maxfev=4000)[0]

    def minimise_samples(
        self, start: np.ndarray, log_loss: np.ndarray, weights: np.ndarray, tolerance: float = 1e-8
    ) -> np.ndarray:
        """The minima `[S, P]` for S samples of the runs, from `start [P]`, close to them.

        Args:
            log_loss, weights: per sample and run `[S, R]`.
            tolerance: by how much of itself the objective may still fall.

        All samples go through Levenberg-Marquardt together, since scipy would fit them one by one, a hundred times
        slower; scipy takes those that have not converged.
        """
        at_once = max(1, _FLOATS_AT_ONCE // (len(self.x) * self.parameters))
        found = []
        for first in range(0, len(log_loss), at_once):
            part = slice(first, first + at_once)
            theta, left = self._minimise_batch(start, log_loss[part], weights[part], tolerance)
            for sample in left:
                theta[sample] = self._levenberg_marquardt(
                    theta[sample], log_loss[part][sample], weights[part][sample], tolerance
                )
            found.append(theta)
        return np.concatenate(found)

    def _minimise_batch(
        self, start: np.ndarray, log_loss: np.ndarray, weights: np.ndarray, tolerance: float, steps: int = 60
    ) -> tuple[np.ndarray, np.ndarray]:
        """Levenberg-Marquardt of all samples at once; returns theta `[S, P]` and the samples that need more steps."""
        theta = np.repeat(start[None], len(log_loss), axis=0)
        value = (weights * huber(log_loss - self.log_law(theta))).sum(axis=1)
        damping, active = np.full(len(theta), 1e-6), np.arange(len(theta))
        identity = np.eye(self.parameters)
        for _ in range(steps):
            residuals, jacobian = log_loss[active] - self.log_law(theta[active]), self.jacobian(theta[active])
            pull = weights[active] * np.clip(residuals, -HUBER_DELTA, HUBER_DELTA)
            slope = np.matmul(pull[:, None], jacobian)[:, 0]
            curvature = (weights[active] * _curvature(residuals))[..., None] * jacobian
            normal = np.matmul(jacobian.transpose(0, 2, 1), curvature)
            diagonal = np.einsum("spp->sp", normal)
            normal = normal + (damping[active, None] * diagonal + 1e-300)[:, :, None] * identity
            step = np.linalg.solve(normal, slope[..., None])[..., 0]
            trial = theta[active] + np.clip(step, -1, 1)
            tried = (weights[active] * huber(log_loss[active] - self.log_law(trial))).sum(axis=1)
            better = tried < value[active]
            done = (slope * step).sum(axis=1) < tolerance * value[active] + 1e-30
            theta[active[better]], value[active[better]] = trial[better], tried[better]
            damping[active] = np.where(better, np.maximum(damping[active] / 10, 1e-12), damping[active] * 10)
            active = active[~done & (damping[active] < 1e8)]
            if not len(active):
                break
        return theta, active

    def law(self, theta: np.ndarray) -> Law:
        """The law of one `theta [P]`, in its published form."""
        values = dict(zip(self.names(), self.quantities(theta[None])[0].tolist(), strict=True))
        others = self.variants[1:]
        return Law(
            **{name: values[name] for name in ("E", "A", "B", "alpha", "beta")},
            n_factors={name: values[f"n_factor.{name}"] for name in others},
            d_factors={name: values[f"d_factor.{name}"] for name in others},
            baseline=self.variants[0],
        )

    def names(self) -> tuple[str, ...]:
        """Of the columns of `quantities`."""
        others = self.variants[1:]
        factors = [f"{kind}_factor.{name}" for kind in "nd" for name in others]
        return ("E", "A", "B", "alpha", "beta", "compute_exponent", *factors)

    def quantities(self, theta: np.ndarray) -> np.ndarray:
        """What is reported, `[S, len(names())]`, from `theta [S, P]`."""
        variants = len(self.variants)
        alpha, beta = theta[:, 1], theta[:, 2]
        size, tokens = theta[:, 3 : 3 + variants], theta[:, 3 + variants :]
        columns = [
            np.exp(theta[:, 0]), np.exp(size[:, 0] + alpha * self.n_mean), np.exp(tokens[:, 0] + beta * self.d_mean),
            alpha, beta, alpha * beta / (alpha + beta),
        ]  # fmt: skip
        n_factors = np.exp(-(size[:, 1:] - size[:, :1]) / alpha[:, None])
        d_factors = np.exp(-(tokens[:, 1:] - tokens[:, :1]) / beta[:, None])
        return np.column_stack([*columns, n_factors, d_factors])


def _curvature(residuals: np.ndarray) -> np.ndarray:
    """Of a Huber loss as the square of a term: 1 inside, and outside what makes the square's slope right."""
    size = np.abs(residuals)
    return np.where(size <= HUBER_DELTA, 1.0, HUBER_DELTA / np.maximum(2 * size - HUBER_DELTA, HUBER_DELTA))
