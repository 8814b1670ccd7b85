"""Scores of the recipe's section `evaluation` during training."""

from __future__ import annotations

import time
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.evaluation.suite import Suite
from bov_megatron.lifecycle.terminal import say
from bov_megatron.parallel.device import device
from bov_megatron.recipe import EvaluationConfig
from bov_megatron.training.trainer import Callback


class Evaluation(Callback):
    """Adds `evaluation/…` (see Suite.score) and `evaluation_seconds` every `evaluation.every` steps and at the end.

    An evaluation that comes too soon after a long one is left out, except at the end (`evaluation.time_share`); that
    can differ between two starts of a run, which changes nothing else. An early stop abandons an evaluation, and the
    next start repeats it with the same weights in a line of its own.
    """

    def __init__(self, suite: Suite, config: EvaluationConfig):
        self.suite, self.config = suite, config
        self.not_before = 0.0
        """When the next one may begin, by this rank's clock; the first rank's decides."""

    def before_first_step(self, trainer):
        trainer.make_up_for("evaluation", self._evaluate)

    def after_step(self, trainer, record):
        last = trainer.step == trainer.total_steps
        if last or (trainer.is_due(self.config.every) and self._has_time(trainer.step)):
            self._evaluate(trainer, record)

    def _has_time(self, step: int) -> bool:
        """The same on every rank; collective."""
        seconds = torch.tensor(max(0.0, self.not_before - time.monotonic()), device=device())
        dist.broadcast(seconds, 0)
        if dist.get_rank() == 0 and seconds > 0:
            say(
                f"step {step}: no evaluation for another {float(seconds):.0f} s "
                f"(evaluation.time_share={self.config.time_share:g})"
            )
        return float(seconds) == 0

    def _evaluate(self, trainer, record: dict[str, Any]) -> None:
        started = time.monotonic()
        scores = None if trainer.must_stop() else self.suite.score(trainer.engine, trainer.must_stop)
        if scores is None:
            trainer.owed.add("evaluation")
            return
        trainer.owed.discard("evaluation")
        seconds = time.monotonic() - started
        self.not_before = started + seconds / self.config.time_share
        record.update(scores, evaluation_seconds=seconds)
