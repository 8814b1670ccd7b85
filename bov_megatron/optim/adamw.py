"""torch's AdamW with settings per parameter kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bov_megatron.optim.groups import GroupSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names for AdamW's state, without the step."""


def make_adamw(
    weights: Sequence[tuple[str, Tensor]], settings: dict[str, GroupSettings], eps: float
) -> torch.optim.AdamW | None:
    """Fused AdamW over (kind, weight) pairs, one group per kind; None without weights."""
    groups = []
    for kind, s in settings.items():
        params = [weight for weight_kind, weight in weights if weight_kind == kind]
        group = {"params": params, "kind": kind, "lr": s.lr, "betas": s.betas, "weight_decay": s.weight_decay}
        groups += [group] if params else []
    return torch.optim.AdamW(groups, eps=eps, fused=True) if groups else None


def allocate_state(adamw: torch.optim.AdamW, weights: Iterable[Tensor]) -> None:
    """Allocate the state that torch allocates in the first step, so that a checkpoint can be loaded before it."""
    for weight in weights:  # each with a step tensor of its own: a shared one would be incremented once per weight
        adamw.state[weight] = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
        adamw.state[weight].update({name: torch.zeros_like(weight) for name in MOMENTS})


def set_schedule(adamw: torch.optim.AdamW, learning_rates: dict[str, float], updates: int) -> None:
    """Set each group's learning rate by its kind, and for the bias correction the number of updates in the moments."""
    for group in adamw.param_groups:
        group["lr"] = learning_rates[group["kind"]]
    for state in adamw.state.values():
        state["step"].fill_(updates)
