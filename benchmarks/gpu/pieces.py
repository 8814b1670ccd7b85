"""The pieces of `make gpu`: commands of under eight minutes each, that can be run one by one and again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 480
SHOWN_LINES = 20
"""Of a failed piece's output, kept in the record."""


@dataclass(frozen=True)
class Piece:
    """One command, and how its result is read."""

    text: str
    """What it shows."""
    arguments: tuple[str, ...]
    """After the interpreter; `{json}` is where to write numbers, `{folder}` a temporary one."""
    small: tuple[str, ...] = ()
    """Further arguments on a CPU."""
    tests: bool = False
    """Runs pytest."""

    def command(self, folder: Path, small: bool) -> list[str]:
        filled = [argument.format(json=folder / "numbers.json", folder=folder) for argument in self.arguments]
        command = [sys.executable, *filled, *(self.small if small else ())]
        if self.tests:
            command += ["-q", "-p", "no:cacheprovider", f"--basetemp={folder}/tests", f"--junitxml={folder}/tests.xml"]
            if find_spec("xdist") and not small:
                command += ["-n", "4", "--dist", "loadfile"]
        return command


def _tests(text: str, *paths: str) -> Piece:
    return Piece(text, ("-m", "pytest", *paths), tests=True)


def _bench(text: str, *names: str) -> Piece:
    return Piece(text, ("tools/bench.py", *names, "--json", "{json}"), small=("--quick", "--threads", "1"))


PIECES = {
    "environment": Piece("GPU, driver, versions, compilers", ("-m", "benchmarks.gpu.environment", "{json}")),
    "golden": _tests(
        "tensors and ten steps of the paper's code, in fp32",
        "tests/model/test_golden.py",
        "tests/optim/test_trajectory.py",
    ),
    "device": _tests(
        "the same in bf16, deterministic runs bit for bit, the GPU against the CPU, ranks that share a GPU",
        "tests/gpu",
    ),
    "model": _tests("model, attention, lookups, loss", "tests/model", "--ignore=tests/model/test_golden.py"),
    "compile": _tests("parts compiled, whole graphs, the same numbers", "tests/engines/test_compile.py"),
    "parity": _tests("recomputation and layouts of one rank", "tests/engines/test_parallel_parity.py"),
    "optimizer": _tests("Muon and AdamW", "tests/optim", "--ignore=tests/optim/test_trajectory.py"),
    "checkpoint": _tests("saving, loading, resharding", "tests/checkpoint"),
    "demo": Piece(
        "data, training, export, evaluation", ("tools/demo.py", "--out", "{folder}/demo"), small=("--steps", "5")
    ),
    "step": _bench("bank against projection", "step", "--turns", "9"),
    "loss": _bench("output layer and loss against Megatron's", "loss"),
    "recipes": _bench("tokens/s, MFU and peak memory of the published recipes", "recipes", "--turns", "5"),
    "profile": _bench("the kernels of a 780M step that take longest", "profile"),
}


def run_piece(piece: Piece, log: Path, small: bool, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Run one piece; its record: `passed`, `seconds`, `at`, `numbers`, and `said` of one that failed.

    Args:
        log: takes everything that the piece prints.
        small: on a CPU, with models that it can do in a while.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-") as name:
        folder = Path(name)
        with log.open("w") as output:
            try:
                status = subprocess.run(
                    piece.command(folder, small),
                    cwd=ROOT,
                    env={**environ, "PYTHONUNBUFFERED": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    timeout=LIMIT_SECONDS,
                ).returncode
            except subprocess.TimeoutExpired:
                status = None
        record = {
            "passed": status == 0,
            "seconds": round(time.monotonic() - started, 1),
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "numbers": _test_counts(folder / "tests.xml") if piece.tests else _read(folder / "numbers.json"),
        }
    if status != 0:
        reason = f"stopped after {LIMIT_SECONDS} s" if status is None else f"exit status {status}"
        record["said"] = [*log.read_text(errors="replace").splitlines()[-SHOWN_LINES:], reason]
    return record


def _read(file: Path) -> dict:
    return json.loads(file.read_text()) if file.exists() else {}


def _test_counts(report: Path) -> dict:
    """How many tests passed, failed and were skipped, and the failed ones' names and first lines."""
    if not report.exists():
        return {}
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = {
        f"{case.get('classname')}::{case.get('name')}": (problem.get("message") or "").splitlines()[:1]
        for case in cases
        for problem in (*case.iter("failure"), *case.iter("error"))
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    return {"passed": len(cases) - len(failed) - skipped, "skipped": skipped, "failed": failed}
