"""What a variant is worth: the factor of compute, or of time, that the baseline needs more for the same loss."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Multiplier:
    """`Sc = ((L_baseline - E) / (L_variant - E)) ** (1 / alpha_C)` at equal compute, each at its best allocation; above
    1 the variant is better. Arrays are over `flops`."""

    variant: str
    baseline: str
    n_column: str
    clock: bool
    """False: compute (Sc). True: wall-clock time (Sw), by the measured tokens per second."""
    flops: np.ndarray
    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray
    level: float
    carried: np.ndarray
    """Where the data carry it: within the budgets of both variants, with both best sizes within the sizes that ran."""
    at: float
    """The compute of the headline: the largest that the data carry (if none: the largest budget of both)."""
    value: tuple[float, float, float]
    """At `at`: estimate, low, high."""
