"""What changes where a run goes on with another recipe than its checkpoint's. What may not change is refused before, by
compatibility.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bov_megatron.recipe import Recipe
from bov_megatron.recipe.identity import flatten

_FROM_HERE = "from the next step on"
_LENGTH = "the run's end; schedules that depend on it change from the next step on"
_WHERE = "where the samples are read; they must be the same"
_LAYOUT = "memory and speed; the same model up to rounding"
EFFECTS = {
    "name": "the run's name",
    "output_dir": "the run folder",
    "engine": _LAYOUT,
    "model": _LAYOUT,
    "parallel": _LAYOUT,
    "deepspeed": _LAYOUT,
    "train.steps": _LENGTH,
    "train.budget_flops": _LENGTH,
    "train.seed": "nothing: it is of the initial weights, and the checkpoint has its own",
    "train.micro_batch_size": _LAYOUT,
    "train.compile": "speed; the same model up to rounding",
    "train.max_minutes": "this start only",
    "train.fp8": f"rounding, {_FROM_HERE}",
    "train.deterministic": f"rounding, {_FROM_HERE}",
    "optimizer": _FROM_HERE,
    "data.path": _WHERE,
    "data.remote": _WHERE,
    "data.streams": _WHERE,
    "data.num_workers": "speed only",
    "data.prefetch_factor": "speed only",
    "validation.interval": _FROM_HERE,
    "validation.tokens": "other samples are scored: scores before and after don't compare",
    "validation.micro_batch_size": "memory and speed only",
    "validation.prompts": _FROM_HERE,
    "validation.prompt_tokens": _FROM_HERE,
    "evaluation": _FROM_HERE,
    "checkpoint": _FROM_HERE,
    "health": _FROM_HERE,
    "logging": _FROM_HERE,
}
"""By field or section, what a field that may change does to a run that goes on."""


@dataclass(frozen=True)
class Difference:
    """A field that differs from the checkpoint's recipe."""

    field: str
    stored: Any
    now: Any

    @property
    def effect(self) -> str:
        """What it changes, in words."""
        name = self.field
        while name and name not in EFFECTS:
            name = name.rpartition(".")[0]
        return EFFECTS.get(name, _FROM_HERE)


def find_differences(stored: dict, recipe: Recipe) -> list[Difference]:
    """Fields of `recipe` that the stored one has with another value, in the order of the recipe."""
    before, now = flatten(stored), flatten(recipe.to_dict())
    # A field that the checkpoint does not have is newer than it, and its default does what was done before.
    return [Difference(key, before[key], now[key]) for key in now if key in before and before[key] != now[key]]


def format_differences(differences: list[Difference]) -> str:
    """A table, without a line's end at its end."""
    rows = [("field", "checkpoint", "now", "changes")]
    rows += [(d.field, _short(d.stored), _short(d.now), d.effect) for d in differences]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  " + "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]])
        for row in rows
    )


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 40 else f"…{text[-39:]}"
