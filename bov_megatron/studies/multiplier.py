"""What a variant is worth: the factor of compute, or of time, that the baseline needs more for the same loss.

Shapes: S bootstrap draws (or 1), K points of compute, G trial sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.interpolate import interp1d

from bov_megatron.errors import StudyError
from bov_megatron.studies.fitting import Fit
from bov_megatron.studies.intervals import percentiles
from bov_megatron.studies.planning import describe_cost
from bov_megatron.studies.table import Runs

_POINTS = 25
_SIZES = 81
_BEYOND = 30.0
"""Trial sizes reach this factor beyond those that ran: a best size out there is found, and marked as not carried."""
_SHOWN_BEYOND = 10.0
"""The curve goes on to this multiple of the largest budget, marked as not carried."""
_SPEEDS_SEED = 0


@dataclass(frozen=True)
class Multiplier:
    """`Sc = ((L_baseline - E) / (L_variant - E)) ** (1 / alpha_C)` at equal compute, each at its best allocation; above
    1 the variant is better. Arrays are over `flops [K]`."""

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
    """The compute of the headline: the largest that the data carry."""
    value: tuple[float, float, float]
    """At `at`: estimate, low, high."""


class Costs:
    """What a variant's runs were measured to cost, as a function of size; between sizes interpolated in logarithms."""

    def __init__(self, runs: Runs):
        self.n = np.unique(runs.n)
        per_size = [runs.n == n for n in self.n]
        self.flops_per_parameter = np.array([np.median((runs.flops / runs.d / runs.n)[own]) for own in per_size])
        speed = runs.tokens_per_second
        self.flops_per_second = None
        if speed is not None and (np.isfinite(speed) & (speed > 0)).all():
            rates = [np.log(speed * runs.flops / runs.d)[own] for own in per_size]
            self.flops_per_second = np.exp([np.median(rate) for rate in rates])
            self._runs_per_size = [len(rate) for rate in rates]
            deviations = np.concatenate([rate - np.median(rate) for rate in rates])
            # As large as if the sizes' medians had not followed them.
            self._speed_noise = deviations * (len(runs) / max(len(runs) - len(rates), 1)) ** 0.5
        self.lowest, self.highest = float(runs.flops.min()), float(runs.flops.max())

    def per_token(self, n: np.ndarray) -> np.ndarray:
        """FLOPs per token of a model of `n` parameters; beyond the sizes that ran, the nearest two go on in a line."""
        if len(self.n) == 1:
            return n * self.flops_per_parameter[0]
        line = interp1d(np.log(self.n), np.log(self.flops_per_parameter), fill_value="extrapolate")
        return n * np.exp(line(np.log(n)))

    def rate(self, n: np.ndarray) -> np.ndarray:
        """FLOP/s of a run of a model of `n` parameters."""
        assert self.flops_per_second is not None
        return np.exp(np.interp(np.log(n), np.log(self.n), np.log(self.flops_per_second)))

    def draw_rates(self, n: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """`rate` of `n [S, K]` with speeds drawn anew S times: each size has as many runs as it had, with deviations
        from their median of any run of the variant. Where every size ran once they can't be seen, and are zero."""
        assert self.flops_per_second is not None
        noise = [np.median(rng.choice(self._speed_noise, (len(n), runs)), axis=1) for runs in self._runs_per_size]
        drawn = np.log(self.flops_per_second) + np.column_stack(noise)
        return np.exp([np.interp(np.log(own), np.log(self.n), rates) for own, rates in zip(n, drawn, strict=True)])


def multipliers(runs: Runs, fit: Fit) -> tuple[dict[str, list[Multiplier]], dict[str, str]]:
    """Per variant Sc and, where all runs' speeds are known, Sw; and per variant that the data can't carry, why.

    Compute is as measured (FLOPs of the runs, not 6 N D): at equal size variants differ in FLOPs per token.
    """
    found, refused = {}, {}
    for variant in runs.variants[1:]:
        try:
            found[variant] = _multipliers(runs, fit, variant)
        except StudyError as error:
            refused[variant] = str(error)
    return found, refused


def _multipliers(runs: Runs, fit: Fit, variant: str) -> list[Multiplier]:
    base, other = Costs(runs.of(runs.baseline)), Costs(runs.of(variant))
    lowest, highest = max(base.lowest, other.lowest), min(base.highest, other.highest)
    if lowest > highest * 1.05:
        raise StudyError(
            f"{variant} and {runs.baseline} share no budget ({other.lowest:.2g} to {other.highest:.2g} FLOPs against "
            f"{base.lowest:.2g} to {base.highest:.2g}); run {variant} once more at "
            f"{describe_cost(base.lowest)}"
        )
    # Both ends of what is carried are points of the curve.
    flops = np.geomspace(min(lowest, highest), highest, _POINTS)
    flops = np.concatenate([flops, np.geomspace(highest, _SHOWN_BEYOND * highest, 9)[1:]])
    estimate, sizes = compute_multiplier(fit.names, _quantities(fit), variant, flops, base, other)
    draws, drawn_sizes = compute_multiplier(fit.names, fit.draws, variant, flops, base, other)
    within = [(cost.n.min() <= n[0]) & (n[0] <= cost.n.max()) for cost, n in zip((base, other), sizes, strict=True)]
    carried = (flops <= highest * 1.0001) & within[0] & within[1]
    if not carried.any():
        raise StudyError(_no_best_size(runs, variant, flops[0], flops[_POINTS - 1], sizes, (base, other)))
    curves = [(estimate[0], draws)]
    if base.flops_per_second is not None and other.flops_per_second is not None:
        rng = np.random.default_rng(_SPEEDS_SEED)
        drawn = other.draw_rates(drawn_sizes[1], rng) / base.draw_rates(drawn_sizes[0], rng)
        curves.append((estimate[0] * other.rate(sizes[1][0]) / base.rate(sizes[0][0]), draws * drawn))
    results = []
    for clock, (curve, own) in enumerate(curves):
        low, high = percentiles(own, fit.level)
        headline = int(np.flatnonzero(carried)[-1])
        results.append(
            Multiplier(
                variant,
                runs.baseline,
                runs.n_column,
                bool(clock),
                flops,
                curve,
                low,
                high,
                fit.level,
                carried,
                float(flops[headline]),
                (float(curve[headline]), float(low[headline]), float(high[headline])),
            )  # fmt: skip
        )
    return results


def _quantities(fit: Fit) -> np.ndarray:
    """The fit's law as one row of `fit.draws`, `[1, Q]`."""
    law = fit.law
    factors = [*law.n_factors.values(), *law.d_factors.values()]
    return np.array([[law.E, law.A, law.B, law.alpha, law.beta, law.compute_exponent, *factors]])


def compute_multiplier(
    names: tuple[str, ...], quantities: np.ndarray, variant: str, flops: np.ndarray, base: Costs, other: Costs
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Sc `[S, K]`, and the best sizes of the baseline and of the variant `[S, K]` each.

    `quantities [S, Q]` are laws, with columns called `names`, as `Objective.quantities` returns them.
    """
    wanted = ("A", "B", "alpha", "beta", f"n_factor.{variant}", f"d_factor.{variant}")
    a, b, alpha, beta, n_factor, d_factor = quantities[:, [names.index(name) for name in wanted]].T
    base_loss, base_n = _best(a, b, alpha, beta, flops, base)
    other_loss, other_n = _best(a * n_factor**-alpha, b * d_factor**-beta, alpha, beta, flops, other)
    exponent = alpha * beta / (alpha + beta)
    return np.exp((base_loss - other_loss) / exponent[:, None]), (base_n, other_n)


def _best(
    a: np.ndarray, b: np.ndarray, alpha: np.ndarray, beta: np.ndarray, flops: np.ndarray, cost: Costs
) -> tuple[np.ndarray, np.ndarray]:
    """Smallest `log(L - E)` at each compute and the size that has it, both `[S, K]`."""
    n = np.geomspace(cost.n.min() / _BEYOND, cost.n.max() * _BEYOND, _SIZES)
    log_n, log_per_token = np.log(n), np.log(cost.per_token(n))
    step = log_n[1] - log_n[0]
    size = np.log(a)[:, None] - alpha[:, None] * log_n  # [S, G]
    tokens = np.log(b)[:, None] + beta[:, None] * log_per_token
    losses, sizes = np.empty((len(a), len(flops))), np.empty((len(a), len(flops)))
    for k, compute in enumerate(np.log(flops)):
        loss = np.logaddexp(size, tokens - beta[:, None] * compute)
        best = np.clip(loss.argmin(axis=1), 1, len(n) - 2)
        left, middle, right = (loss[np.arange(len(a)), best + i] for i in (-1, 0, 1))
        # The minimum of the parabola through three trial sizes, at most one step away.
        shift = np.clip((left - right) / (2 * np.maximum(left - 2 * middle + right, 1e-300)), -1, 1)
        losses[:, k] = middle - (left - right) * shift / 4
        sizes[:, k] = np.exp(log_n[best] + shift * step)
    return losses, sizes


def _no_best_size(runs: Runs, variant: str, lowest: float, highest: float, sizes, costs) -> str:
    """Which sizes would have to be run at the shared budgets."""
    missing = []
    for name, n, cost in zip((runs.baseline, variant), sizes, costs, strict=True):
        first, last = float(n[0][0]), float(n[0][_POINTS - 1])
        if first > cost.n.max() or last < cost.n.min():
            missing.append(f"{name} at N={first:.3g} to {last:.3g} (ran: {cost.n.min():.3g} to {cost.n.max():.3g})")
    what = "; ".join(missing) or f"{runs.baseline} and {variant} at the same budgets"
    return (
        f"the best sizes at {lowest:.2g} to {highest:.2g} FLOPs lie outside the sizes that ran; run {what}, "
        f"each with {describe_cost(lowest)}, or more"
    )
