"""IsoFLOP parabolas: at one compute budget, loss as a quadratic in the logarithm of the size. A plot and a cross-check;
the law is what is reported, since the parabola's minimum is biased even without noise (arXiv 2603.22339)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
