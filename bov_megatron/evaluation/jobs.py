"""Evaluations of checkpoints as Slurm jobs of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

from bov_megatron.errors import EvaluationError
from bov_megatron.recipe import Recipe

SCRIPT = Path("slurm", "evaluate.sh")
PATIENCE_SECONDS = 60.0
"""For sbatch to answer at the end of a run."""
OF_THE_RUN = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    "OMP_NUM_THREADS",
)


def check_can_submit() -> None:
    """Raise EvaluationError where jobs can't be submitted from this process."""
    if not shutil.which("sbatch"):
        raise EvaluationError("evaluation.where=slurm, but there is no sbatch here; use evaluation.where=training")
    if not SCRIPT.is_file():
        raise EvaluationError(
            f"evaluation.where=slurm, but {Path.cwd()} has no {SCRIPT}: start from the repository's root, or use "
            "evaluation.where=training"
        )


class Submissions:
    """Calls of sbatch that nobody waits for: a busy controller may take a minute to answer.

    Args:
        recipe: of the run whose checkpoints are evaluated.
    """

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self._running: dict[int, subprocess.Popen] = {}

    def submit(self, step: int) -> None:
        """Ask for a job that evaluates the complete checkpoint of `step`."""
        self._running[step] = subprocess.Popen(
            submission(self.recipe, step),
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def answers(self, wait: bool = False) -> list[str]:
        """One line for each call that has been answered since: the job's number, or what went wrong.

        Args:
            wait: for all answers, up to PATIENCE_SECONDS.
        """
        deadline = time.monotonic() + (PATIENCE_SECONDS if wait else 0)
        lines = []
        for step, process in list(self._running.items()):
            try:
                out, err = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                if not wait:
                    continue
                process.kill()
                out, err = process.communicate()
                err = err or f"no answer in {PATIENCE_SECONDS:.0f} s"
            del self._running[step]
            if process.returncode == 0:
                lines.append(f"step {step}: evaluated by job {out.strip().split(';')[0]}")
            else:
                by_hand = " ".join(submission(self.recipe, step))
                lines.append(f"step {step}: no evaluation: {' '.join(err.split())}; submit it by hand: {by_hand}")
        return lines


def submission(recipe: Recipe, step: int) -> list[str]:
    """The sbatch call that evaluates the checkpoint of `step`."""
    return ["sbatch", "--parsable", *recipe.evaluation.sbatch, str(SCRIPT), str(recipe.run_dir), str(step)]


def _environment() -> dict[str, str]:
    """This one's without what is of this job and rank, which the new job would inherit."""
    return {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or not (name in OF_THE_RUN or name.startswith(("SLURM_", "SRUN_", "PMI", "BOV_STATUS")))
    }
