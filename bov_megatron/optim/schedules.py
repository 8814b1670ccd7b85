"""Schedules of the learning rate and of Muon's momentum and decay, as functions of the step.

`step` is 0-based: the number of updates already applied. A resumed run needs no other state to continue a schedule.
Source: arXiv 2606.02780, "Optimisation".
"""

from __future__ import annotations

import math

from bov_megatron.recipe import OptimizerConfig


def lr_multiplier(step: int, total_steps: int, config: OptimizerConfig, moments_since: int = 0) -> float:
    """Factor on every learning rate at `step`: linear warmup, constant, linear warmdown.

    The first update has factor 1 / warmup_steps, not 0. The warmdown covers the last `warmdown_ratio` of the run and
    would reach `final_lr_fraction` at `total_steps`, one step after the last. Where the optimizer's moments began at a
    later step, `moments_since`, the factor is warmed up again from there.
    """
    if moments_since and step - moments_since < config.warmup_steps:
        return (step - moments_since + 1) / config.warmup_steps * lr_multiplier(step, total_steps, config)
    warmdown_steps = _warmdown_steps(total_steps, config)
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if warmdown_steps == 0 or step <= total_steps - warmdown_steps:
        return 1.0
    remaining = max(0, total_steps - step) / warmdown_steps
    return remaining + (1 - remaining) * config.final_lr_fraction


def muon_momentum(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Muon's momentum at `step`: start -> peak over `momentum_warmup_steps`, peak -> final over the warmdown.

    Where these overlap in a short run, the rise comes first, as in the reference.
    """
    warmdown_steps = _warmdown_steps(total_steps, config)
    start, peak, final = config.momentum_start, config.momentum_peak, config.momentum_final
    if step < config.momentum_warmup_steps:
        return _mix(start, peak, step / config.momentum_warmup_steps)
    if warmdown_steps == 0 or step < total_steps - warmdown_steps:
        return peak
    return _mix(peak, final, min(1.0, (step - total_steps + warmdown_steps) / warmdown_steps))


def muon_decay_multiplier(step: int, total_steps: int) -> float:
    """Factor on Muon's weight decay at `step`: half a cosine from 1 to 0. AdamW's decays are constant."""
    return 0.5 * (1 + math.cos(math.pi * min(step, total_steps) / total_steps))


def _warmdown_steps(total_steps: int, config: OptimizerConfig) -> int:
    if total_steps < 1:
        raise ValueError(f"total_steps={total_steps}: a schedule needs at least one step")
    return round(config.warmdown_ratio * total_steps)


def _mix(start: float, end: float, share: float) -> float:
    return (1 - share) * start + share * end
