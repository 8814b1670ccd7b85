"""What a report says in words: the answer, how far to trust it, what its figures show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from bov_megatron.studies.fitting import Fit
from bov_megatron.studies.isoflop import CrossCheck
from bov_megatron.studies.multiplier import Multiplier
from bov_megatron.studies.report.tables import SCORES, fixed, interval, overall_differences, scientific, significant
from bov_megatron.studies.table import CONVENTIONS


def percent(level: float) -> str:
    return f"{100 * level:.0f}%"


def answer(variant: str, baseline: str, multipliers: Sequence[Multiplier], refusal: str) -> list[str]:
    """The answer for one variant; `refusal` says why there is none. Multipliers: the headline convention first."""
    compute = [m for m in multipliers if m.variant == variant and not m.clock]
    if not compute:
        return [f"{variant}: these runs can't carry a compute multiplier over {baseline}.", _sentence(refusal)]
    first = compute[0]
    estimate, low, high = interval(*first.value)
    sentences = [
        f"{variant} is worth {estimate} times the compute of {baseline} ({percent(first.level)} interval {low} to "
        f"{high}) at {scientific(first.at)} FLOPs."
    ]
    if first.value[1] <= 1 <= first.value[2]:
        sentences.append(
            f"The interval includes 1: these runs don't show a difference between {variant} and {baseline}."
        )
    values = [m.value[0] for m in compute]
    if len(compute) > 1:
        smallest, largest = fixed(min(values), 2), fixed(max(values), 2)
        span = f"is {smallest}" if smallest == largest else f"goes from {smallest} to {largest}"
        sentences.append(
            f"What N counts there: {CONVENTIONS[first.n_column]}. Over {len(compute)} ways of counting parameters the "
            f"estimate {span}."
        )
    clocks = [m for m in multipliers if m.variant == variant and m.clock]
    if clocks:
        estimate, low, high = interval(*clocks[0].value)
        sentences.append(
            f"In wall-clock time, at the tokens per second measured in these runs: {estimate} ({low} to {high})."
        )
    return sentences


def _sentence(text: str) -> str:
    """An error's message as a sentence."""
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def overall(results: pd.DataFrame, baseline: str, score: str, level: float) -> list[str]:
    """One sentence per variant: the mean difference to the baseline over all sizes and budgets."""
    sentences = []
    for row in overall_differences(results, baseline, score, level).itertuples():
        interval = (
            ""
            if np.isnan(row.low)
            else f" ({percent(level)} interval {fixed(row.low, 4, True)} to {fixed(row.high, 4, True)})"
        )
        count = "1 point" if row.cells == 1 else f"{row.cells} points (size and budget)"
        sentences.append(
            f"{row.Index}: {fixed(row.difference, 4, True)} {SCORES[score]} against {baseline} on average{interval}; "
            f"lower in {row.better} of {count}."
        )
    return sentences


def checks(fit: Fit) -> list[str]:
    """How far to trust a fit: second method, lack of fit, hold-out, warnings."""
    second = fit.checked
    agreement = "finds the same optimum" if second.agrees else "finds ANOTHER optimum: do not use the numbers"
    sentences = [
        f"{fit.runs} runs, {fit.clusters} groups drawn together in the bootstrap (same size and seed).",
        f"The optimum was checked by a second method ({second.method}), which {agreement} "
        f"(objective {significant(fit.objective, 6)} against {significant(second.objective, 6)}).",
    ]
    if fit.lack_of_fit is None:
        sentences.append("No cell ran with two seeds: whether the law fits as well as noise allows can't be tested.")
    else:
        test = fit.lack_of_fit
        verdict = (
            "misses the means by more than seeds explain" if test.p_value < 0.05 else "fits as well as seeds allow"
        )
        sentences.append(
            f"Lack of fit: F({test.degrees[0]}, {test.degrees[1]}) = {significant(test.statistic)}, "
            f"p = {significant(test.p_value, 2)}: the law {verdict}. Seeds differ by "
            f"{significant(100 * test.seed_noise, 2)}% of the loss, the law misses by "
            f"{significant(100 * test.misfit, 2)}% beyond that."
        )
    if fit.holdout is None:
        sentences.append("Too few runs below the largest budget to predict those at it.")
    else:
        held = fit.holdout
        sentences.append(
            f"Predicting {len(held.runs)} runs from {scientific(held.flops)} FLOPs on from all others: "
            f"{significant(100 * held.error, 2)}% root mean square error, "
            f"{fixed(100 * held.bias, 2, True)}% on average."
        )
    return sentences


def isoflop(checks: Sequence[CrossCheck]) -> list[str]:
    """What parabolas say of the best sizes, beside what the law says."""
    return [
        f"{check.variant}: the best size grows as compute to the {fixed(check.parabolas, 2)} by the parabolas, to the "
        f"{fixed(check.law, 2)} by the law."
        for check in checks
    ]
