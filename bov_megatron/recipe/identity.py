"""What makes two runs the same run: the fields of a recipe that decide about its result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from bov_megatron.recipe.fields import Recipe

EXECUTION = (
    *("name", "output_dir", "parallel", "deepspeed", "checkpoint", "logging", "validation.interval"),
    *(
        "train.max_minutes",
        "train.micro_batch_size",
        "train.compile",
        "validation.micro_batch_size",
        "health.hang_minutes",
    ),
    *("validation.prompts", "validation.prompt_tokens", "evaluation"),
    *("data.remote", "data.num_workers", "data.prefetch_factor"),
    *("model.value.lookup", "model.value.table_partition", "model.value.table_memory"),
)
"""Fields and sections that say where and how a run is executed, watched and stored. They change rounding at most."""


def recipe_digest(recipe: Recipe) -> str:
    """Sixteen hexadecimal digits over all fields that decide about the run's result; see EXECUTION for the others."""
    text = json.dumps(_deciding(recipe), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def deciding_differences(stored: dict[str, Any], recipe: Recipe) -> dict[str, tuple[Any, Any]]:
    """Fields that decide about a run's result and differ: name -> (stored value, value in `recipe`).

    Args:
        stored: `to_dict()` of another recipe, as in a run's recipe.yaml. Fields that it lacks, such as those of later
            versions, have their defaults.
    """
    before, now = _deciding(Recipe()) | _without_execution(flatten(stored)), _deciding(recipe)
    return {name: (before.get(name), now.get(name)) for name in before | now if before.get(name) != now.get(name)}


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys such as `model.value.source`; lists are values."""
    flat = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _deciding(recipe: Recipe) -> dict[str, Any]:
    # As flatten(recipe.to_dict()), in a tenth of its time: a study has thousands of recipes.
    fields: dict[str, Any] = {}
    sections: list[tuple[str, Any]] = [("", recipe)]
    while sections:
        prefix, section = sections.pop()
        for key, value in vars(section).items():
            if dataclasses.is_dataclass(value):
                sections.append((f"{prefix}{key}.", value))
            else:
                items = isinstance(value, list) and any(map(dataclasses.is_dataclass, value))
                fields[prefix + key] = [dataclasses.asdict(item) for item in value] if items else value
    return _without_execution(fields)


def _without_execution(fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if not f"{name}.".startswith(_SECTIONS)}


_SECTIONS = tuple(f"{name}." for name in EXECUTION)
