"""Recipes from YAML files and `section.field=value` overrides; unknown fields and wrong types are errors."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
import typing
from pathlib import Path

import yaml

from bov_megatron.errors import RecipeError
from bov_megatron.recipe.checks import check_recipe
from bov_megatron.recipe.fields import Recipe
from bov_megatron.recipe.limits import nearest


def load_recipe(path: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
    """Read a recipe file and its bases, apply `section.field=value` overrides and check it. Raises RecipeError."""
    values = read_with_bases(path)
    values.setdefault("name", Path(path).stem)
    apply_overrides(values, overrides)
    return recipe_from_dict(values)


def recipe_from_dict(values: dict) -> Recipe:
    """A checked recipe from nested mappings, such as those of `Recipe.to_dict()`. Raises RecipeError."""
    recipe = build(Recipe, values)
    check_recipe(recipe)
    return recipe


def read_with_bases(path: str | Path) -> dict:
    """The mapping in recipe file `path`, merged over its `base:`, that base's own, and so on.

    Sections merge field by field; lists are replaced whole. Raises RecipeError for a missing file, invalid YAML, a
    field given twice, a section that is not a mapping, or a cycle of bases.
    """
    return _read(Path(path), ())


def _read(path: Path, children: tuple[Path, ...]) -> dict:
    try:
        path = path.resolve()
    except (OSError, ValueError, RuntimeError) as error:  # too long, characters that no name has, a circle of links
        raise RecipeError(f"recipe {str(path)!r} can't be opened: {error}") from None
    if path in children:
        raise RecipeError(f"base: {path.name} is its own base ({' -> '.join(p.name for p in (*children, path))})")
    values = _read_yaml(path, children)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise RecipeError(f"base={base!r} in {path}: expected the path of one recipe, relative to this file")
    values.setdefault("name", path.stem)
    return _merge(_read(path.parent / base, (*children, path)), values)


def _read_yaml(path: Path, children: tuple[Path, ...]) -> dict:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), StrictLoader)
    except FileNotFoundError:
        raise RecipeError(_missing(path, children)) from None
    except IsADirectoryError:
        raise RecipeError(f"recipe {path} is a folder; name one of its files: {_listing(path)}") from None
    except OSError as error:
        raise RecipeError(f"recipe {path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # not UTF-8, 2001-13-45, a thousand brackets
        raise RecipeError(f"recipe {path} is not valid YAML: {error}") from None
    if values is None:
        raise RecipeError(f"recipe {path} is empty; it needs at least train.steps or train.budget_flops")
    if not isinstance(values, dict):
        raise RecipeError(f"recipe {path} must be a mapping of sections, found {type(values).__name__}")
    return values


def _missing(path: Path, children: tuple[Path, ...]) -> str:
    wanted_by = f" (the base of {children[-1].name})" if children else ""
    with_extension = path.with_name(path.name + ".yaml")
    if with_extension.is_file():
        return f"recipe {path} does not exist{wanted_by}; did you mean {with_extension.name}?"
    close = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return f"recipe {path} does not exist{wanted_by}{hint} In its folder: {_listing(path.parent)}"


def _listing(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    return ", ".join(names) or "no recipe"


class StrictLoader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys, of which YAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, str) and key in seen:
                line = key_node.start_mark.line + 1
                raise yaml.constructor.ConstructorError(None, None, f"'{key}' is given twice (line {line}); keep one")
            if isinstance(key, str):
                seen.add(key)
        return super().construct_mapping(node, deep)


def _merge(base: dict, over: dict) -> dict:
    merged = dict(base)
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def apply_overrides(values: dict, overrides: typing.Sequence[str]) -> None:
    """Write each `section.field=value` into the nested mapping `values`; the value is read as YAML.

    `section.field=` and `section.field=null` both mean null; of a field given twice, the last holds. Raises RecipeError
    for another form, a value that is not valid YAML, or a path through something that is not a section.
    """
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.removeprefix("--").strip()
        if not equals or not key or not all(key.split(".")):
            raise RecipeError(f"override '{override}' is not of the form section.field=value")
        _apply_override(values, override, key, text)


def _apply_override(values: dict, override: str, key: str, text: str) -> None:
    *sections, last = key.split(".")
    for depth, section in enumerate(sections):
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            name = ".".join(sections[: depth + 1])
            hint = f"; give the whole list: {name}=[…]" if isinstance(values, list) else ""
            raise RecipeError(f"override '{override}': '{name}' is a value, not a section{hint}")
    try:
        values[last] = yaml.load(text, StrictLoader) if text.strip() else None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"override '{override}': the value is not valid YAML ({problem}); quote it") from None


@functools.cache  # a study builds thousands of recipes
def _field_types(cls: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(cls)


def build(cls: type, values: typing.Any, where: str = "") -> typing.Any:
    """Dataclass `cls` from mapping `values`. Raises RecipeError for unknown keys and wrong types.

    `where` is the path of the section with a trailing dot, for messages.
    """
    wanted = _field_types(cls)
    if not isinstance(values, dict):
        section = where.rstrip(".") or "recipe"
        raise RecipeError(
            f"{section}={values!r}: '{section}' is a section, not a value; set {section}.<field>, with <field> one of: "
            f"{', '.join(wanted)}"
        )
    for key in values:
        if key not in wanted:
            raise RecipeError(f"unknown field '{where}{key}'{nearest(key, wanted, where)}")
    return cls(**{key: _convert(wanted[key], value, f"{where}{key}") for key, value in values.items()})


def _convert(wanted: typing.Any, value: typing.Any, where: str) -> typing.Any:
    """`value` as the annotated type; raises RecipeError. Limits are checked later (checks.py)."""
    if typing.get_origin(wanted) is typing.Literal:
        wanted = type(typing.get_args(wanted)[0])
    if isinstance(wanted, type) and dataclasses.is_dataclass(wanted):
        return build(wanted, value, where + ".")
    if _is_union(wanted):
        return _convert_union(wanted, value, where)
    if typing.get_origin(wanted) is list:
        if not isinstance(value, list):
            raise RecipeError(f"{where}={value!r}: expected {_describe(wanted)}, e.g. {where}=[…]")
        return [_convert(typing.get_args(wanted)[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    converted = _convert_scalar(wanted, value)
    if converted is None:
        raise _wrong_type(wanted, value, where)
    return converted


def _is_union(wanted: typing.Any) -> bool:
    return typing.get_origin(wanted) in (typing.Union, types.UnionType)


def _convert_union(wanted: typing.Any, value: typing.Any, where: str) -> typing.Any:
    options = typing.get_args(wanted)
    if value is None and type(None) in options:
        return None
    for option in options:
        if option is not type(None):
            try:
                return _convert(option, value, where)
            except RecipeError as error:
                if isinstance(value, list) and typing.get_origin(option) is list:
                    raise error  # says which item is wrong
    raise _wrong_type(wanted, value, where)


def _convert_scalar(wanted: type, value: typing.Any) -> typing.Any:
    """`value` as int, float, bool or str, or None where it is of another type."""
    if wanted in (int, float) and not isinstance(value, bool):
        try:  # YAML 1.1 reads 1e18 as a string
            number = float(value) if isinstance(value, str) else value
            if not isinstance(number, (int, float)) or not math.isfinite(number):
                return None
        except (ValueError, OverflowError):  # not a number, or an integer beyond all floats
            return None
        if wanted is float:
            return float(number)
        return int(number) if number == int(number) else None
    return value if type(value) is wanted else None


def _wrong_type(wanted: typing.Any, value: typing.Any, where: str) -> RecipeError:
    if value is None:
        return RecipeError(f"{where} is empty, or null: expected {_describe(wanted)}; leave it out for the default")
    found = _kind(value) + _hint(wanted, value)
    return RecipeError(f"{where}={value!r}: expected {_describe(wanted)}, found {found}")


def _describe(wanted: typing.Any) -> str:
    if _is_union(wanted):
        return " or ".join(_describe(option) for option in typing.get_args(wanted))
    if typing.get_origin(wanted) is list:
        item = typing.get_args(wanted)[0]
        return (
            "a list of sections" if dataclasses.is_dataclass(item) else f"a list of {_describe(item).split(' ')[-1]}s"
        )
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", type(None): "null"}
    return names[wanted]


def _kind(value: typing.Any) -> str:
    if isinstance(value, float):
        return "a number with a fraction" if math.isfinite(value) else "a number that is not finite"
    return {dict: "a section", bool: "a boolean", list: "a list", str: "a string"}.get(type(value), "a number")


def _hint(wanted: typing.Any, value: typing.Any) -> str:
    takes_text = wanted is str or (_is_union(wanted) and str in typing.get_args(wanted))
    if takes_text and isinstance(value, (bool, int, float)):
        return """; quote it ("'…'" on a command line): YAML does not read it as text"""
    return ""
