"""`make gpu` without a GPU: one piece that passes, one that fails, and what is refused."""

import json
import subprocess
import sys

import pytest

from benchmarks.gpu import pieces
from benchmarks.gpu.page import page
from benchmarks.gpu.pieces import PIECES, ROOT, Piece, run_piece


def gpu(*arguments, python=sys.executable):
    return subprocess.run([python, ROOT / "tools/gpu.py", *arguments], capture_output=True, text=True, timeout=600)


def test_a_piece_is_recorded_and_replaces_its_last_result(tmp_path):
    record = tmp_path / "gpu.json"
    before = {"passed": False, "seconds": 1.0, "commit": "abc", "numbers": {}, "said": ["no memory"]}
    record.write_text(json.dumps({"environment": before, "step": before}))
    done = gpu("environment", "--cpu", "--json", record)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(record.read_text())
    assert list(results) == ["environment", "step"] and results["step"] == before
    assert results["environment"]["passed"]
    torch = results["environment"]["numbers"]["packages"]["torch"]
    assert torch["pinned"] == torch["installed"]
    text = record.with_suffix(".md").read_text()
    assert "On a CPU: small models only" in text and "## step failed" in text and "## environment failed" not in text


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["gold"], "no piece 'gold'; there are environment, golden"),
        (["environment"], "torch finds no GPU here; --cpu tries the pieces without one"),
        (["environment", "--cpu", "--wheels", "/nowhere"], "--wheels /nowhere: no such folder"),
    ],
)
def test_what_cannot_be_run_is_refused(arguments, message, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = gpu(*arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_tests_are_counted_and_failures_named(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "ROOT", tmp_path)
    (tmp_path / "test_some.py").write_text(
        "import pytest\n\ndef test_good(): pass\n\ndef test_bad(): assert 1 == 2, 'one is not two'\n\n"
        "def test_left_out(): pytest.skip('no GPU')\n"
    )
    piece = Piece("some tests", ("-m", "pytest", "test_some.py"), tests=True)
    record = run_piece(piece, tmp_path / "log", small=True)
    assert not record["passed"] and any("1 failed, 1 passed, 1 skipped" in line for line in record["said"])
    assert record["numbers"] == {
        "passed": 1,
        "skipped": 1,
        "failed": {"test_some::test_bad": ["AssertionError: one is not two"]},
    }
    monkeypatch.setitem(PIECES, "golden", piece)
    text = page({"golden": {"commit": "abc", **record}})
    assert "| golden | some tests | **failed**: 1 passed, 1 failed, 1 skipped |" in text and "one is not two" in text


def test_a_piece_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(pieces, "LIMIT_SECONDS", 1)
    piece = Piece("sleeps", ("-c", "import time; print('begun', flush=True); time.sleep(60)"))
    record = run_piece(piece, tmp_path / "log", small=True)
    assert not record["passed"] and record["said"] == ["begun", "stopped after 1 s"] and record["seconds"] < 30


def test_every_piece_names_what_exists():
    for piece in PIECES.values():
        for argument in piece.arguments:
            if argument.endswith(".py") or argument.startswith("tests/"):
                assert (ROOT / argument.removeprefix("--ignore=")).exists(), argument


def test_numbers_become_tables():
    spread = {"median": 85_000.0, "minimum": 84_000.0, "maximum": 86_000.0}
    numbers = {
        "recipes": {
            "recipes": {
                "780m_bov": {"tokens_per_second": spread, "mfu": 0.4, "peak_memory_bytes": 50 * 2**30},
                "780m_baseline": {"error": "CUDA out of memory"},
            }
        },
        "profile": {
            "profile": {
                "recipe": "780m_bov",
                "step_milliseconds": 400.0,
                "busy_milliseconds": 390.0,
                "launches": 5000,
                "kernels": [{"name": "gemm", "milliseconds": 200.0, "share": 0.5, "calls": 300}],
            }
        },
    }
    done = {"passed": True, "seconds": 60.0, "commit": "abc"}
    text = page({name: {**done, "numbers": found} for name, found in numbers.items()})
    assert "| 780m_bov | 85,000 | 84,000 to 86,000 | 40.0% | 50.0 GiB |" in text
    assert "| 780m_baseline | CUDA out of memory | | | |" in text
    assert "400 ms, the device busy for 390 of them, 5,000 launches." in text
    assert "| `gemm` | 200.00 | 50.0% | 300 |" in text
