#!/usr/bin/env python3
"""What one GPU shows of this project, piece by piece: numbers against the paper's code, speed, memory.

    python3 tools/gpu.py --wheels DIR          every piece; first installs what DIR has and this Python lacks
    python3 tools/gpu.py golden recipes        some of them, again
    python3 tools/gpu.py --cpu                 try the pieces without a GPU, with small models

Needs a Python 3.11 or 3.12 with torch 2.11 or newer, and no network. A piece ends within eight minutes. Its result
replaces the last one in gpu.json in docs/measured, from which gpu.md beside it is written.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# Nothing of the package here: it needs what --wheels brings.
from benchmarks.gpu.page import page  # noqa: E402
from benchmarks.gpu.pieces import PIECES, run_piece  # noqa: E402

MEASURED = ROOT / "docs" / "measured" / "gpu.json"
LOGS = ROOT / "bench" / "gpu"
SITE = ROOT / "build" / "gpu-packages"
"""What --wheels installs; before this Python's own packages on the path, which stay as they are."""


def main(arguments: list[str] | None = None) -> int:
    listing = "".join(f"\n  {name:<12}{piece.text}" for name, piece in PIECES.items())
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\npieces:{listing}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="default: all")
    parser.add_argument("--list", action="store_true", help="print the pieces")
    parser.add_argument("--wheels", metavar="DIR", type=Path, help="folder of wheels")
    parser.add_argument("--cpu", action="store_true", help="small models on a CPU")
    parser.add_argument("--json", metavar="FILE", type=Path, help="the record (default: gpu.json in docs/measured, "
                        "with --cpu in bench)")  # fmt: skip
    options = parser.parse_args(arguments)
    if unknown := set(options.pieces) - set(PIECES):
        return _refuse(f"no piece '{min(unknown)}'; there are {', '.join(PIECES)}")
    if options.list:
        print(listing.strip("\n"))
        return 0
    if reason := _unfit(options.cpu):
        return _refuse(reason)
    environ = dict(os.environ, PYTHONPATH=os.pathsep.join([str(SITE), str(ROOT), os.environ.get("PYTHONPATH", "")]))
    if options.cpu:
        environ["CUDA_VISIBLE_DEVICES"] = ""
    if options.wheels:
        if not options.wheels.is_dir():
            return _refuse(f"--wheels {options.wheels}: no such folder")
        install(options.wheels)
    record = options.json or (ROOT / "bench" / "gpu.json" if options.cpu else MEASURED)
    for folder in (record.parent, LOGS):
        folder.mkdir(parents=True, exist_ok=True)
    results = json.loads(record.read_text()) if record.exists() else {}
    for name in options.pieces or PIECES:
        print(f"{name}: {PIECES[name].text} …", end=" ", flush=True)
        log = LOGS / f"{name}.log"
        results[name] = {"commit": _commit(), **run_piece(PIECES[name], log, options.cpu, environ)}
        # After each, as the machine may be gone before the last.
        record.write_text(json.dumps({name: results[name] for name in PIECES if name in results}, indent=1) + "\n")
        record.with_suffix(".md").write_text(page(results))
        print(f"{'passed' if results[name]['passed'] else 'FAILED'} in {results[name]['seconds']:.0f} s")
        if said := results[name].get("said"):
            print("".join(f"    {line}\n" for line in said), end="")
            print(f"    all of it: {log}", flush=True)
    print(f"results are in {record} and {record.with_suffix('.md').name}")
    return 0 if all(results[name]["passed"] for name in options.pieces or PIECES) else 1


def _refuse(reason: str) -> int:
    print(f"error: {reason}", file=sys.stderr)
    return 2


def _unfit(cpu: bool) -> str | None:
    """Why this Python can't run the pieces; None if it can."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        return f"{sys.executable} is Python {sys.version.split()[0]}: 3.11 or 3.12 is needed"
    try:
        import torch
    except ImportError:
        return f"{sys.executable} has no torch: run this script with a Python that has it"
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) < (2, 11):
        return f"torch is {torch.__version__}: 2.11 or newer is needed"
    if not cpu and not torch.cuda.is_available():
        return "torch finds no GPU here; --cpu tries the pieces without one"
    return None


def install(wheels: Path) -> None:
    """Into SITE, those packages that this Python lacks, without what they depend on: nothing that is there is replaced.

    A package that is there may be another version than the pinned one; the record says which.
    """
    lacking = [wheel for wheel in sorted(wheels.glob("*.whl")) if not _installed(wheel.name.split("-")[0])]
    if lacking:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--upgrade"]
        subprocess.run([*pip, "--target", str(SITE), *map(str, lacking)], check=True)


def _installed(name: str) -> bool:
    try:
        version(name.replace("_", "-"))
    except PackageNotFoundError:
        return False
    return True


def _commit() -> str:
    git = subprocess.run(["git", "describe", "--always", "--dirty=+changes"], cwd=ROOT, capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
