"""SIGKILL at any moment: the run is started again, and nothing of it differs in the end."""

import os
import random
import signal
import statistics
import subprocess
import sys
import time

import psutil
import pytest

from tests.support.launcher import PHASES, Launch
from tests.support.results import lines_of, same_as, wait_until
from tests.support.runs import SMOKE, overrides, train

SEED = 20261122
ARGUMENTS = [
    "train.steps=80",
    "checkpoint.interval=4",
    "checkpoint.keep_last=2",
    "checkpoint.asynchronous=true",
    "validation.interval=5",
]


@pytest.fixture(scope="module")
def undisturbed(prepared_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    train(2, overrides(prepared_data, folder, *ARGUMENTS))
    return folder


def moments(kills: int) -> list[tuple[str, int, int, float]]:
    """(phase, rank, how often it has begun, seconds into it) of each kill: all phases, in random order."""
    chance = random.Random(SEED)
    phases = [PHASES[number % len(PHASES)] for number in range(kills)]
    chance.shuffle(phases)
    return [
        (
            phase,
            chance.randrange(2),
            1 if phase == "start-up" else chance.randint(1, 3 if phase == "step" else 2),
            chance.uniform(0, 1.0 if phase == "start-up" else 0.03),
        )
        for phase in phases
    ]


def unfinished_saves(run_dir) -> str:
    return ", ".join(path.name for path in (run_dir / "checkpoints").glob("*.saving"))


def test_twenty_kills(prepared_data, undisturbed, tmp_path, say):
    """Twenty times kill -9 of one of two ranks: in start-up, steps, validations and saves; then to the end."""
    run_dir = tmp_path / "run"
    arguments = overrides(prepared_data, run_dir, *ARGUMENTS)
    hit, recovery, killed_at = set(), [], None
    say(f"seed {SEED}")
    for number, (phase, rank, times, into) in enumerate(moments(20), 1):
        with Launch(2, arguments, tmp_path / f"start{number}") as launch:
            if phase != "start-up":
                launch.wait_for("step", rank)
                if killed_at:
                    recovery.append(time.monotonic() - killed_at)
            launch.wait_for(phase, rank, times)
            time.sleep(into)
            doing, after = launch.phase(rank), launch.seconds
            launch.kill(rank)
            killed_at = time.monotonic()
            statuses = launch.wait()
            hit.add(doing)
            say(
                f"kill {number:2}: rank {rank}, {after:4.2f} s after the start, in {doing:<10}  statuses "
                f"{str(statuses):<9}  {lines_of(run_dir):2} steps  {unfinished_saves(run_dir)}"
            )
            assert statuses[rank] == -signal.SIGKILL and 0 not in statuses
    with Launch(2, arguments, tmp_path / "last") as launch:
        assert launch.wait() == [0, 0], launch.output()
        say(launch.output().splitlines()[0])
    assert hit == set(PHASES)
    say(f"from a kill to the next step: {statistics.median(recovery):.1f} s (median), {max(recovery):.1f} s at most")
    say(same_as(undisturbed, run_dir))


def torchrun(arguments: list[str], log) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen(
        [*command, "-m", "bov_megatron.train", SMOKE, *arguments],
        stdout=log,
        stderr=log,
    )


def ranks_of(agent: subprocess.Popen) -> list[psutil.Process]:
    """The training processes, by rank."""
    children = [child for child in psutil.Process(agent.pid).children() if "RANK" in child.environ()]
    return sorted(children, key=lambda child: int(child.environ()["RANK"]))


def test_kills_under_torchrun(prepared_data, undisturbed, tmp_path, say):
    """Real torchrun: kill -9 of a rank while a checkpoint is being written, then of torchrun itself."""
    run_dir, agents = tmp_path / "run", []
    arguments = overrides(prepared_data, run_dir, *ARGUMENTS)

    def start(name: str) -> subprocess.Popen:
        with (tmp_path / name).open("wb") as log:
            agents.append(torchrun(arguments, log))
        return agents[-1]

    try:
        agent = start("first")
        wait_until(lambda: lines_of(run_dir) >= 6 and unfinished_saves(run_dir), "a save")
        ranks_of(agent)[1].kill()
        saving = unfinished_saves(run_dir)
        assert agent.wait(240) == 1
        say(f"rank 1 killed with {saving or 'a checkpoint just finished'}: torchrun ended with 1")

        agent = start("second")
        wait_until(lambda: lines_of(run_dir) >= 16, "sixteen steps")
        orphans = ranks_of(agent)
        agent.kill()
        agent.wait()
        with Launch(2, arguments, tmp_path / "refused") as launch:
            assert launch.wait() == [2, 2], launch.output()
            say(f"torchrun killed; its ranks go on, and a start beside them is refused: {launch.output().strip()}")
        assert f"is in use: host {os.uname().nodename}, process {orphans[0].pid}" in launch.output()
        psutil.wait_procs(orphans, timeout=240)

        say(f"the ranks without torchrun have ended: {lines_of(run_dir)} steps; started once more")
        assert start("last").wait(240) == 0, (tmp_path / "last").read_text()
        say(same_as(undisturbed, run_dir))
    finally:
        for agent in agents:
            if agent.poll() is None:
                for rank in ranks_of(agent):
                    rank.kill()
                agent.kill()
                agent.wait()
