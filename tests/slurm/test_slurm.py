"""The real job scripts on a real two-node Slurm cluster, CPU only. Without root and apt these tests are skipped."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bov_megatron.parallel.launch import expand_nodelist
from tests.slurm.conftest import REPOSITORY, read_metrics

SCRIPTS = ("780m_bov", "780m_baseline", "135m_bov", "135m_baseline")
# What a user types to run on a cluster of small machines without GPUs.
CPU_FLAGS = ("--gpus-per-node=0", "--cpus-per-task=1", "--time=00:10:00")
LONG, SHORT = 420, 120  # seconds, of which a shared machine may need most


def overrides(data: Path, steps: int) -> list[str]:
    return [
        f"data.path={data}",
        "data.num_workers=0",
        f"train.steps={steps}",
        "train.micro_batch_size=4",
        "validation.tokens=8192",
        "logging.wandb=disabled",
    ]


@pytest.fixture
def submit(cluster, tmp_path, job_environ):
    """`submit(script, overrides…, flags=…)`: the job's number. The log goes to the test's folder."""

    def run(script: str, *fields: str, flags=(), cwd: Path = REPOSITORY, **environ: str) -> int:
        log = f"--output={tmp_path}/%x-%j.out"
        return cluster.submit(*CPU_FLAGS, log, *flags, script, *fields, cwd=cwd, **(job_environ | environ))

    return run


def test_two_nodes_train_one_model(cluster, submit, slurm_data, tmp_path):
    """2 nodes x 2 tasks, TP=2 x DP=2, take the steps that one process takes: same samples, same losses."""
    steps = overrides(slurm_data, steps=3)
    job = submit("slurm/135m_bov.sh", *steps, flags=["--ntasks-per-node=2"])
    ended = cluster.wait_for_end(job, LONG)
    log = cluster.log(job)
    assert ended["JobState"] == "COMPLETED", log
    assert "world     4 ranks on 2 nodes (node[1-2])" in log
    assert "Plan of smoke" in log and "4 ranks = tensor 2" in log

    alone = [*steps, "parallel.tensor_model_parallel_size=1", f"output_dir={tmp_path}/alone"]
    subprocess.run(
        [sys.executable, "-m", "bov_megatron.train", "recipes/smoke.yaml", *alone],
        cwd=REPOSITORY,
        check=True,
        timeout=LONG,
        stderr=subprocess.DEVNULL,
    )
    cluster_lines, alone_lines = read_metrics(tmp_path / "runs" / "smoke"), read_metrics(tmp_path / "alone")
    assert len(cluster_lines) == len(alone_lines) == 3
    for ours, theirs in zip(cluster_lines, alone_lines, strict=True):
        assert (ours["step"], ours["digest"]) == (theirs["step"], theirs["digest"])
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_sigterm_reaches_the_ranks(cluster, submit, slurm_data, tmp_path):
    """What preemption and --signal=B: send to the script must arrive in Python as SIGTERM, not as SIGKILL."""
    job = submit("slurm/135m_bov.sh", *overrides(slurm_data, steps=100000), flags=["--ntasks-per-node=1"])
    wait_until_training(cluster, job, tmp_path)
    cluster.command("scancel", "--signal=TERM", "--batch", str(job))
    cluster.wait_for_end(job, SHORT)
    log = cluster.log(job)
    assert "passing SIGTERM on to the ranks" in log
    assert "Killed" not in log, log
    assert no_rank_left(cluster)


def test_a_bad_recipe_stops_before_the_ranks_start(cluster, submit):
    job = submit("slurm/780m_bov.sh", "trian.steps=2", flags=["--ntasks-per-node=1"])
    assert cluster.wait_for_end(job, SHORT)["JobState"] == "FAILED"
    assert "unknown field 'trian'; did you mean 'train'?" in cluster.log(job)


@pytest.mark.parametrize(
    "environ, message",
    [
        ({"BOV_RECIPE": "recipes/none.yaml"}, "recipe recipes/none.yaml does not exist (from BOV_RECIPE)"),
        ({"BOV_PYTHON": "/nowhere/python"}, "/nowhere/python does not exist: run 'make env'"),
    ],
)
def test_bad_environment_is_named(cluster, submit, environ, message):
    job = submit("slurm/135m_baseline.sh", flags=["--ntasks-per-node=1"], **environ)
    assert cluster.wait_for_end(job, SHORT)["JobState"] == "FAILED"
    assert message in cluster.log(job)


def test_submitted_from_another_folder(cluster, submit, tmp_path):
    script = str(REPOSITORY / "slurm" / "135m_bov.sh")
    job = submit(script, cwd=tmp_path, flags=["--ntasks-per-node=1"])
    assert cluster.wait_for_end(job, SHORT)["JobState"] == "FAILED"
    assert f"no slurm/launch.sh in {tmp_path}: sbatch --chdir=REPOSITORY" in cluster.log(job)
    # The remedy gets as far as the recipe.
    job = submit(script, "trian.steps=2", cwd=tmp_path, flags=["--ntasks-per-node=1", f"--chdir={REPOSITORY}"])
    cluster.wait_for_end(job, SHORT)
    assert "unknown field 'trian'" in cluster.log(job)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_ask_for_what_they_say(cluster, name):
    """Held, not run: what Slurm read from the file's header."""
    job = cluster.submit("--hold", "--gpus-per-node=0", f"slurm/{name}.sh", cwd=REPOSITORY)
    fields = cluster.job(job)
    cluster.command("scancel", str(job))
    assert fields["JobName"] == name
    assert fields["NumNodes"].startswith("2") and fields["NumTasks"] == "16"
    assert fields["Requeue"] == "1"
    assert fields["StdOut"] == f"{REPOSITORY}/logs/slurm-{name}-{job}.out"
    assert Path(fields["StdOut"]).parent.is_dir(), "Slurm drops a job whose log it cannot open, without a word"
    assert f"recipes/{name}.yaml" in (REPOSITORY / "slurm" / f"{name}.sh").read_text()
    assert (REPOSITORY / "recipes" / f"{name}.yaml").is_file()


def test_gpus_are_asked_for_unless_told_otherwise(cluster):
    """This cluster has none, so Slurm must refuse the script as it stands."""
    with pytest.raises(RuntimeError, match="Invalid generic resource"):
        cluster.submit("slurm/780m_bov.sh", cwd=REPOSITORY)


def test_launcher_outside_slurm_says_so():
    environ = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    run = subprocess.run(
        ["bash", "slurm/780m_bov.sh"], cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=30
    )
    assert run.returncode == 2
    assert "not in a Slurm job: submit one of the scripts" in run.stderr


@pytest.mark.parametrize("nodelist", ["node[1-2,5]", "gpu-a[001-003],login", "n[08-11]"])
def test_node_lists_expand_as_slurm_expands_them(cluster, nodelist):
    assert expand_nodelist(nodelist) == cluster.command("scontrol", "show", "hostnames", nodelist).split()


def rank_process(cluster, rank: int, job: int | None = None) -> int | None:
    """The process of a rank that is training on this cluster, in this job."""
    mine = f"\0SLURM_JOB_ID={job}\0".encode() if job else b""
    for process in cluster.processes():
        folder = Path("/proc", str(process))
        try:
            words, environ = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
        except OSError:
            continue
        if (
            words.startswith(sys.executable.encode())
            and f"SLURM_PROCID={rank}\0".encode() in environ
            and mine in environ
        ):
            return process
    return None


def wait_until_training(cluster, job: int, tmp_path: Path) -> None:
    deadline = time.monotonic() + LONG
    while not read_metrics(tmp_path / "runs" / "smoke"):
        state = cluster.job(job)["JobState"]
        assert state in ("PENDING", "CONFIGURING", "RUNNING"), f"{state}\n{cluster.log(job)}"
        assert time.monotonic() < deadline, cluster.log(job)
        time.sleep(0.5)


def no_rank_left(cluster) -> bool:
    """Whether all training processes are gone; a few seconds are theirs to end in."""
    deadline = time.monotonic() + 15
    while rank_process(cluster, 0) or rank_process(cluster, 1):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
