"""One start of a run at a time: the second is refused, and nobody waits for the dead."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest

from bov_megatron.errors import RunFolderError
from bov_megatron.lifecycle import lease as module
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.lease import Lease, read_holder
from tests.support.runs import launch, overrides, train

FAST = {"beat_seconds": 0.1, "stale_seconds": 1.0, "environ": {}}
HOLDING = """
import sys, time
from pathlib import Path
from bov_megatron.lifecycle.lease import Lease
with Lease(Path(sys.argv[1]), beat_seconds=0.1, environ={}):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLDING, tmp_path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def elsewhere(path, **changes) -> None:
    """Let the lease look like another machine's."""
    path.write_text(json.dumps(dataclasses.asdict(read_holder(path)) | {"machine": "another", **changes}))


def test_refused_at_once_while_the_holder_lives(tmp_path, other):
    started = time.monotonic()
    with pytest.raises(RunFolderError) as refused, Lease(tmp_path, environ={}):
        pass
    assert time.monotonic() - started < 2
    holder = read_holder(tmp_path / run_folder.LEASE)
    for part in (str(tmp_path), f"process {other.pid}", holder.host, f"since {holder.since}", "name=…"):
        assert part in str(refused.value)
    assert read_holder(tmp_path / run_folder.LEASE).process == other.pid, "the refused one leaves it alone"


def test_taken_over_at_once_from_a_killed_process(tmp_path, other, capsys):
    """Killed, and not even waited for by its parent: a zombie."""
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    started = time.monotonic()
    with Lease(tmp_path, beat_seconds=0.1, environ={}):
        assert read_holder(tmp_path / run_folder.LEASE).process == os.getpid()
    assert time.monotonic() - started < 2
    assert f"taking over from host {module.socket.gethostname()}, process {other.pid}" in capsys.readouterr().err


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path):
    with Lease(tmp_path, **FAST):
        holder = dataclasses.asdict(read_holder(tmp_path / run_folder.LEASE))
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / run_folder.LEASE).write_text(json.dumps(holder | {"process_started": holder["process_started"] - 1}))
    with Lease(tmp_path, **FAST):
        pass


def test_the_same_slurm_job_started_again(tmp_path, capsys):
    """After a node died its lease looks alive for a minute; Slurm has ended all of that start."""
    first = Lease(tmp_path, beat_seconds=60, environ={"SLURM_JOB_ID": "7"})
    first.__enter__()
    elsewhere(first.path)
    started = time.monotonic()
    with Lease(tmp_path, environ={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "1"}):
        assert read_holder(first.path).restart == 1
    assert time.monotonic() - started < 2
    assert "Slurm job 7" in capsys.readouterr().err
    first.__exit__()


def test_another_machine_is_watched(tmp_path, capsys):
    """Refused when a beat is seen, whatever its clock says; taken over when there is none for long enough."""
    with Lease(tmp_path, beat_seconds=60, environ={}) as silent:
        elsewhere(silent.path, since="2099-01-01 00:00:00")
        with Lease(tmp_path, **FAST) as taker:
            assert read_holder(silent.path).token == taker.me.token
    assert "no sign of life for 1 s" in capsys.readouterr().err
    tmp_path.mkdir(exist_ok=True)
    with Lease(tmp_path, beat_seconds=0.1, environ={}) as living:
        living.me = dataclasses.replace(living.me, machine="another")
        time.sleep(0.3)
        with pytest.raises(RunFolderError, match="is in use"), Lease(tmp_path, **FAST | {"stale_seconds": 30}):
            pass
        assert not living.lost


def test_a_suspended_holder_notices_that_it_lost(tmp_path):
    with Lease(tmp_path, beat_seconds=0.1, environ={}) as suspended:
        with Lease(tmp_path.parent / "other", **FAST) as other:
            deadline = time.monotonic() + 10
            while not suspended.lost:
                taken = tmp_path / "taken"
                taken.write_text(other.path.read_text())
                taken.replace(suspended.path)
                assert time.monotonic() < deadline
                time.sleep(0.02)
        token = read_holder(suspended.path).token
    assert read_holder(suspended.path).token == token, "the new holder's lease stays"


def test_half_a_lease_does_not_end_the_renewals(tmp_path, capsys):
    with Lease(tmp_path, beat_seconds=0.05, environ={}) as holding:
        whole, before = holding.path.read_text(), read_holder(holding.path).beat
        holding.path.write_text(whole[:20])
        time.sleep(0.2)
        holding.path.write_text(whole)
        deadline = time.monotonic() + 10
        while read_holder(holding.path).beat <= before:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert not holding.lost
    assert "cannot be renewed" in capsys.readouterr().err


def test_a_folder_with_nothing_in_it_goes_again(tmp_path):
    with Lease(tmp_path / "run", **FAST):
        assert (tmp_path / "run" / run_folder.LEASE).exists()
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunFolderError, match="run folder .*/file/run cannot be written .*: .*output_dir=…"):
        Lease(tmp_path / "file" / "run", **FAST).__enter__()


def test_a_strange_file_is_named(tmp_path):
    (tmp_path / run_folder.LEASE).write_text("{}")
    with pytest.raises(RunFolderError, match="not a lease of this version.*remove it if no run uses the folder"):
        Lease(tmp_path, **FAST).__enter__()


def test_a_second_start_is_refused_on_all_ranks(prepared_data, tmp_path, other):
    arguments = overrides(prepared_data, tmp_path, "train.steps=2")
    results = launch(2, arguments)
    assert [code for code, _ in results] == [2, 2]
    errors = [line for _, text in results for line in text.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and errors[0].startswith(f"error: run folder {tmp_path} is in use"), errors
    other.kill()
    other.wait()
    assert "taking over from" in train(2, arguments)
    assert not (tmp_path / run_folder.LEASE).exists()
