"""Optimizer settings per parameter kind. Imports no torch.

Rates and decays come from `recipe.quantities.effective_rates`, which scales the recipe's by batch size and width; this
adds which algorithm takes a kind, and AdamW's betas. Source: arXiv 2606.02780, "Optimisation", and its reference
implementation.
"""

from __future__ import annotations

from dataclasses import dataclass

from bov_megatron.recipe import Recipe
from bov_megatron.recipe.parameters import KINDS
from bov_megatron.recipe.quantities import effective_rates

BETAS = {
    "embedding": (0.8, 0.995),
    "table": (0.8, 0.995),
    "output": (0.8, 0.96),
    "coefficient": (0.96, 0.95),
    "projection_coefficient": (0.8, 0.95),
    "smear": (0.8, 0.95),
}
"""AdamW betas per kind; those of `matrix` are a recipe field, as only runs with plain AdamW use them."""


@dataclass(frozen=True)
class GroupSettings:
    """Peak settings of all parameters of one kind; the schedules multiply `lr` (and Muon's `weight_decay`)."""

    algorithm: str
    """`muon` or `adamw`."""
    lr: float
    weight_decay: float
    betas: tuple[float, float] | None
    """AdamW's; None under Muon, whose momentum follows a schedule and whose beta2 is `optimizer.muon_beta2`."""


def group_settings(recipe: Recipe) -> dict[str, GroupSettings]:
    """Settings of every kind in `parameters.KINDS`.

    Muon takes only `matrix`. A table is two-dimensional too, but a lookup, not a linear map.
    """
    rates = effective_rates(recipe)
    matrix_betas = (recipe.optimizer.adamw_matrix_betas[0], recipe.optimizer.adamw_matrix_betas[1])
    settings = {}
    for kind in KINDS:
        by_muon = kind == "matrix" and recipe.optimizer.name == "muon"
        betas = None if by_muon else BETAS.get(kind, matrix_betas)
        algorithm = "muon" if by_muon else "adamw"
        settings[kind] = GroupSettings(algorithm, rates[kind]["lr"], rates[kind]["weight_decay"], betas)
    return settings
