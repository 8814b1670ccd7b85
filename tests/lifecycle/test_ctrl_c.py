"""Ctrl-C in a terminal, in training and in each tool: a line, the right exit status, no traceback, nothing lost or half
done. Few moments of each; twenty random ones of each are in tests/faults/test_interrupts.py."""

import json
import sys
import sysconfig
import time
from pathlib import Path

import psutil
import pytest

from bov_megatron.lifecycle import run_folder
from tests.support.interrupts import Command, tool
from tests.support.results import lines_of
from tests.support.runs import SMOKE, overrides, train

LONG = ["train.steps=100000", "checkpoint.interval=0", "validation.interval=0", "logging.wandb=offline"]
TRAIN = [sys.executable, "-m", "bov_megatron.train"]
TORCHRUN = tool("torchrun", "--nproc-per-node", "2")


def check_saved(run_dir: Path) -> None:
    """Every step in the metrics is in a checkpoint."""
    newest = run_folder.latest_checkpoint(run_dir)
    assert newest is not None and run_folder.step_of(newest) == lines_of(run_dir)


@pytest.mark.parametrize("launcher", [TRAIN, TORCHRUN], ids=["one process", "torchrun"])
def test_training_ends_with_all_steps_saved(prepared_data, tmp_path, launcher):
    run_dir = tmp_path / "run"
    with Command([*launcher, SMOKE, *overrides(prepared_data, run_dir, *LONG)], tmp_path / "log") as command:
        command.wait_for(lambda: lines_of(run_dir) >= 3)
        ended = command.interrupt().check(143)
    assert ended.output.count("once more ends it at once") == 1
    assert ended.output.splitlines()[-1] == "stopped by Ctrl-C, all steps done are saved: start again to continue"
    check_saved(run_dir)
    assert not (run_dir / "lease.json").exists()


def test_training_ends_at_once_where_nothing_is_begun(prepared_data, tmp_path):
    run_dir = tmp_path / "run"
    with Command([*TRAIN, SMOKE, *overrides(prepared_data, run_dir, *LONG)], tmp_path / "log") as command:
        command.wait_for(lambda: "loading torch" in command.output)
        ended = command.interrupt().check(143)
    assert ended.output.splitlines()[-1] == "stopped by Ctrl-C before the first step"
    assert len(ended.output.splitlines()) == 2 and not run_dir.exists()


@pytest.fixture(scope="module")
def run_dir(prepared_data, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train(1, overrides(prepared_data, folder, "train.steps=1", "validation.interval=0"))
    return folder


@pytest.fixture(scope="module")
def export(run_dir, tmp_path_factory) -> Path:
    from bov_megatron.exchange.convert import to_hf

    return to_hf(run_dir, tmp_path_factory.mktemp("export") / "export", check_parity=False).out_dir


def interrupted(arguments, log: Path, seconds: float):
    """How a tool ends that is interrupted so long after it has begun: with a line and 130."""
    with Command(arguments, log) as command:
        command.wait_for(command.hears)
        time.sleep(seconds)
        ended = command.interrupt().check(130)
    assert ended.output.splitlines()[-1].startswith("interrupted")
    return ended


@pytest.mark.parametrize("seconds", [0.0, 1.0])
def test_conversion_leaves_nothing(run_dir, tmp_path, seconds):
    interrupted(tool("convert", "to-hf", run_dir, tmp_path / "export"), tmp_path / "log", seconds)
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_an_interrupted_export_leaves_the_one_before(run_dir, export, tmp_path, monkeypatch):
    """At the last moment: between the two renames."""
    from bov_megatron.exchange.convert import to_hf

    to_hf(run_dir, tmp_path / "export", check_parity=False)
    before = sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "export").iterdir())
    rename, calls = Path.rename, []

    def second_time(self, target):
        if target == tmp_path / "export" and not calls.append(1) and len(calls) == 1:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_time)
    with pytest.raises(KeyboardInterrupt):
        to_hf(run_dir, tmp_path / "export", check_parity=False, overwrite=True)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in (tmp_path / "export").iterdir()) == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_evaluation_writes_no_scores(export, prepared_data, tmp_path):
    options = ["--packed", prepared_data.folder / "val", "--json", tmp_path / "scores.json"]
    interrupted(tool("evaluate", export, *options), tmp_path / "log", 0.5)
    assert not (tmp_path / "scores.json").exists()


def test_preparation_says_how_to_go_on(prepared_data, tmp_path):
    text = Path(sysconfig.get_path("stdlib"), "asyncio")
    options = ["--tokenizer", prepared_data.tokenizer, "--out", tmp_path / "data", "--workers", "2", "--quiet"]
    ended = interrupted(tool("prepare_data", text, *options), tmp_path / "log", 0.1)
    assert ended.output == "interrupted; run the same command again to go on\n"
    assert not (tmp_path / "data/manifest.json").exists()


def test_short_tools_end_too(run_dir, tmp_path):
    for name, arguments in (
        ("plan", [SMOKE]),
        ("checkpoint", ["verify", run_dir]),
        ("train_tokenizer", [sysconfig.get_path("stdlib"), "--out", tmp_path / "tokenizer"]),
        ("torchrun", ["--nproc-per-node", "1", SMOKE]),
        ("bench", ["--quick"]),
        ("document_recipes", ["--check"]),
    ):
        assert interrupted(tool(name, *arguments), tmp_path / name, 0.0).output == "interrupted\n"
    assert not (tmp_path / "tokenizer").exists()


def test_benchmarks_end_with_their_ranks(tmp_path):
    with Command(tool("bench", "lookup", "--quick", "--threads", "1"), tmp_path / "log") as command:
        bench = psutil.Process(command.process.pid)
        command.wait_for(lambda: set(bench.children(recursive=True)) > set(bench.children()))  # ranks are forked twice
        others = bench.children(recursive=True)
        command.interrupt().check(130)
        _, alive = psutil.wait_procs(others, timeout=30)
    assert not alive


def test_the_demo_ends_with_the_command_that_it_runs(tmp_path):
    with Command(tool("demo", "--out", tmp_path / "demo"), tmp_path / "log") as command:
        command.wait_for(lambda: "checking: 100%" in command.output)
        others = psutil.Process(command.process.pid).children(recursive=True)
        ended = command.interrupt().check(130)
        _, alive = psutil.wait_procs(others, timeout=10)
    assert others and not alive
    assert [line for line in ended.output.splitlines() if "interrupted" in line] == ["interrupted"]
    assert not any((tmp_path / "demo").iterdir())


def test_a_line_of_metrics_has_its_own_rate(run_dir):
    """And the running mean its own name."""
    (line,) = map(json.loads, (run_dir / run_folder.METRICS).read_text().splitlines())
    assert line["tokens_per_second"] * line["step_seconds"] == pytest.approx(line["tokens"])
    assert "mean_tokens_per_second" in line
