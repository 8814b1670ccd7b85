"""What the runs of a study, or of a table, say: fits by every count of parameters, multipliers, isoFLOP parabolas."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from bov_megatron.errors import StudyError
from bov_megatron.studies.fitting import Fit, fit_runs
from bov_megatron.studies.isoflop import BIAS, CrossCheck, Parabola, cross_checks, parabolas
from bov_megatron.studies.multiplier import Multiplier, multipliers
from bov_megatron.studies.table import CONVENTIONS, STUDY_COLUMNS, Columns, Runs, runs_of

LEVEL, BOOTSTRAPS, SEED = 0.9, 2000, 0


@dataclass(frozen=True)
class Findings:
    """All may be empty: then `refusals` says why, and which runs would change that."""

    fits: Mapping[str, Fit] = field(default_factory=dict)
    """By the column that counts N; the first is the headline's."""
    multipliers: tuple[Multiplier, ...] = ()
    parabolas: tuple[Parabola, ...] = ()
    """By the headline's count of parameters."""
    cross_checks: tuple[CrossCheck, ...] = ()
    refusals: Mapping[str, str] = field(default_factory=dict)
    """Variant -> why the data can't carry its multiplier, and which runs would; all variants if there is no fit."""
    warnings: tuple[str, ...] = ()


def findings_of(
    runs: Sequence[Runs], *, level: float = LEVEL, bootstraps: int = BOOTSTRAPS, seed: int = SEED
) -> Findings:
    """Fit the same runs by one or several counts of parameters, the headline's first.

    Raises StudyError if the headline's runs don't determine the law.
    """
    if not 0.5 <= level < 1:
        raise StudyError(f"--level {level}: must be a share of at least 0.5 and below 1, e.g. 0.9")
    if bootstraps < 100:
        raise StudyError(f"--bootstraps {bootstraps}: must be at least 100; ends of intervals need as many")
    fits: dict[str, Fit] = {}
    found: list[Multiplier] = []
    refusals: dict[str, str] = {}
    warnings: list[str] = []
    for counted in runs:
        try:
            fit = fit_runs(counted, level=level, bootstraps=bootstraps, seed=seed)
        except StudyError as error:
            if not fits:
                raise
            warnings.append(f"by {counted.n_column}: {error}")
            continue
        fits[counted.n_column] = fit
        own, refused = multipliers(counted, fit)
        found += [multiplier for per_variant in own.values() for multiplier in per_variant]
        for variant, reason in refused.items():
            refusals.setdefault(variant, reason)
        warnings += [text for text in fit.warnings if text not in warnings]
    first = runs[0]
    curves = parabolas(first)
    checks = cross_checks(curves, fits[first.n_column].law)
    return Findings(fits, tuple(found), tuple(curves), tuple(checks), refusals, tuple(warnings))


def findings_of_results(
    results: pd.DataFrame,
    baseline: str,
    *,
    loss: str = "loss",
    conventions: Sequence[str] = tuple(CONVENTIONS),
    drop_highest: int = 0,
    level: float = LEVEL,
    bootstraps: int = BOOTSTRAPS,
    seed: int = SEED,
) -> Findings:
    """Findings of a study's table of results, under all `conventions`, the first of them the headline's.

    Runs without a loss are left out with a warning. What can't be fitted is refused in `refusals`, for each variant.
    """
    try:
        runs = [
            runs_of(
                results,
                Columns(n=n, loss=loss, **STUDY_COLUMNS),
                baseline=baseline,
                drop_highest=drop_highest,
                drop_failed=True,
            )  # fmt: skip
            for n in conventions
        ]
        findings = findings_of(runs, level=level, bootstraps=bootstraps, seed=seed)
    except StudyError as error:
        return Findings(refusals=dict.fromkeys(dict.fromkeys(results["variant"]), str(error)))
    left_out = sorted(set(results["cell"]) - set(runs[0].name))
    if left_out:
        text = f"{len(left_out)} finished run(s) left out, without {loss} or dropped: {', '.join(left_out[:5])}"
        return dataclasses.replace(findings, warnings=(text, *findings.warnings))
    return findings


def as_json(findings: Findings) -> dict[str, Any]:
    """Plain values: the headline's fit at the top, every fit under `fits`, curves as lists; NaN is null."""
    headline = next(iter(findings.fits), None)
    result: dict[str, Any] = {}
    if headline is not None:
        result |= _fit_json(findings.fits[headline])
        result["multiplier"] = {
            m.variant: _multiplier_json(m) for m in findings.multipliers if m.n_column == headline and not m.clock
        }
        result["wall_clock_multiplier"] = {
            m.variant: _multiplier_json(m) for m in findings.multipliers if m.n_column == headline and m.clock
        }
    result["fits"] = {name: _fit_json(fit) for name, fit in findings.fits.items()}
    result["multipliers"] = [_multiplier_json(m) for m in findings.multipliers]
    result["isoflop"] = {
        "parabolas": [dataclasses.asdict(parabola) for parabola in findings.parabolas],
        "exponents": [dataclasses.asdict(check) for check in findings.cross_checks],
        "note": BIAS,
    }
    result["refusals"] = dict(findings.refusals)
    result["warnings"] = list(findings.warnings)
    return _plain(result)


def _fit_json(fit: Fit) -> dict[str, Any]:
    law = dataclasses.asdict(fit.law)
    values = dataclasses.asdict(dataclasses.replace(fit, draws=np.empty(0)))
    del values["draws"], values["names"], values["law"]
    return {**law, "compute_exponent": fit.law.compute_exponent, **values}


def _multiplier_json(multiplier: Multiplier) -> dict[str, Any]:
    estimate, low, high = multiplier.value
    values = dataclasses.asdict(multiplier)
    curve = {name: values.pop(name) for name in ("flops", "estimate", "low", "high", "carried")}
    inside = multiplier.flops[multiplier.carried]
    del values["value"]
    return {
        **values, "estimate": estimate, "interval": [low, high],
        "carried_flops": [float(inside.min()), float(inside.max())], "curve": curve,
    }  # fmt: skip


def _plain(value: Any) -> Any:
    """Python's own numbers and containers, NaN and infinities as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
