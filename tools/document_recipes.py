"""Renew the generated tables of docs/use/recipes.md after a field or a recipe has changed.

python tools/document_recipes.py           write them
python tools/document_recipes.py --check   only say whether they are up to date (exit status 1 if not)
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bov_megatron.lifecycle.interruption import CtrlC  # noqa: E402
from bov_megatron.lifecycle.program import run_program  # noqa: E402
from bov_megatron.recipe import Recipe, fields  # noqa: E402
from bov_megatron.recipe.limits import OneOf, limits_of  # noqa: E402

SECTION_ORDER = (
    "",
    "model",
    "model.value",
    "parallel",
    "deepspeed",
    "train",
    "optimizer",
    "data",
    "data.streams[]",
    "validation",
    "evaluation",
    "evaluation.held_out[]",
)
SECTION_ORDER += ("checkpoint", "health", "logging")


def update(text: str, recipes: Path) -> str:
    """`text` of docs/use/recipes.md with what stands between its `<!-- begin X -->`, `<!-- end X -->` marks renewed.

    Raises ValueError where a mark is missing.
    """
    for name, body in (("recipes", recipe_table(recipes)), ("fields", field_tables())):
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if not pattern.search(text):
            raise ValueError(f"the marks <!-- begin {name} --> and <!-- end {name} --> are missing; put them back")
        text = pattern.sub(lambda match, body=body: match[1] + body + match[2], text)
    return text


def recipe_table(folder: Path) -> str:
    """One row a recipe: its path and the comment at its head."""
    rows = ["| recipe | what it is and why to run it |", "|---|---|"]
    for path in [*sorted(folder.glob("*.yaml")), *sorted((folder / "variants").glob("*.yaml"))]:
        comment = re.match(r"(?:#[^\n]*\n)*", path.read_text(encoding="utf-8"))[0]
        text = " ".join(line.lstrip("# ") for line in comment.splitlines())
        rows.append(f"| `{path.relative_to(folder).with_suffix('')}` | {_cell(text)} |")
    return "\n".join(rows) + "\n"


def field_tables() -> str:
    """One table a section: field, type, default, meaning."""
    sections = _sections(Recipe, "")
    parts = []
    for name in SECTION_ORDER:
        cls = sections.pop(name)
        title = f"### `{name}`" if name else "### At the top"
        summary = inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ")
        rows = ["| field | type | default | meaning |", "|---|---|---|---|", *_rows(cls)]
        parts.append("\n".join([title, "", summary, "", *rows, ""]))
    if sections:
        raise ValueError(f"sections {', '.join(sections)} have no place in SECTION_ORDER; add them")
    return "\n".join(parts)


def field_docstrings(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, which Python itself drops; fields without one are absent."""
    tree = ast.parse(inspect.getsource(fields))
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__)
    docs = {}
    for node, following in zip(body, body[1:], strict=False):
        is_field = isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        if is_field and isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            docs[node.target.id] = inspect.cleandoc(following.value.value)
    return docs


def _sections(cls: type, name: str) -> dict[str, type]:
    """Dataclasses by the path of their section, `cls` itself first."""
    found = {name: cls}
    for field, wanted in typing.get_type_hints(cls).items():
        path = f"{name}.{field}" if name else field
        if dataclasses.is_dataclass(wanted):
            found |= _sections(wanted, path)
        elif _is_section_list(wanted):
            found |= _sections(typing.get_args(wanted)[0], f"{path}[]")
    return found


def _is_section_list(wanted: typing.Any) -> bool:
    return typing.get_origin(wanted) is list and dataclasses.is_dataclass(typing.get_args(wanted)[0])


def _rows(cls: type) -> list[str]:
    hints, docs, rows = typing.get_type_hints(cls, include_extras=True), field_docstrings(cls), []
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            continue  # has its own table
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        meaning = _cell(docs[field.name].replace("\n", " "))
        rows.append(f"| `{field.name}` | {_kind(hints[field.name])} | `{_yaml(default)}` | {meaning} |")
    return rows


def _kind(hint: typing.Any) -> str:
    """A field's type and limits in words."""
    if _is_section_list(hint):
        return "list of sections"
    limits = limits_of(hint)
    allowed = [str(limit) for limit in limits if isinstance(limit, OneOf)]
    return "; ".join(allowed or [_type(hint), *map(str, limits)])


def _type(hint: typing.Any) -> str:
    if typing.get_origin(hint) is typing.Annotated:
        return _type(typing.get_args(hint)[0])
    if typing.get_origin(hint) is list:
        return f"list of {_type(typing.get_args(hint)[0])}"
    if parts := typing.get_args(hint):
        return " or ".join(map(_type, parts))
    return "null" if hint is type(None) else hint.__name__


def _yaml(value: typing.Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return text.replace("|", "or")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    options = parser.parse_args(arguments)
    page = ROOT / "docs" / "use" / "recipes.md"
    old = page.read_text(encoding="utf-8")
    new = update(old, ROOT / "recipes")
    if options.check:
        print(
            "docs/use/recipes.md is up to date"
            if new == old
            else "docs/use/recipes.md is out of date; run this without --check"
        )
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_program(main, CtrlC())
