"""The scaling law that is fitted: loss as a function of parameters and tokens, with a factor per variant on each."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class Law:
    """`L(N, D) = E + A / (k_N N)^alpha + B / (k_D D)^beta` (Hoffmann et al., arXiv 2203.15556), with k = 1 for the
    baseline: a variant with `n_factors[v] = 1.2` has the losses of a baseline with 1.2 times the parameters.

    L is in the unit of the losses that were fitted (nats per token, or bits per byte); N counts parameters by the
    convention that was fitted, D tokens.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    n_factors: dict[str, float] = field(default_factory=dict)
    d_factors: dict[str, float] = field(default_factory=dict)
    baseline: str = "baseline"

    @property
    def variants(self) -> tuple[str, ...]:
        """The baseline first, then the others."""
        return (self.baseline, *self.n_factors)

    @property
    def compute_exponent(self) -> float:
        """`alpha_C = alpha beta / (alpha + beta)`: along the best allocation, `L - E` falls as `C ** -alpha_C`."""
        return self.alpha * self.beta / (self.alpha + self.beta)

    def loss(self, n: ArrayLike, d: ArrayLike, variant: str | None = None) -> np.ndarray:
        """Predicted loss at `n` parameters and `d` tokens (broadcast) of `variant` (None: the baseline)."""
        of_baseline = variant is None or variant == self.baseline
        n_factor = 1.0 if of_baseline else self.n_factors[str(variant)]
        d_factor = 1.0 if of_baseline else self.d_factors[str(variant)]
        n, d = np.asarray(n, dtype=float), np.asarray(d, dtype=float)
        return self.E + self.A * (n_factor * n) ** -self.alpha + self.B * (d_factor * d) ** -self.beta
