"""docs/understand/parallelism.md names the layouts that are tested, and the refusals as they are."""

import re
from pathlib import Path

import pytest

from bov_megatron.errors import RecipeError
from bov_megatron.recipe import load_recipe
from tests.engines.test_parallel_parity import LAYOUTS

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "understand" / "parallelism.md").read_text()
REFUSED = re.findall(r"^\| (`\w+\.[^|]*) \| ([^|]*) \|$", PAGE, re.MULTILINE)


def test_every_tested_layout_is_listed():
    cells = [line.split("|")[3] for line in PAGE.splitlines() if line.startswith("|") and line.count("|") == 6]
    named = set(re.findall(r"`([\w-]+)`", " ".join(cells))) - {"SHARED_GROUPS"}
    assert named == set(LAYOUTS)


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_refusals_are_quoted(settings, message):
    with pytest.raises(RecipeError, match=re.escape(message)):
        load_recipe(ROOT / "recipes" / "135m_bov.yaml", re.findall(r"`([^`]*)`", settings))


def test_all_refusals_are_found():
    assert len(REFUSED) == 22
