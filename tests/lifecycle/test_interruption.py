"""Told to end by a signal or its own time limit, wherever it is: saved, and nothing of the run differs in the end."""

import contextlib
import io
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.interruption import StopReason, StopRequest, StopSignals
from bov_megatron.lifecycle.signals import ONE_PRESS_SECONDS
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train


def stopped_rank(rank, world_size, arguments, where, at_call):
    """The run, whose second rank alone is sent SIGUSR1 in the `at_call`-th call of `where`; validation goes by single
    micro-batches. Returns status, stderr and the number of calls."""
    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.evaluation import bits_per_byte

    bits_per_byte.HELD_OUT_CHUNK = 1
    calls = []

    def signalling(self, *positional, **named):
        calls.append(1)
        if len(calls) == at_call and rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *positional, **named)

    original = getattr(MegatronEngine, where)
    setattr(MegatronEngine, where, signalling)
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue(), len(calls)


def late_rank(rank, world_size, arguments, at_step, status_file):
    """The run, with the second rank's clock an hour ahead from a step on."""
    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.lifecycle import interruption

    steps = []

    class Clock:
        def monotonic(self):
            return 3600.0 if len(steps) >= at_step and rank == 1 else 0.0

    def counting(self, micro_batches):
        steps.append(1)
        return forward_backward(self, micro_batches)

    interruption.time = Clock()
    os.environ["BOV_STATUS_FILE"] = status_file
    forward_backward, MegatronEngine.forward_backward = MegatronEngine.forward_backward, counting
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue()


@pytest.fixture(scope="module")
def undisturbed(prepared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, overrides(prepared_data, folder, "checkpoint.interval=0"))
    return metrics(folder)


@pytest.mark.parametrize("at_call, at_step", [(2, 4), (7, 8)], ids=["midway", "at the end"])
def test_validation_is_abandoned_and_made_good(prepared_data, tmp_path, undisturbed, at_call, at_step):
    """Four micro-batches on each rank, at steps 4 and 8."""
    arguments = overrides(prepared_data, tmp_path, "checkpoint.interval=0")
    results = run_ranks(stopped_rank, 2, arguments, "score_sums", at_call)
    assert [(code, calls) for code, _, calls in results] == [(143, at_call)] * 2, "no more is scored"
    assert "stopped by SIGUSR1, all steps done are saved" in results[0][1]
    assert run_folder.latest_checkpoint(tmp_path).name == f"step_{at_step:08d}"
    lines = metrics(tmp_path)
    assert len(lines) == at_step and "validation_bits_per_byte" not in lines[-1]
    assert f"resuming after step {at_step}" in train(2, arguments)
    made_good = metrics(tmp_path)[at_step]
    assert made_good["step"] == at_step and "loss" not in made_good, "a line of its own"
    lines = metrics(tmp_path)
    lines[at_step - 1] |= lines.pop(at_step)
    assert lines == undisturbed
    train(2, arguments)
    assert len(metrics(tmp_path)) == len(undisturbed) + 1, "owed once"


def test_before_the_first_step_there_is_nothing_to_save(prepared_data, tmp_path, undisturbed):
    arguments = overrides(prepared_data, tmp_path, "checkpoint.interval=0")
    assert [code for code, *_ in run_ranks(stopped_rank, 2, arguments, "__init__", 1)] == [143, 143]
    assert run_folder.latest_checkpoint(tmp_path) is None
    assert "from the beginning" in train(2, arguments)
    assert metrics(tmp_path) == undisturbed


def test_time_limit(prepared_data, tmp_path, undisturbed):
    arguments = overrides(prepared_data, tmp_path, "checkpoint.interval=0")
    results = run_ranks(late_rank, 2, [*arguments, "train.max_minutes=59"], 5, str(tmp_path / "status"))
    assert [code for code, _ in results] == [143, 143]
    assert (tmp_path / "status").read_text() == "143\n", "for a launcher that asks"
    assert "stopped by train.max_minutes, all steps done are saved" in results[0][1]
    assert len(metrics(tmp_path)) == 5
    assert "resuming after step 5" in train(2, arguments)
    assert metrics(tmp_path) == undisturbed


BUSY = """mutex = ctypes.create_string_buffer(256)
for _ in range(2): ctypes.CDLL(None).pthread_mutex_lock(mutex)"""
"""Inside a C function: it locks a mutex that it has locked itself."""
SWALLOWS = """while True:
    try: time.sleep(99)
    except BaseException: pass"""


def listening(tmp_path, code: str) -> subprocess.Popen:
    """A process that runs `code`, and that is at its end by now."""
    head = "import ctypes, threading, time\nfrom bov_megatron.lifecycle.interruption import CtrlC, StopSignals"
    soon = "threading.Timer(0.5, print, ['ready'], {'flush': True}).start()"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{head}\n{soon}\n{code}"],
        stdout=subprocess.PIPE, stderr=(tmp_path / "stderr").open("wb"), text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_same_signal_twice_ends_the_process_and_another_does_not(tmp_path):
    process = listening(tmp_path, f"signals = StopSignals(); signals.listen()\n{BUSY}")
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # moments later: torchrun passes on what the process has got already
    time.sleep(ONE_PRESS_SECONDS + 0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    said = (tmp_path / "stderr").read_text().splitlines()
    assert {line.split(":")[0] for line in said} == {"SIGUSR1", "SIGTERM"} and "once more ends it at once" in said[0]


def test_ctrl_c_ends_a_tool_inside_a_library_that_computes(tmp_path):
    process = listening(tmp_path, f"signals = CtrlC('; and so on'); signals.listen()\n{BUSY}")
    process.send_signal(signal.SIGINT)
    started = time.monotonic()
    assert process.wait(30) == 130 and time.monotonic() - started < 2.5
    assert (tmp_path / "stderr").read_text() == "interrupted; and so on\n"


def test_ctrl_c_ends_a_tool_that_swallows_it(tmp_path):
    process = listening(tmp_path, f"signals = CtrlC(); signals.REMOVAL_SECONDS = 1; signals.listen()\n{SWALLOWS}")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_ranks_of_torchrun_end_with_it_after_a_signal(tmp_path):
    """The second Ctrl-C ends torchrun only: its ranks are in sessions of their own."""
    rank = "signals = StopSignals(); signals.listen(); print(os.getpid(), 'ready', flush=True); time.sleep(120)"
    code = f"import os, time; from bov_megatron.lifecycle.interruption import StopSignals; {rank}"
    agent = (
        f"import subprocess, sys, os; os.environ['TORCHELASTIC_RUN_ID'] = '1'; "
        f"subprocess.run([sys.executable, '-c', {code!r}], start_new_session=True)"
    )
    with subprocess.Popen([sys.executable, "-c", agent], stdout=subprocess.PIPE, text=True) as process:
        rank = psutil.Process(int(process.stdout.readline().split()[0]))
        rank.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert rank.is_running()
        process.kill()
        rank.wait(30)


def test_the_end_of_the_job_leaves_time_for_a_save():
    with StopSignals() as signals:
        request = StopRequest(signals, None, job_end=time.time() + 80)
        assert request() is StopReason.NONE
        request.note_save(25)
        assert request() is StopReason.NONE
        request.note_save(33)
        request.note_save(2)
        assert request() is StopReason.JOB_END
        request = StopRequest(signals, None, job_end=time.time() + 17.5)
        time.sleep(1)  # the start and the first step
        assert request() is StopReason.NONE
        time.sleep(1)
        assert request() is StopReason.JOB_END


def test_handlers_from_before_are_restored():
    former = {number: signal.getsignal(number) for number in StopSignals.REASONS}
    with StopSignals() as signals:
        request = StopRequest(signals, None)
        assert request() is StopReason.NONE
        os.kill(os.getpid(), signal.SIGUSR1)
        assert request() is StopReason.SIGUSR1
        os.kill(os.getpid(), signal.SIGINT)
        assert request() is StopReason.SIGINT
        os.kill(os.getpid(), signal.SIGTERM)
        assert request() is StopReason.SIGTERM
    assert {number: signal.getsignal(number) for number in former} == former
