"""A Slurm job for each checkpoint to evaluate."""

from __future__ import annotations

import torch.distributed as dist

from bov_megatron.evaluation.jobs import Submissions
from bov_megatron.lifecycle.terminal import say
from bov_megatron.recipe import Recipe
from bov_megatron.training.trainer import Callback


class EvaluationJobs(Callback):
    """Submits slurm/evaluate.sh for complete checkpoints that are due for evaluation (`evaluation.where=slurm`); rank 0
    only. Training doesn't wait for Slurm's answer, and goes on where a job can't be submitted."""

    def __init__(self, recipe: Recipe, total_steps: int):
        self.every, self.total_steps = recipe.evaluation.every, total_steps
        self.submissions = Submissions(recipe)

    def checkpoint_saved(self, step: int) -> None:
        """The checkpoint of `step` is complete."""
        due = step == self.total_steps or (self.every > 0 and step > 0 and step % self.every == 0)
        if due and dist.get_rank() == 0:
            self.submissions.submit(step)

    def after_step(self, trainer, record):
        for answer in self.submissions.answers():
            say(answer)

    def finish(self, trainer):
        for answer in self.submissions.answers(wait=True):
            say(answer)
