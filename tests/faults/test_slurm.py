"""Nodes that die, operators, other numbers of nodes, neighbours: real jobs on a real Slurm cluster."""

import os
import signal
import time

import pytest

from tests.slurm.conftest import REPOSITORY
from tests.slurm.test_slurm import CPU_FLAGS, no_rank_left, rank_process
from tests.support.cluster import ClusterUnavailable, SlurmCluster, install_slurm
from tests.support.results import lines_of, same_as
from tests.support.runs import overrides, steps, train

RUN = ["train.steps=200", "checkpoint.interval=10", "validation.interval=50"]
PATIENCE = 400


@pytest.fixture(scope="module")
def undisturbed(prepared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, overrides(prepared_data, folder, *RUN))
    return folder


@pytest.fixture
def submit(tmp_path, job_environ):
    """`submit(cluster, fields, *flags)`: a job that may queue itself again."""

    def run(cluster, fields: list[str], *flags: str) -> int:
        log = f"--output={tmp_path}/%j.out"
        flags = (*CPU_FLAGS, "--ntasks-per-node=1", log, *flags)
        return cluster.submit(
            *flags, "slurm/135m_bov.sh", *fields, cwd=REPOSITORY, **job_environ | {"BOV_REQUEUE": "1"}
        )

    return run


def wait_for_lines(cluster, job: int, run_dir, lines: int) -> int:
    """Until so many steps are in the metrics; how many there are."""

    def done() -> bool:
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED"), f"{state}\n{cluster.log(job)}"
        return lines_of(run_dir) >= lines

    cluster._wait(done, PATIENCE)
    return lines_of(run_dir)


def nodes_of(cluster, job: int) -> str:
    return cluster.job(job)["NodeList"]


def requeue_lines(log: str) -> list[str]:
    return [
        line
        for line in log.splitlines()
        if line.startswith(("launch.sh:", "slurmstepd:", "srun: error: Node", "world"))
    ]


def test_whole_nodes_die(prepared_data, undisturbed, submit, tmp_path, say):
    """kill -9 of a node's slurmd and all its processes, twice: first a third node takes its place, then it is back."""
    try:
        install_slurm()
    except ClusterUnavailable as error:
        pytest.skip(str(error))
    run_dir = tmp_path / "run"
    with SlurmCluster(nodes=3, slurmd_timeout=10) as cluster:
        job = submit(cluster, overrides(prepared_data, run_dir, *RUN))
        done = wait_for_lines(cluster, job, run_dir, 30)
        say(f"job {job} on {nodes_of(cluster, job)}, {done} steps done")
        killed = cluster.kill_node("node1")
        done = lines_of(run_dir)
        say(f"node1 (batch script, rank 0) killed: {killed} processes, {done} steps done")
        cluster._wait(lambda: cluster.node_state("node1").startswith("down"), PATIENCE)
        say(f"Slurm takes node1 for {cluster.node_state('node1')}; job {cluster.job(job)['JobState']}")
        done = wait_for_lines(cluster, job, run_dir, done + 30)
        say(f"it goes on on {nodes_of(cluster, job)}, {done} steps done, restarts {cluster.job(job)['Restarts']}")
        killed = cluster.kill_node("node3")
        done = lines_of(run_dir)
        say(f"node3 (rank 1) killed: {killed} processes, {done} steps done; node1 is started again")
        cluster.start_node("node1")
        ended = cluster.wait_for_end(job, PATIENCE)
        say(f"ended {ended['JobState']} on {ended['NodeList']}, restarts {ended['Restarts']}")
        for line in requeue_lines(cluster.log(job)):
            say(f"log: {line}")
        assert ended["JobState"] == "COMPLETED", cluster.log(job)
    say(same_as(undisturbed, run_dir))


FEW = ["train.steps=30", "train.global_batch_size=64", "checkpoint.interval=5", "optimizer.name=adamw"]
"""Few, as layouts drift apart by rounding; and slow enough to be stopped before the last ones."""


def test_an_operator_requeues_and_goes_on_on_one_node(cluster, prepared_data, submit, tmp_path, say):
    """scontrol requeue of a running job; then it is cancelled and submitted again on one node instead of two."""
    alone, run_dir = tmp_path / "alone", tmp_path / "run"
    train(2, overrides(prepared_data, alone, *FEW))
    fields = overrides(prepared_data, run_dir, *FEW)
    job = submit(cluster, fields)
    done = wait_for_lines(cluster, job, run_dir, 7)
    cluster.command("scontrol", "requeue", str(job))
    say(f"job {job} on {nodes_of(cluster, job)}, {done} steps done: scontrol requeue")
    cluster._wait(lambda: cluster.job(job)["Restarts"] == "1" and cluster.job(job)["JobState"] == "RUNNING", PATIENCE)
    done = wait_for_lines(cluster, job, run_dir, max(done, lines_of(run_dir)) + 3)
    cluster.command("scancel", str(job))
    ended = cluster.wait_for_end(job, PATIENCE)
    saved = lines_of(run_dir)
    say(f"back as restart {ended['Restarts']}; cancelled: {ended['JobState']}, {saved} steps done")
    assert saved < 27, "nothing left to compare"

    second = submit(cluster, fields, "--nodes=1")
    ended = cluster.wait_for_end(second, PATIENCE)
    log = cluster.log(second)
    assert ended["JobState"] == "COMPLETED", log
    say(f"job {second} on {ended['NodeList']}: {ended['JobState']}")
    resumed = next(line for line in log.splitlines() if "resuming after step" in line)
    assert "1 ranks: tensor 1 × pipeline 1 × context 1 × data 1" in resumed
    say(resumed)
    ours, theirs = steps(run_dir), steps(alone)
    assert [line["digest"] for line in ours] == [line["digest"] for line in theirs]
    switched = int(resumed.rpartition("step ")[2])
    assert ours[:switched] == theirs[:switched], "on two nodes bit for bit, whoever stopped it"
    drift = [abs(a["loss"] - b["loss"]) / b["loss"] for a, b in zip(ours, theirs, strict=True)][switched:]
    say(
        f"steps 1–{switched} bit for bit; from there on one node: relative differences {max(drift[:3]):.1e} in three "
        f"steps, {max(drift):.1e} in {len(drift)}"
    )
    assert max(drift[:3]) < 1e-6 and max(drift) < 1e-5


def test_two_jobs_on_one_node(cluster, prepared_data, undisturbed, submit, tmp_path, say):
    """At once, over one cache of the same data; and a third that wants the first one's run folder."""
    cache = [f"data.path={tmp_path}/cache", f"data.remote={prepared_data.folder}"]
    here = ("--nodes=1", "--nodelist=node1", "--ntasks-per-node=2")
    runs = [tmp_path / name for name in ("one", "two")]
    jobs = [submit(cluster, overrides(prepared_data, run_dir, *RUN, *cache), *here) for run_dir in runs]
    for job, run_dir in zip(jobs, runs, strict=True):
        wait_for_lines(cluster, job, run_dir, 1)
    states = [(cluster.job(job)["JobState"], nodes_of(cluster, job)) for job in jobs]
    say(f"jobs {jobs}: {states}")
    assert states == [("RUNNING", "node1")] * 2
    held = rank_process(cluster, 0, jobs[0])
    os.kill(held, signal.SIGSTOP)  # or it might have ended before the third has come so far
    third = submit(cluster, overrides(prepared_data, runs[0], *RUN, *cache), "--nodes=1", "--nodelist=node2")
    ended = cluster.wait_for_end(third, PATIENCE)
    log = cluster.log(third)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "2:0", "0"), log
    refusal = next(line for line in log.splitlines() if "is in use" in line)
    say(f"job {third} on the first one's folder: {refusal}")
    assert f"Slurm job {jobs[0]}" in refusal
    os.kill(held, signal.SIGCONT)
    for job, run_dir in zip(jobs, runs, strict=True):
        ended = cluster.wait_for_end(job, PATIENCE)
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "0"), cluster.log(job)
        say(f"job {job}: {same_as(undisturbed, run_dir)}")


def test_a_killed_rank_brings_the_job_back(cluster, prepared_data, undisturbed, submit, tmp_path, say):
    """kill -9 of one rank: the others don't sit in a collective for half an hour; the job queues itself again."""
    run_dir = tmp_path / "run"
    job = submit(cluster, overrides(prepared_data, run_dir, *RUN))
    wait_for_lines(cluster, job, run_dir, 30)
    killed = time.monotonic()
    os.kill(rank_process(cluster, 1), signal.SIGKILL)
    say(f"rank 1 killed, {lines_of(run_dir)} steps done")
    assert no_rank_left(cluster)
    say(f"no rank left {time.monotonic() - killed:.1f} s later")
    ended = cluster.wait_for_end(job, PATIENCE)
    for line in requeue_lines(cluster.log(job)):
        say(f"log: {line}")
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    say(same_as(undisturbed, run_dir))
