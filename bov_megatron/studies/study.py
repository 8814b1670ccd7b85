"""A study: one YAML file that says which runs answer a question. docs/use/studies.md describes the format."""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.errors import RecipeError, StudyError
from bov_megatron.recipe import Recipe, data_parallel_size, recipe_from_dict
from bov_megatron.recipe.loading import StrictLoader, read_with_bases
from bov_megatron.recipe.quantities import parameter_counts, total_steps
from bov_megatron.studies import dial
from bov_megatron.studies.study_file import Selection, StudyFile, known, number, override, read_study, refuse_fixed


@dataclass(frozen=True)
class Cell:
    """One run of a study, the same that a person would start by hand: `train BASE OVERRIDES…`."""

    name: str
    """Unique in the study, e.g. `bank-d12-1.5e18-s0`; also the name of its run and of the run's folder."""
    variant: str
    size: str
    budget: str
    """FLOPs, e.g. `1.5e18`, or tokens, e.g. `2e9tokens`."""
    seed: int
    recipe: Recipe
    """Complete and checked."""
    base: Path
    """The recipe file it builds on."""
    overrides: tuple[str, ...]
    """`section.field=value`, those that distinguish this cell from `base`."""
    world_size: int
    """Ranks (GPUs) to run it on; one copy of the model unless its size says more."""

    @property
    def run_dir(self) -> Path:
        return self.recipe.run_dir


@dataclass(frozen=True)
class Study:
    """The cells of a study file, in its order: by variant, size, budget, seed."""

    name: str
    path: Path
    description: str
    baseline: str
    """Name of the variant that the others are compared with."""
    output_dir: Path
    """The runs lie in output_dir/cells/CELL_NAME; whatever else belongs to the study lies beside `cells`."""
    cells: tuple[Cell, ...]


def load_study(path: str | Path, overrides: Sequence[str] = ()) -> Study:
    """Read a study file and build its cells.

    `overrides` are `section.field=value` for every cell, or `output_dir=FOLDER` for the study.

    Raises StudyError for an unknown key or name, a cell that can't be built, or two cells that are the same.
    """
    path = Path(path)
    try:
        file = read_study(path)
        given = _parse(overrides)
        output_dir = str(given.pop("output_dir", None) or file.output_dir).replace("{name}", path.stem)
        if set(output_dir) & set("{}"):
            raise StudyError(f"output_dir={output_dir!r}: only {{name}}, the study's name, may be in braces")
        for key in given:
            refuse_fixed(key, "command line")
        cells = tuple(_Builder(path, file, given, output_dir).cells())
    except StudyError as error:
        raise StudyError(f"study {path}: {error}") from None
    return Study(path.stem, path, file.description.strip(), file.baseline, Path(output_dir), cells)


def _parse(overrides: Sequence[str]) -> dict[str, Any]:
    """`key=value` with values read as YAML."""
    values: dict[str, Any] = {}
    for given in overrides:
        key, equals, text = given.partition("=")
        if not equals or not key:
            raise StudyError(f"override '{given}' is not of the form section.field=value")
        if key in values:
            raise StudyError(f"override '{given}': {key} is given twice; keep one")
        try:
            values[key] = yaml.load(text, StrictLoader) if text.strip() else None
        except yaml.YAMLError:
            raise StudyError(f"override '{given}': the value is not valid YAML; quote it") from None
    return values


@dataclass(frozen=True)
class _WithoutSeed:
    """What cells that differ in their seed alone have in common."""

    base: Path
    recipe: Recipe
    overrides: tuple[str, ...]
    world_size: int
    key: str
    """Equal for equal recipes."""


class _Builder:
    """Builds the cells of a study file.

    Where a field is set in several places, the last of these holds: base recipe, depth dial, the study's overrides,
    the size, the variant, the command line.
    """

    def __init__(self, path: Path, file: StudyFile, given: dict[str, Any], output_dir: str):
        self.folder, self.file, self.given = path.parent, file, given
        self.run_dirs = str(Path(output_dir) / "cells" / "{name}")
        # Cells that differ in their seed alone are checked once.
        self.read_base = functools.cache(_read_base)
        self.without_seed = functools.cache(self._without_seed)

    def cells(self) -> Iterator[Cell]:
        names: set[str] = set()
        runs: dict[tuple[str, int], str] = {}
        for selection in self.file.cells:
            for variant, size, budget, seed in self._combinations(selection):
                cell = self._cell(variant, size, budget, seed)
                if cell.name in names:
                    raise StudyError(f"cell {cell.name} is in 'cells' twice; list it once")
                names.add(cell.name)
                same = runs.setdefault((self.without_seed(variant, size, budget).key, seed), cell.name)
                if same != cell.name:
                    raise StudyError(f"cells {same} and {cell.name} are the same run; remove one of them")
                yield cell
        self._check_all_used()

    def _check_all_used(self) -> None:
        """A name that is in no cell is a slip, and would silently leave runs out."""
        for section in ("variants", "sizes", "budgets"):
            used = [getattr(selection, section) for selection in self.file.cells]
            if None not in used:
                given = {_budget(name) if section == "budgets" else name for names in used for name in names}
                for name in getattr(self.file, section):
                    if name not in given:
                        raise StudyError(f"{section}: '{name}' is in no cell; add it to 'cells', or remove it")

    def _combinations(self, selection: Selection) -> Iterator[tuple[str, str, str, int]]:
        file = self.file
        budgets = selection.budgets
        variants = _selected(selection.variants, file.variants, "variants")
        sizes = _selected(selection.sizes, file.sizes, "sizes")
        amounts = _selected(None if budgets is None else [_budget(b) for b in budgets], file.budgets, "budgets")
        seeds = file.seeds if selection.seeds is None else selection.seeds
        return itertools.product(variants, sizes, amounts, seeds)

    def _cell(self, variant: str, size: str, budget: str, seed: int) -> Cell:
        name = f"{variant}-{size}-{budget}-s{seed}"
        try:
            built = self.without_seed(variant, size, budget)
        except RecipeError as error:
            raise StudyError(f"cell {name} can't be built: {error}") from None
        own = {"name": name, "output_dir": self.run_dirs, "train.seed": seed, "data.shuffle_seed": seed}
        recipe = replace(
            built.recipe,
            name=name,
            output_dir=self.run_dirs,
            train=replace(built.recipe.train, seed=seed),
            data=replace(built.recipe.data, shuffle_seed=seed),
        )
        overrides = (*built.overrides, *(override(key, value) for key, value in own.items()))
        return Cell(name, variant, size, budget, seed, recipe, built.base, overrides, built.world_size)

    def _without_seed(self, variant: str, size: str, budget: str) -> _WithoutSeed:
        base, settings = self._model(variant, size)
        matches = self.file.variants[variant]
        if (other := matches.match_parameters) is not None:
            settings["model.ffn_hidden_size"] = self._matching_ffn(base, settings, variant, other, size)
        kind, amount = self.file.budgets[budget]
        if matches.match_tokens is not None:
            same = self.without_seed(matches.match_tokens, size, budget).recipe
            kind, amount = "tokens", total_steps(same) * same.batch_tokens
        if kind == "flops":
            settings |= {"train.steps": None, "train.budget_flops": amount}
        else:
            batch = _recipe_from(self.read_base(base), settings | _ONE_STEP).batch_tokens
            if round(amount / batch) < 1:
                raise RecipeError(f"{amount:g} tokens are less than half a batch of {batch:,}; raise the budget")
            settings |= {"train.steps": round(amount / batch), "train.budget_flops": None}
        recipe = _recipe_from(self.read_base(base), settings)
        world_size = self.file.sizes[size].world_size or recipe.parallel.model_parallel_size
        data_parallel_size(recipe, world_size)
        overrides = tuple(override(key, value) for key, value in settings.items())
        return _WithoutSeed(base, recipe, overrides, world_size, repr(recipe))

    def _model(self, variant: str, size: str) -> tuple[Path, dict[str, Any]]:
        """Base and settings without those that follow from a budget or from another variant."""
        file_size, file_variant = self.file.sizes[size], self.file.variants[variant]
        base = Path(os.path.normpath(self.folder / (file_size.recipe or self.file.base)))
        if file_size.depth is None and file_variant.aspect_ratio is not None:
            raise StudyError(
                f"variants.{variant}.aspect_ratio needs a depth, which size {size} does not have; give the size a "
                "depth, or leave the variant out there with 'cells'"
            )
        explicit = self.file.overrides | file_size.fields
        derived: dict[str, Any] = {}
        if file_size.depth is not None:
            # The batch is the size's, so that variants of one size differ in nothing else.
            derived = dial.shape(file_size.depth, file_size.aspect_ratio, file_size.head_dim)
            model = _recipe_from(self.read_base(base), derived | explicit | self.given | _ONE_STEP).model
            derived["train.global_batch_size"] = max(1, dial.batch_tokens(model) // model.sequence_length)
            if file_variant.aspect_ratio is not None:
                derived |= dial.shape(file_size.depth, file_variant.aspect_ratio, file_size.head_dim)
        return base, derived | explicit | file_variant.fields | self.given

    def _matching_ffn(self, base: Path, settings: dict[str, Any], variant: str, other: str, size: str) -> int:
        """Feed-forward width that gives `variant` as many parameters as `other` has at this size."""
        values = self.read_base(base)
        other_model = _recipe_from(values, self._model(other, size)[1] | _ONE_STEP).model
        target = sum(parameter_counts(other_model).values())
        width = dial.ffn_for_parameters(_recipe_from(values, settings | _ONE_STEP).model, target)
        if width < 1:
            raise StudyError(
                f"variants.{variant}.match_parameters: {other} has {target:,} parameters at size {size}, fewer than "
                f"{variant} without feed-forward layers; match another variant"
            )
        return width


_ONE_STEP = {"train.steps": 1, "train.budget_flops": None}
"""For recipes that are built for their model alone."""


def _read_base(path: Path) -> dict:
    try:
        return read_with_bases(path)
    except RecipeError as error:
        raise StudyError(str(error)) from None


def _recipe_from(base: dict, settings: dict[str, Any]) -> Recipe:
    """The checked recipe of `base` with `section.field` settings: what overrides would make of it."""
    values = copy.deepcopy(base)
    for key, value in settings.items():
        *sections, last = key.split(".")
        section = values
        for name in sections:
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise RecipeError(f"'{key}': '{name}' is a value, not a section; give the whole of {name}")
        section[last] = value
    return recipe_from_dict(values)


def _selected(names: list[str] | None, all_names: Iterable[str], section: str) -> list[str]:
    for name in names or ():
        known(name, all_names, f"cells: {section}")
    return list(all_names) if names is None else names


def _budget(given: str | float) -> str:
    """Name of a budget that a selection gives by name or as a number of FLOPs."""
    try:
        return number(float(given))
    except ValueError:
        return str(given)
