"""docs/use/recipes.md and docs/use/plan.md say what the code says."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bov_megatron import recipe
from tools.document_recipes import field_docstrings, update

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = [cls for cls in vars(recipe).values() if isinstance(cls, type) and dataclasses.is_dataclass(cls)]


def test_page_is_current():
    page = (ROOT / "docs/use/recipes.md").read_text()
    assert update(page, ROOT / "recipes") == page, "run: python tools/document_recipes.py"
    result = subprocess.run(
        [sys.executable, ROOT / "tools/document_recipes.py", "--check"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "docs/use/recipes.md is up to date\n")


def test_a_change_is_noticed():
    page = (ROOT / "docs/use/recipes.md").read_text()
    assert update(page.replace("`warmdown_ratio`", "`warmdown`"), ROOT / "recipes") == page
    with pytest.raises(ValueError, match="marks <!-- begin fields --> and <!-- end fields --> are missing"):
        update(page.replace("<!-- end fields -->", ""), ROOT / "recipes")


@pytest.mark.parametrize("cls", SECTIONS, ids=lambda cls: cls.__name__)
def test_every_field_is_explained(cls):
    page = (ROOT / "docs/use/recipes.md").read_text()
    docs = field_docstrings(cls)
    for field in dataclasses.fields(cls):
        if not dataclasses.is_dataclass(field.default_factory):
            assert len(docs.get(field.name, "")) > 10, f"{cls.__name__}.{field.name} has no docstring"
            assert f"| `{field.name}` |" in page


@pytest.mark.parametrize("page", ["docs/use/recipes.md", "docs/use/plan.md", "docs/use/studies.md"])
def test_shown_commands_print_what_is_shown(page):
    blocks = re.findall(r"```\n\$ python (\S+) (.*?)\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert blocks
    for tool, arguments, shown in blocks:
        result = subprocess.run([sys.executable, tool, *arguments.split()], cwd=ROOT, capture_output=True, text=True)
        assert (result.stdout + result.stderr).split() == shown.split()
