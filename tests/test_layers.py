"""Imports point one way: the layers of the package, what a room sees, no circles."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

import bov_megatron

PACKAGE = Path(bov_megatron.__file__).parent
# What each room sees, lowest first. A room sees itself; every room sees errors and compat.
SEES = {
    "errors": (),
    "compat": (),
    "recipe": (),
    "lifecycle": (),
    "parallel": ("recipe",),
    "data": ("recipe", "parallel"),
    "model": ("recipe", "parallel"),
    "optim": ("recipe", "parallel"),
    "engines": ("recipe", "parallel", "model", "optim"),
    "checkpoint": ("recipe", "parallel", "model", "optim", "engines", "lifecycle"),
    "exchange": ("recipe", "parallel", "model", "optim", "engines", "lifecycle", "checkpoint", "data"),
    "evaluation": ("recipe", "parallel", "model", "engines", "lifecycle", "checkpoint", "data", "exchange"),
    "training": ("recipe", "parallel", "model", "optim", "engines", "lifecycle", "checkpoint", "data", "evaluation"),
    "plan": ("recipe",),
    "simulation": ("recipe", "parallel", "model", "optim", "engines", "data", "training", "plan"),
    "plotting": ("recipe", "lifecycle"),
    "preflight": ("recipe", "parallel", "lifecycle", "checkpoint", "data", "evaluation", "plan", "plotting"),
    "train": ("recipe", "parallel", "lifecycle", "training", "plan", "preflight"),
    "studies": ("recipe", "lifecycle", "plan"),
    "inspection": (
        *("recipe", "model", "optim", "lifecycle", "checkpoint", "data", "evaluation", "plotting", "studies"),
    ),
    "commands": (
        *("recipe", "lifecycle", "checkpoint", "data", "exchange", "evaluation", "plan", "plotting", "train"),
        *("studies", "inspection", "simulation"),
    ),
}
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Modules of the package that `module` imports anywhere: at its head, in functions, for type checkers."""
    path, found = MODULES[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parent = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, (parent, node.module)))
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else source for name in names}
    return found


def in_package(names: set[str]) -> set[str]:
    return {name for name in names if name.split(".")[0] == "bov_megatron"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def test_every_module_is_in_a_room():
    assert {room(module) for module in MODULES} == {"", *SEES}


@pytest.mark.parametrize("name", SEES)
def test_a_room_imports_only_what_it_sees(name):
    allowed = {"", name, "errors", "compat", *SEES[name]}
    wrong = {
        f"{module} -> {imported}"
        for module in MODULES
        if room(module) == name
        for imported in in_package(imports(module))
        if room(imported) not in allowed
    }
    assert not wrong


def test_rooms_see_only_what_is_below_them():
    rooms = list(SEES)
    assert all(rooms.index(seen) < rooms.index(name) for name, sees in SEES.items() for seen in sees)
    assert "optim" not in SEES["model"] and "model" not in SEES["optim"]


def test_no_import_circle():
    graphlib.TopologicalSorter({m: in_package(imports(m)) - {m} for m in MODULES}).prepare()  # raises CycleError


def test_files_that_ship_with_an_export_stand_alone():
    shipped = [module for module in MODULES if module.startswith("bov_megatron.exchange.hf.")]
    assert len(shipped) == 2
    for module in shipped:
        outside = {name for name in imports(module) if name not in shipped}
        allowed = {"torch", "transformers", "safetensors", *sys.stdlib_module_names}
        assert {name.split(".")[0] for name in outside} <= allowed


@pytest.mark.parametrize(
    "code",
    [
        "import bov_megatron.recipe",
        "from bov_megatron.commands import main; main(['plan', '--help'])",
        "import bov_megatron.plotting.page, bov_megatron.plotting.watch",
    ],
)
def test_without_torch(code):
    program = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=PACKAGE.parent, check=True, capture_output=True)
