"""Findings as plain text, the answer first."""

from __future__ import annotations

from collections.abc import Iterator

from bov_megatron.studies.findings import Findings
from bov_megatron.studies.fitting import Fit
from bov_megatron.studies.isoflop import BIAS
from bov_megatron.studies.multiplier import Multiplier


def format_findings(findings: Findings) -> str:
    """Several lines: multipliers, laws with intervals, checks, warnings."""
    lines = [*_multipliers(findings)]
    for fit in findings.fits.values():
        lines += ["", *_fit(fit)]
    if findings.cross_checks:
        lines += ["", f"IsoFLOP cross-check, best N ~ C^a ({BIAS}):"]
        lines += [
            f"  {check.variant:20} parabolas {check.parabolas:.3f} ± {check.standard_error:.3f}, law {check.law:.3f}"
            for check in findings.cross_checks
        ]
    lines += ["", *(f"warning: {text}" for text in findings.warnings)] if findings.warnings else []
    return "\n".join(lines).strip()


def _multipliers(findings: Findings) -> Iterator[str]:
    if findings.multipliers:
        level = findings.multipliers[0].level
        yield f"Multipliers: what the baseline needs more for the same loss, with {level:.0%} intervals"
        yield from (f"  {_multiplier(multiplier)}" for multiplier in findings.multipliers)
    for reason in dict.fromkeys(findings.refusals.values()):
        variants = ", ".join(variant for variant, own in findings.refusals.items() if own == reason)
        yield f"No multiplier for {variants}: {reason}" if findings.fits else f"No fit: {reason}"


def _multiplier(multiplier: Multiplier) -> str:
    estimate, low, high = multiplier.value
    kind = "time   " if multiplier.clock else "compute"
    inside = multiplier.flops[multiplier.carried]
    return (
        f"{multiplier.variant:20} {kind} × {estimate:.3f} ({low:.3f} to {high:.3f}) at {multiplier.at:.2g} FLOPs, "
        f"N = {multiplier.n_column}; carried from {inside.min():.2g} to {inside.max():.2g} FLOPs"
    )


def _fit(fit: Fit) -> Iterator[str]:
    yield (
        f"L(N, D) = E + A/(k_N N)^alpha + B/(k_D D)^beta, N = {fit.n_column}, L = {fit.loss_column}: {fit.runs} runs, "
        f"objective {fit.objective:.6g}"
    )
    law = fit.law
    values = {"E": law.E, "A": law.A, "B": law.B, "alpha": law.alpha, "beta": law.beta}
    values["compute_exponent"] = law.compute_exponent
    values |= {f"n_factor.{name}": factor for name, factor in law.n_factors.items()}
    values |= {f"d_factor.{name}": factor for name, factor in law.d_factors.items()}
    for name, value in values.items():
        low, high = fit.intervals[name]
        yield f"  {name:20} {value:<12.6g} {fit.level:.0%} interval {low:.6g} to {high:.6g}"
    if len(fit.separate) > 1:
        for name, own in fit.separate.items():
            yield (
                f"  {name} alone: E {own.E:.4g}, A {own.A:.4g}, B {own.B:.4g}, alpha {own.alpha:.4g}, "
                f"beta {own.beta:.4g}"
            )
    agrees = "agrees" if fit.checked.agrees else f"DISAGREES: objective {fit.checked.objective:.6g}"
    yield f"  second method ({fit.checked.method}): {agrees}"
    if fit.lack_of_fit is not None:
        test = fit.lack_of_fit
        yield (
            f"  lack of fit: F{test.degrees} = {test.statistic:.3g}, p = {test.p_value:.2g}; seed noise "
            f"{test.seed_noise:.3%}, misfit beyond it {test.misfit:.3%}"
        )
    if fit.holdout is not None:
        held = fit.holdout
        yield (
            f"  hold-out: {len(held.runs)} runs from {held.flops:.2g} FLOPs up, predicted by the others: error "
            f"{held.error:.3%} (mean {held.bias:+.3%})"
        )
