"""Renew the generated tables of docs/recipes.md after a field or a recipe has changed.

python tools/document_recipes.py           write them
python tools/document_recipes.py --check   only say whether they are up to date (exit status 1 if not)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bov_megatron.recipe_docs import update  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    options = parser.parse_args(arguments)
    page = ROOT / "docs" / "recipes.md"
    old = page.read_text(encoding="utf-8")
    new = update(old, ROOT / "recipes")
    if options.check:
        print(
            "docs/recipes.md is up to date"
            if new == old
            else "docs/recipes.md is out of date; run this without --check"
        )
        return int(new != old)
    page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
