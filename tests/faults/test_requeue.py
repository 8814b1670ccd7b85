"""Jobs that come back by themselves, on a real two-node cluster. In most tests a few lines of shell stand for the
training, so that what is under test is the job script, Slurm, and the time that a start takes."""

import sys
from pathlib import Path

import pytest

from bov_megatron.data.loader import TrainLoader
from bov_megatron.recipe import load_recipe
from tests.slurm.conftest import REPOSITORY, read_metrics
from tests.slurm.test_slurm import CPU_FLAGS, LONG, SHORT, no_rank_left, overrides, wait_until_training

# Rank 0 leaves the status as the real one does. Rank 1 is slower to end.
SHELL = """#!/bin/bash
[[ "$*" == *bov_megatron.train* ]] || exec {python} "$@"
[[ "$*" != *--check* ]] || exit 0
run=$BOV_OUTPUT_DIR/smoke start=${{SLURM_RESTART_COUNT:-0}} rank=$SLURM_PROCID
end() {{
    if [[ $rank == 0 ]]; then echo $1 >"$BOV_STATUS_FILE"; else sleep 0.5; fi
    exit $1
}}
save() {{
    local folder="$run/checkpoints/step_$(printf %08d $1)"
    if [[ $rank == 0 ]]; then mkdir -p "$folder"; fi
    until [[ -d $folder ]]; do sleep 0.1; done
}}
forever() {{ touch "$run.$start.$rank"; while :; do sleep 0.1; done; }}
mkdir -p "$BOV_OUTPUT_DIR"
{script}
"""


@pytest.fixture
def start(cluster, tmp_path, job_environ):
    """`start(shell script)`: a job whose training is that script."""

    def run(script: str, *flags: str, **environ: str) -> int:
        python = tmp_path / "python"
        python.write_text(SHELL.format(python=sys.executable, script=script))
        python.chmod(0o755)
        log = f"--output={tmp_path}/%x-%j.out"
        environ = job_environ | {"BOV_PYTHON": str(python), "BOV_REQUEUE": "1"} | environ
        return cluster.submit(
            *CPU_FLAGS, "--ntasks-per-node=1", log, *flags, "slurm/135m_bov.sh", cwd=REPOSITORY, **environ
        )

    return run


def wait_for(cluster, job: int, *files: Path) -> None:
    cluster._wait(lambda: all(file.exists() for file in files), SHORT)


@pytest.mark.parametrize("whom", [["--batch"], []], ids=["to the script", "to the steps"])
def test_interrupted_then_crashed_then_done(cluster, start, tmp_path, whom):
    """--signal=B:USR1@… signals the script, --signal=USR1@… and scancel the steps."""
    job = start(
        """
        trap 'save 10; end 143' USR1
        case $start in
        0) forever ;;
        1) save 20; if [[ $rank == 1 ]]; then kill -9 $$; else sleep 60; fi ;;
        *) end 0 ;;
        esac"""
    )
    wait_for(cluster, job, *(tmp_path / "runs" / f"smoke.0.{rank}" for rank in (0, 1)))
    cluster.command("scancel", "--signal=USR1", *whom, str(job))
    ended = cluster.wait_for_end(job, SHORT)
    log = cluster.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "2"), log
    assert ("passing SIGUSR1 on to the ranks" in log) == bool(whom)
    assert "status 143; starting it again: it was interrupted" in log and "newest checkpoint is of step 10" in log
    assert "starting it again: it crashed or hung; the newest checkpoint is of step 20" in log
    assert "restart 2" in log and "status 0; not started again: all steps are done" in log


def test_no_progress_ends_it(cluster, start):
    job = start("end 1")
    ended = cluster.wait_for_end(job, SHORT)
    log = cluster.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "2"), log
    assert "not started again: 3 starts in a row made no new checkpoint" in log


def test_a_run_that_ended_itself_is_left_alone(cluster, start):
    job = start("end 3")
    ended = cluster.wait_for_end(job, SHORT)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "3:0", "0"), cluster.log(job)


def test_a_cancelled_job_stays_cancelled(cluster, start, tmp_path):
    job = start("trap 'save 10; end 143' TERM; forever")
    wait_for(cluster, job, *(tmp_path / "runs" / f"smoke.0.{rank}" for rank in (0, 1)))
    cluster.command("scancel", str(job))
    ended = cluster.wait_for_end(job, SHORT)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0"), cluster.log(job)
    assert "starting it again" not in cluster.log(job)


def test_slurm_s_own_warning_before_the_time_limit(cluster, start):
    """The header asks for it two minutes ahead, so with a limit of two minutes it comes at once."""
    job = start("trap 'save 10; end 143' USR1; [[ $start == 0 ]] && forever; end 0", "--time=00:02:00")
    ended = cluster.wait_for_end(job, 2 * SHORT)
    log = cluster.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "passing SIGUSR1 on to the ranks" in log


def test_training_comes_back_and_finishes(cluster, job_environ, slurm_data, tmp_path):
    """The real thing: saved on the warning, queued again, finished; every batch once and in order."""
    fields = overrides(slurm_data, steps=30)
    job = cluster.submit(
        *CPU_FLAGS,
        "--ntasks-per-node=1",
        f"--output={tmp_path}/%x-%j.out",
        "slurm/135m_bov.sh",
        *fields,
        cwd=REPOSITORY,
        **job_environ | {"BOV_REQUEUE": "1"},
    )
    wait_until_training(cluster, job, tmp_path)
    cluster.command("scancel", "--signal=USR1", "--batch", str(job))
    ended = cluster.wait_for_end(job, LONG)
    log = cluster.log(job)
    assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", "1"), log
    assert "stopped by SIGUSR1, all steps done are saved" in log and "resuming after step" in log
    lines = read_metrics(tmp_path / "runs" / "smoke")
    recipe = load_recipe(REPOSITORY / "recipes/smoke.yaml", fields)
    sizes = {"global_batch_size": 16, "micro_batch_size": 16, "sequence_length": 256, "vocab_size": 4096}
    with TrainLoader(recipe.data, **sizes) as loader:
        assert [line["digest"] for line in lines] == [next(loader).digest for _ in range(30)]
    assert no_rank_left(cluster)
