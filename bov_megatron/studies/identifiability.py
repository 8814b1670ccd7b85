"""Which tables of runs carry a fit, and which runs would make one that doesn't."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bov_megatron.errors import StudyError
from bov_megatron.studies.planning import describe_cost
from bov_megatron.studies.table import Runs

_LEVELS = 3
"""Sizes, and token counts, that a power law with an offset needs: one point for each of its three numbers."""
_SAME = 0.02
"""Values of N, or of D, closer than this (relative) are one value."""
_LINE = 0.98
"""Correlation of log N and log D beyond which runs lie on one line, and the two terms cannot be told apart."""


@dataclass(frozen=True)
class Proposal:
    """A run that would help, and what it costs."""

    variant: str
    n: float
    d: float
    flops: float

    def __str__(self) -> str:
        return f"{self.variant} N={self.n:.3g} D={self.d:.3g} ({self.flops:.2g} FLOPs)"


def require_carried(runs: Runs) -> None:
    """Refuse runs that don't determine the law, in a StudyError that says why, which runs would and what they cost."""
    problem, proposals = shortcoming(runs)
    if problem:
        raise StudyError(f"these runs don't carry a fit: {problem}; {_advice(proposals)}")


def shortcoming(runs: Runs) -> tuple[str, list[Proposal]]:
    """Why the runs don't determine the law ('' if they do), and runs that would change that."""
    sizes, tokens = _levels(runs.n), _levels(runs.d)
    if len(sizes) < _LEVELS:
        return f"{len(sizes)} size(s) where alpha, A and E need {_LEVELS}", _more_sizes(runs, sizes)
    if len(tokens) < _LEVELS:
        return f"{len(tokens)} token count(s) where beta, B and E need {_LEVELS}", _more_tokens(runs)
    line = np.corrcoef(np.log(runs.n), np.log(runs.d))[0, 1]
    if abs(line) > _LINE:
        what = (
            "they have one budget, so that D follows from N"
            if len(_levels(runs.n * runs.d, 0.1)) == 1
            else "N and D lie on one line, so that their terms can't be told apart"
        )
        return what, _more_tokens(runs)
    for variant in runs.variants[1:]:
        own = runs.of(variant)
        if min(len(_levels(own.n)), len(_levels(own.d))) < 2 or len(own) < 3:
            return (
                f"variant {variant} has {len(own)} run(s) at {len(_levels(own.n))} size(s) and {len(_levels(own.d))} "
                "token count(s), where its two factors need two of each",
                _missing_cells(runs, variant),
            )
    parameters = 3 + 2 * len(runs.variants)
    distinct = int(runs.cells().max()) + 1
    if distinct < parameters + 2:
        return (
            f"{distinct} different runs for {parameters} parameters, where {parameters + 2} are the least",
            _more_tokens(runs),
        )
    return "", []


def _levels(values: np.ndarray, same: float = _SAME) -> np.ndarray:
    """Values that differ by more than `same` (relative), ascending."""
    values = np.sort(values)
    return values[np.r_[True, np.diff(np.log(values)) > same]]


def _flops(runs: Runs, variant: str, n: float, d: float) -> float:
    """Of a run that is not there, by the FLOPs per token of the variant's run of the nearest size."""
    own = runs.of(variant)
    near = np.argmin(np.abs(np.log(own.n / n)))
    return float(own.flops[near] / own.d[near] * (n / own.n[near]) * d)


def _more_sizes(runs: Runs, sizes: np.ndarray) -> list[Proposal]:
    """Smaller sizes, which are the cheap ones, with as many tokens as the runs that are there."""
    count = _LEVELS + 1 - len(sizes)
    return [
        Proposal(variant, sizes[0] / 2**k, d, _flops(runs, variant, sizes[0] / 2**k, d))
        for variant in runs.variants
        for k in range(1, count + 1)
        for d in (float(runs.d.min()), float(runs.d.max()))
    ]


def _more_tokens(runs: Runs) -> list[Proposal]:
    """The sizes that are there with a quarter and a sixteenth of their tokens."""
    proposals = []
    for variant in runs.variants:
        own = runs.of(variant)
        for n in _levels(own.n):
            largest = float(own.d[np.abs(np.log(own.n / n)) <= _SAME].max())
            proposals += [Proposal(variant, n, largest / k, _flops(runs, variant, n, largest / k)) for k in (4, 16)]
    return proposals


def _missing_cells(runs: Runs, variant: str) -> list[Proposal]:
    """The baseline's smallest and largest runs of its smallest and largest size, for the variant."""
    base = runs.of(runs.baseline)
    proposals = []
    for n in (base.n.min(), base.n.max()):
        for d in (base.d[base.n == n].min(), base.d[base.n == n].max()):
            proposals.append(Proposal(variant, float(n), float(d), _flops(runs, runs.baseline, n, d)))
    return proposals


def _advice(proposals: list[Proposal], shown: int = 4) -> str:
    listed = ", ".join(map(str, proposals[:shown]))
    more = f" and {len(proposals) - shown} more" if len(proposals) > shown else ""
    return f"run {listed}{more}; in all {describe_cost(sum(p.flops for p in proposals))}"
