"""Code, commands, paths and links in README.md, CONTRIBUTING.md and docs/ are right."""

import json
import re
import shlex
from pathlib import Path

import pytest

from bov_megatron.commands import COMMANDS
from bov_megatron.exchange.export import export
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.loading import apply_overrides, build
from tests.support.small_models import VARIANTS, small_model, small_model_config

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")))
}
# Entries of the log keep the names of their time.
CURRENT = {name: text for name, text in PAGES.items() if name != "docs/measured/log.md"}
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
OVERRIDE = re.compile(
    r"(?:(?:model|parallel|deepspeed|train|optimizer|data|validation|checkpoint|health|logging)\.[\w.]+|engine)="
)
TARGETS = set(re.findall(r"^([a-z]+):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCED.findall(text) if language in languages]


def commands(text: str) -> list[list[str]]:
    """Words of each command line in a page's blocks."""
    lines = [line for body in blocks(text, "", "sh") for line in body.splitlines()]
    lines = [part.strip() for line in lines for part in line.removeprefix("$ ").split("&&")]
    return [
        shlex.split(line, comments=True)
        for line in lines
        if re.match(r"(python tools|bov|make|sbatch|torchrun)\b", line)
    ]


def check_command(words: list[str]) -> None:
    program, first = words[:2]
    if program == "python":
        assert (ROOT / first).is_file()
    elif program == "bov":
        assert first in COMMANDS
    elif program == "make":
        assert first in TARGETS
    else:
        assert program == "sbatch", "bov torchrun ends with the run's status and without a traceback; show that"
        named = [word for word in words if word.startswith("slurm/") or word == "bov_megatron.train"]
        assert named and all((ROOT / name).exists() or name == "bov_megatron.train" for name in named)
    for word in words:
        if word.startswith("recipes/") and "…" not in word:
            assert (ROOT / word).is_file()


COMMAND_LINES = [(name, words) for name, text in CURRENT.items() for words in commands(text)]


@pytest.mark.parametrize(("page", "words"), COMMAND_LINES, ids=lambda value: " ".join(value) if value else "")
def test_command_exists(page, words):
    check_command(words)


def test_overrides_are_fields_of_a_recipe():
    words = [word for _, line in COMMAND_LINES for word in line]
    words += [word for text in CURRENT.values() for code in re.findall(r"`([^`\n]+)`", text) for word in code.split()]
    overrides = [word for word in words if OVERRIDE.match(word) and "…" not in word]
    assert len(overrides) > 60
    for override in overrides:
        values: dict = {}
        apply_overrides(values, [override])
        build(Recipe, values)  # raises RecipeError for an unknown field or a value of another type


@pytest.mark.parametrize(
    "wrong", ["python tools/plam.py", "bov plam", "make tset", "sbatch slurm/1b.sh", "bov plan recipes/1b.yaml"]
)
def test_a_wrong_command_is_noticed(wrong):
    with pytest.raises(AssertionError):
        check_command(wrong.split())


@pytest.fixture(scope="module")
def workspace(tmp_path_factory, prepared_data):
    """A folder with what the pages' code reads."""
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    (folder / "data").mkdir()
    (folder / "data/mine").symlink_to(prepared_data.folder)
    (folder / "held_out").mkdir()
    (folder / "held_out/text.txt").write_text("A line of text.\n" * 20)
    lines = [{"step": 1, "loss": 6.2}, {"step": 2, "loss": 6.1, "validation_bits_per_byte": 3.1}]
    lines.append({"step": 1, "rollback": {"number": 1}})
    (folder / "runs/smoke").mkdir(parents=True)
    (folder / "runs/smoke/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    sizes = {"vocab_size": prepared_data.vocab_size, "sequence_length": prepared_data.sequence_length}
    model = small_model(VARIANTS["bank"], windows=None, **sizes)
    export(model.state_dict(), small_model_config(VARIANTS["bank"], **sizes), prepared_data.tokenizer, folder / "OUT")
    return folder


@pytest.mark.parametrize("page", [name for name, text in CURRENT.items() if blocks(text, "python")])
def test_code_runs(page, workspace, monkeypatch):
    monkeypatch.chdir(workspace)
    names: dict = {}  # blocks of a page follow on from each other
    for block in blocks(CURRENT[page], "python"):
        exec(compile(block, page, "exec"), names)


def anchors(text: str) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", re.sub(FENCED, "", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), link


@pytest.mark.parametrize("page", CURRENT)
def test_named_paths_exist(page):
    named = re.findall(r"`((?:bov_megatron|tools|tests|slurm|recipes|benchmarks|docs)/[\w/.]*)`", CURRENT[page])
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_every_page_is_listed():
    listed = set(re.findall(r"\]\(((?:use|understand|measured)/[\w.]+)\)", PAGES["docs/index.md"]))
    assert listed == {name.removeprefix("docs/") for name in PAGES if name.count("/") == 2}


def test_pages_that_messages_name_exist():
    files = [p for pattern in ("bov_megatron/**/*.py", "tools/*", "slurm/*.sh", "*.txt") for p in ROOT.glob(pattern)]
    named = {page for file in files if file.is_file() for page in re.findall(r"docs/[\w/]+\.md", file.read_text())}
    assert len(named) > 3
    assert [page for page in named if not (ROOT / page).exists()] == []


def test_architecture_names_every_file_of_the_package():
    tree = blocks(PAGES["docs/understand/architecture.md"], "")[0]
    package = tree[tree.index("bov_megatron/\n") : tree.index("benchmarks/")]
    shown, folder = set(), {}
    for line in package.splitlines()[1:]:
        depth, text = len(line) - len(line.lstrip()), line.strip()
        if match := re.match(r"(\w+/)(?:\s|$)", text):
            folder = {level: name for level, name in folder.items() if level < depth} | {depth: match[1]}
        inside = "".join(name for level, name in sorted(folder.items()) if level < depth or match)
        shown |= {inside + name for name in re.findall(r"[a-z]\w*\.py", text)}
    files = {path.relative_to(ROOT / "bov_megatron") for path in (ROOT / "bov_megatron").rglob("*.py")}
    assert shown == {str(file) for file in files if file.name != "__init__.py" and file.parts[0] != "commands"}
