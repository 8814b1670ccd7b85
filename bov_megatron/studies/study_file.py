"""What a study file says, read and checked: its keys, variants, sizes, budgets. docs/use/studies.md describes them."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.errors import RecipeError, StudyError
from bov_megatron.recipe.limits import nearest
from bov_megatron.recipe.loading import StrictLoader, build
from bov_megatron.studies import dial

FIXED = {
    "name": "cells name their runs",
    "output_dir": "use the study's own output_dir",
    "train.seed": "use the study's seeds",
    "data.shuffle_seed": "use the study's seeds",
    "train.steps": "use the study's budgets",
    "train.budget_flops": "use the study's budgets",
}
"""Fields of a recipe that the study itself sets in every cell, and what to use instead."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass
class Variant:
    """What distinguishes a variant: fields of the recipe, and what a field cannot say."""

    match_parameters: str | None = None
    """Widen the feed-forward layers until there are as many parameters (tables included) as this variant has."""
    match_tokens: str | None = None
    """Train on as many tokens as this variant does at the same size and budget."""
    aspect_ratio: int | None = None
    """Instead of the size's."""
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Size:
    """A model's shape: the depth that it follows from, or a recipe that has it."""

    depth: int | None = None
    aspect_ratio: int = dial.ASPECT_RATIO
    head_dim: int = dial.HEAD_DIM
    recipe: str | None = None
    """Path of a recipe, relative to the study file, instead of the study's base."""
    world_size: int | None = None
    """Ranks (GPUs) of a run of this size; default: one copy of the model."""
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budgets:
    flops: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)

    def by_name(self) -> dict[str, tuple[str, float]]:
        """Name -> (`flops` or `tokens`, amount)."""
        named = [(number(amount), "flops", amount) for amount in self.flops]
        named += [(number(amount) + "tokens", "tokens", amount) for amount in self.tokens]
        if not named:
            raise StudyError(f"budgets: there is none; {_EXAMPLES['budgets']}")
        for name, _, amount in named:
            if amount <= 0:
                raise StudyError(f"budgets: {amount} must be greater than 0")
            if [other for other, _, _ in named].count(name) > 1:
                raise StudyError(f"budgets: {name} is listed twice; list it once")
        return {name: (kind, amount) for name, kind, amount in named}


@dataclass
class Selection:
    """Some of the combinations; a list that is left out means all."""

    variants: list[str] | None = None
    sizes: list[str] | None = None
    budgets: list[str | float] | None = None
    seeds: list[int] | None = None


@dataclass(kw_only=True)
class _Plain:
    """The keys of a study file that are a single value, or a list of numbers."""

    base: str
    """Path of the recipe that every cell builds on, relative to the study file."""
    description: str = ""
    baseline: str = ""
    """Default: the first variant."""
    output_dir: str = "runs/studies/{name}"
    seeds: list[int] = field(default_factory=lambda: [0])


@dataclass(kw_only=True)
class StudyFile(_Plain):
    """A study file; the keys of the YAML are these names."""

    variants: dict[str, Variant]
    sizes: dict[str, Size]
    budgets: dict[str, tuple[str, float]]
    """As of `Budgets.by_name`."""
    overrides: dict[str, Any]
    """Fields of the recipe, for every cell."""
    cells: list[Selection]


def number(amount: float) -> str:
    """`1.5e18`: a number as cells' names have it."""
    mantissa, exponent = f"{amount:.6e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def override(field: str, value: Any) -> str:
    """`section.field=value`, the value in YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return f"{field}={text.strip().removesuffix('...').strip()}"


def read_study(path: Path) -> StudyFile:
    """The checked contents of a study file. Raises StudyError."""
    values = _read_yaml(path)
    known = [f.name for f in dataclasses.fields(StudyFile)]
    for key in values:
        if key not in known:
            raise StudyError(f"unknown key '{key}'{nearest(key, known)}")
    for key in ("base", "variants", "sizes", "budgets"):
        if not values.get(key):
            raise StudyError(f"'{key}' is missing; {_EXAMPLES[key]}")
    sections = {
        "variants": {name: _entry(Variant, entry, f"variants.{name}") for name, entry in _named(values, "variants")},
        "sizes": {name: _size(name, entry) for name, entry in _named(values, "sizes")},
        "budgets": _build(Budgets, values["budgets"], "budgets.").by_name(),
        "overrides": _fields(values.get("overrides") or {}, "overrides"),
        "cells": _selections(values["cells"]) if "cells" in values else [Selection()],
    }
    plain = _build(_Plain, {key: value for key, value in values.items() if key not in sections}, "")
    file = StudyFile(**vars(plain), **sections)
    file.baseline = file.baseline or next(iter(file.variants))
    _check_names(file)
    return file


_EXAMPLES = {
    "base": "name the recipe that every cell builds on, e.g. base: ../135m_baseline.yaml",
    "variants": "e.g. variants: {baseline: {}, bank: {model.value.source: bank}}",
    "sizes": "e.g. sizes: {d12: {depth: 12}}",
    "budgets": "e.g. budgets: {flops: [1.5e18]} or {tokens: [2e9]}",
}


def _read_yaml(path: Path) -> dict:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        others = sorted(p.name for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, others, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise StudyError(f"does not exist; {hint}in its folder: {', '.join(others) or 'no study'}") from None
    except OSError as error:
        raise StudyError(f"cannot be read ({error.strerror}); name a study file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise StudyError("must be a mapping with base, variants, sizes and budgets")
    return values


def _named(values: dict, section: str) -> Iterable[tuple[str, dict]]:
    entries = values[section]
    if not isinstance(entries, dict):
        raise StudyError(f"'{section}' must map names to settings; {_EXAMPLES[section]}")
    for name, entry in entries.items():
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise StudyError(
                f"{section}: the name {name!r} is not letters, digits, '_', '.' and '-' (quote it if it is a number)"
            )
        if entry is not None and not isinstance(entry, dict):
            raise StudyError(f"{section}.{name}={entry!r}: must be a mapping; {_EXAMPLES[section]}")
        yield name, entry or {}


def _entry(cls: type, entry: dict, where: str) -> Any:
    """Dataclass `cls` from a mapping in which keys with a dot are fields of the recipe."""
    fields = {key: value for key, value in entry.items() if "." in str(key) or key == "engine"}
    own = {key: value for key, value in entry.items() if key not in fields}
    known = [f.name for f in dataclasses.fields(cls) if f.name != "fields"]
    for key in own:
        if key not in known:
            raise StudyError(
                f"unknown key '{where}.{key}'{nearest(key, known)}; a field of the recipe has its section's name, "
                "e.g. model.value.source"
            )
    return dataclasses.replace(_build(cls, own, f"{where}."), fields=_fields(fields, where))


def _fields(values: Any, where: str) -> dict[str, Any]:
    """Fields of a recipe by dotted name, none of which the study sets itself."""
    if not isinstance(values, dict):
        raise StudyError(f"{where}={values!r}: must be a mapping, e.g. {{validation.interval: 100}}")
    for key, value in values.items():
        refuse_fixed(str(key), where)
        if isinstance(value, dict):
            raise StudyError(f"{where}: '{key}' is a section; name its fields, e.g. {key}.{next(iter(value), '…')}: …")
    return values


def refuse_fixed(key: str, where: str) -> None:
    """Raise StudyError for a field that the study sets itself."""
    if key in FIXED:
        raise StudyError(f"{where}: {key} is set by the study in every cell; {FIXED[key]}")


def _size(name: str, entry: dict) -> Size:
    where = f"sizes.{name}"
    size = _entry(Size, entry, where)
    if size.depth is not None and size.recipe is not None:
        raise StudyError(f"{where}: depth and recipe are both given; give the one that the shape follows from")
    if size.depth is None and ("aspect_ratio" in entry or "head_dim" in entry):
        raise StudyError(f"{where}: aspect_ratio and head_dim need depth, e.g. depth: 12")
    for key in ("depth", "aspect_ratio", "head_dim", "world_size"):
        if (value := getattr(size, key)) is not None and value < 1:
            raise StudyError(f"{where}.{key}={value}: must be at least 1")
    return size


def _selections(values: Any) -> list[Selection]:
    if not isinstance(values, list) or not values:
        raise StudyError(
            "'cells' must be a list of selections, e.g. cells: [{sizes: [d12], budgets: [1.5e18]}]; leave it out for "
            "all combinations"
        )
    selections = [_build(Selection, entry, f"cells[{i}].") for i, entry in enumerate(values)]
    for i, selection in enumerate(selections):
        for key, chosen in vars(selection).items():
            if chosen == []:
                raise StudyError(f"cells[{i}].{key} is empty and so selects nothing; leave {key} out for all of them")
    return selections


def _build(cls: type, values: Any, where: str) -> Any:
    try:
        return build(cls, values, where)
    except RecipeError as error:
        raise StudyError(str(error)) from None


def _check_names(file: StudyFile) -> None:
    """Every name that is referred to exists."""
    known(file.baseline, file.variants, "baseline")
    for seeds in (file.seeds, *(selection.seeds for selection in file.cells if selection.seeds is not None)):
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise StudyError(f"seeds={seeds}: must be different integers, 0 or more, at least one")
    for name, variant in file.variants.items():
        for key in ("match_parameters", "match_tokens"):
            if (other := getattr(variant, key)) is None:
                continue
            known(other, file.variants, f"variants.{name}.{key}")
            if getattr(file.variants[other], key) is not None or other == name:
                raise StudyError(f"variants.{name}.{key}: {other} has {key} itself; name a variant without")
        if variant.aspect_ratio is not None and variant.aspect_ratio < 1:
            raise StudyError(f"variants.{name}.aspect_ratio={variant.aspect_ratio}: must be at least 1")


def known(name: str, names: Iterable[str], where: str) -> None:
    """Raise StudyError unless `name` is one of `names`."""
    if name not in (names := list(names)):
        raise StudyError(f"{where}: '{name}' is unknown{nearest(name, names)}")
