"""Evaluations as jobs of their own, submitted by a run on a real two-node cluster."""

import json
import re

import pytest

from tests.slurm.test_slurm import CPU_FLAGS, LONG, REPOSITORY, overrides
from tests.support.distributed import run_ranks


def evaluate_rank(rank: int, world_size: int, *arguments: str) -> None:
    from bov_megatron.commands import main

    assert main(["evaluate", *arguments]) == 0


def test_a_run_has_its_checkpoints_evaluated(cluster, slurm_data, tmp_path, job_environ):
    """By jobs that need nothing of it but the checkpoints; the scores are those of `bov evaluate`."""
    log, run = f"--output={tmp_path}/%x-%j.out", tmp_path / "runs" / "smoke"
    fields = [
        *overrides(slurm_data, steps=3),
        *("checkpoint.interval=2", "checkpoint.keep_every=2", "evaluation.every=2", "evaluation.where=slurm"),
        f"evaluation.held_out=[{{name: own, path: {slurm_data}}}]",
        "evaluation.tokens=4096",
        f"evaluation.sbatch={json.dumps([*CPU_FLAGS, log])}",
    ]
    flags = (*CPU_FLAGS, log, "--ntasks-per-node=1")
    job = cluster.submit(*flags, "slurm/135m_bov.sh", *fields, cwd=REPOSITORY, **job_environ)
    assert cluster.wait_for_end(job, LONG)["JobState"] == "COMPLETED", cluster.log(job)
    said = cluster.log(job)
    assert "to evaluate by Slurm jobs: held-out sets own" in said
    submitted = dict(re.findall(r"step (\d+): evaluated by job (\d+)", said))
    assert set(submitted) == {"2", "3"}, said
    for number in map(int, submitted.values()):
        ended = cluster.wait_for_end(number, LONG)
        assert ended["JobState"] == "COMPLETED" and ended["NumTasks"] == "1", cluster.log(number)
    for step in (2, 3):
        packed = tmp_path / f"packed{step}.json"
        by_hand = [str(run), "--step", str(step), "--packed", str(slurm_data / "val"), "--limit", "16"]
        run_ranks(evaluate_rank, 1, *by_hand, "--json", str(packed))
        expected = json.loads(packed.read_text())["scores"]["packed"]["bits_per_byte"]
        found = json.loads((run / "evaluations" / f"step_{step:08d}.json").read_text())
        assert found["step"] == step and found["tokens"] == step * 4096
        assert found["evaluation/bits_per_byte/own"] == pytest.approx(expected, rel=1e-5)
