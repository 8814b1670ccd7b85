"""When to save a run."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from bov_megatron import checkpoint
from bov_megatron.errors import TrainingError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.recipe import CheckpointConfig
from bov_megatron.training.trainer import Callback


class Checkpoints(Callback):
    """Saves every `interval` steps, at the end, and before an early stop. The last callback, so that what the others
    write about a step is on disk before its checkpoint.

    With `checkpoint.asynchronous`, a save is written while the next steps run. It is finished after the first step at
    which all ranks have written, but before the next save or the end. A save that fails gives a warning, and the next
    interval saves again; if the last save of a run fails, `finish` raises TrainingError.

    After a rollback the checkpoint is written again, because the samples to leave out are part of it.

    Args:
        from_step_0: save the initial weights too, so that there always is a checkpoint to go back to.
        on_saved: called on every rank with the step of a checkpoint that is complete, and the seconds that it took.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        from_step_0: bool = False,
        on_saved: Callable[[int, float], object] = lambda step, seconds: None,
    ):
        self.run_dir, self.config, self.from_step_0, self.on_saved = run_dir, config, from_step_0, on_saved
        self.began = 0.0
        self.pending: checkpoint.PendingSave | None = None
        self.failure: str | None = None

    def start(self, trainer):
        if self.from_step_0 and trainer.step == 0:
            self._save(trainer, last=False)

    def after_step(self, trainer, record):
        last = trainer.stopping or trainer.step == trainer.total_steps
        due = last or trainer.is_due(self.config.interval)
        if self.pending is not None and (due or self.pending.is_written()):
            self._finish(self.pending, last)
        if due:
            self._save(trainer, last)

    def before_roll_back(self, trainer):
        if self.pending is not None:
            self._finish(self.pending, last=False)

    def after_line(self, trainer, line):
        # A checkpoint contains the samples that rollbacks leave out, and what is owed: at the end, no
        # later one will.
        last = trainer.stopping or trainer.step == trainer.total_steps
        if last or "rollback" in line:
            self._save(trainer, last)

    def _save(self, trainer, last: bool) -> None:
        self._begin(trainer, last)
        if self.pending is not None and (last or not self.config.asynchronous):
            self._finish(self.pending, last)

    def finish(self, trainer):
        if self.failure is None:
            return
        newest = run_folder.latest_checkpoint(self.run_dir)
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
        raise TrainingError(f"{self.failure}; {kept}. Start again to repeat the steps after it")

    def _begin(self, trainer, last: bool) -> None:
        config, self.began = self.config, time.monotonic()
        try:
            self.pending = checkpoint.begin_save(
                trainer.engine,
                self.run_dir,
                trainer.step,
                config.keep_last,
                trainer.checkpoint_extra,
                config.keep_every,
                config.asynchronous and not last,
            )
        except checkpoint.SaveError as error:
            self._note(trainer.step, error, last)

    def _finish(self, pending: checkpoint.PendingSave, last: bool) -> None:
        self.pending = None
        try:
            pending.finish()
            self.failure = None
            self.on_saved(pending.step, time.monotonic() - self.began)
        except checkpoint.SaveError as error:
            self._note(pending.step, error, last)

    def _note(self, step: int, error: checkpoint.SaveError, last: bool) -> None:
        self.failure = f"the checkpoint of step {step} was NOT saved: {error}"
        if dist.get_rank() == 0 and not last:
            warn(f"{self.failure}; training goes on, the next save tries again")
