"""Whether an ended run is started again, without end or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from bov_megatron import errors
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.restarts import decide

ROOT = Path(__file__).resolve().parents[2]


def save(run_dir, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize("status", [errors.INTERRUPTED, errors.CRASHED, errors.HANG, 137])
def test_again_as_long_as_there_is_progress(tmp_path, status):
    for step in (10, 20, 30, 40, 50):
        save(tmp_path, step)
        decision = decide(tmp_path, status)
        assert decision.again and f"step {step}" in decision.reason


@pytest.mark.parametrize("status", [errors.INTERRUPTED, errors.CRASHED])
def test_given_up_without_progress(tmp_path, status):
    """A checkpoint that is being written is none."""
    run_dir = tmp_path / "run"
    save(run_dir, 10)
    assert decide(run_dir, status).again
    (run_dir / "checkpoints" / "step_00000020.1f3a.saving").mkdir()
    assert [decide(run_dir, status).again for _ in range(2)] == [True, True]
    decision = decide(run_dir, status)
    assert not decision.again
    for part in ("3 starts in a row made no new checkpoint", "of step 10", f"status {status}", "submit again"):
        assert part in decision.reason
    assert decide(run_dir, status).again, "who submits again has seen to it"


def test_progress_forgets_what_was_before(tmp_path):
    save(tmp_path, 10)
    decide(tmp_path, 1)
    assert [decide(tmp_path, 1).again for _ in range(2)] == [True, True]
    save(tmp_path, 20)
    assert [decide(tmp_path, 1).again for _ in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("status", [errors.DONE, errors.CANNOT_START, errors.NOT_WORTH_GOING_ON])
def test_final_statuses(tmp_path, status):
    save(tmp_path, 10)
    decide(tmp_path, 1)
    assert (tmp_path / run_folder.RESTARTS).exists()
    assert not decide(tmp_path, status).again
    assert not (tmp_path / run_folder.RESTARTS).exists()


def test_a_damaged_count_is_none(tmp_path):
    (tmp_path / run_folder.RESTARTS).write_text('{"step": 1')
    assert decide(tmp_path, 1).again


def test_tool(tmp_path):
    def ask(*arguments):
        command = [sys.executable, ROOT / "tools/requeue.py", ROOT / "recipes/smoke.yaml", f"output_dir={tmp_path}"]
        run = subprocess.run([*command, *arguments], capture_output=True, text=True)
        return run.returncode, run.stdout + run.stderr

    assert ask("--status", "143", "--limit", "2")[0] == 0
    code, text = ask("--status", "143", "--limit", "2")
    assert code == 1 and "2 starts in a row made no new checkpoint" in text
    assert ask("--status", "0") == (1, "all steps are done\n")
    assert ask("--status", "1", "trian.steps=1")[0] == 1
