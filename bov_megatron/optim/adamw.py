"""torch's AdamW with the settings of every parameter kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from bov_megatron.optim.groups import GroupSettings

MOMENTS = ("exp_avg", "exp_avg_sq")
"""torch's names for AdamW's state beside the step."""


def make_adamw(
    weights: Sequence[tuple[str, Tensor]], settings: dict[str, GroupSettings], eps: float
) -> torch.optim.AdamW | None:
    """Fused AdamW over (kind, weight) pairs, one group per kind; None without weights."""
    groups = []
    for kind, s in settings.items():
        params = [weight for its_kind, weight in weights if its_kind == kind]
        group = {"params": params, "kind": kind, "lr": s.lr, "betas": s.betas, "weight_decay": s.weight_decay}
        groups += [group] if params else []
    return torch.optim.AdamW(groups, eps=eps, fused=True) if groups else None


def allocate_state(adamw: torch.optim.AdamW, weights: Iterable[Tensor]) -> None:
    """Make the state that torch would make in the first step: a checkpoint may have to be loaded before that.

    Every weight gets a step tensor of its own: a shared one would count once per weight.
    """
    for weight in weights:
        adamw.state[weight] = {"step": torch.zeros((), dtype=torch.float32, device=weight.device)}
        adamw.state[weight].update({name: torch.zeros_like(weight) for name in MOMENTS})


def set_schedule(adamw: torch.optim.AdamW, learning_rates: dict[str, float], step: int) -> None:
    """Each group's learning rate by its kind, and each weight's count of updates so far."""
    for group in adamw.param_groups:
        group["lr"] = learning_rates[group["kind"]]
    for state in adamw.state.values():
        state["step"].fill_(step)
