"""What happens around training steps. The trainer knows none of it: it calls each callback, on every rank, in order."""

from __future__ import annotations

import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from tqdm import tqdm

from bov_megatron.recipe import CheckpointConfig
from bov_megatron.training import checkpoint
from bov_megatron.training.statistics import coefficient_values, table_statistics

if TYPE_CHECKING:
    from bov_megatron.training.trainer import Trainer


class Callback:
    """Base of all callbacks; every method is called on every rank."""

    def start(self, trainer: Trainer) -> None:
        """Before the first step; `trainer.step` steps are done already."""

    def after_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each optimizer step. `record` is the step's line of metrics; a callback may add to it for those
        that come after."""

    def finish_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """Once before the first step of a run that was stopped while it validated: `record` is the line of that
        step, done by the start before, which lacks the validation."""

    def before_roll_back(self, trainer: Trainer) -> None:
        """All ranks have decided to go back to the newest checkpoint; nothing has happened yet."""

    def rolled_back(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """The run has gone back to `trainer.step`: in place of `after_step` for the step that went wrong. `line` is
        what metrics say of it (Health.roll_back)."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step, or the one after which the run was told to stop; not called when training raises."""


class Validation(Callback):
    """Adds `validation_bits_per_byte` every `validation.interval` steps and at the end.

    A run that is told to stop meanwhile abandons it: the next start validates with the same weights.
    """

    def __init__(self, loader, interval: int):
        self.loader, self.interval = loader, interval

    def after_step(self, trainer, record):
        if trainer.is_due(self.interval):
            self.finish_step(trainer, record)

    def finish_step(self, trainer, record):
        started = time.perf_counter()
        bits = trainer.validate(self.loader)
        trainer.unfinished = record if bits is None else None
        if bits is not None:
            record["validation_bits_per_byte"] = bits
            record["validation_seconds"] = time.perf_counter() - started


class ValueStatistics(Callback):
    """Adds gamma of each bank layer, and every `interval` steps the tables' row norms and touched rows."""

    def __init__(self, interval: int):
        self.interval = interval

    def after_step(self, trainer, record):
        if trainer.is_due(self.interval):
            record.update(coefficient_values(trainer.engine))
            record.update(table_statistics(trainer.engine))


class TrainingError(RuntimeError):
    """A run that is not worth going on with; the message says why and what to do."""


class Progress(Callback):
    """A progress bar on a terminal, plain lines otherwise; rank 0 only."""

    def __init__(self, plain_interval: int):
        self.plain_interval, self.stream, self.bar = plain_interval, sys.stderr, None

    def start(self, trainer):
        if dist.get_rank() == 0 and self.stream.isatty():
            self.bar = tqdm(
                total=trainer.total_steps,
                initial=trainer.step,
                desc=trainer.recipe.name,
                unit="step",
                file=self.stream,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )

    def after_step(self, trainer, record):
        if dist.get_rank() != 0:
            return
        left = (trainer.total_steps - record["step"]) * trainer.throughput.mean_seconds
        rates = f"{record['tokens_per_second']:,.0f} tok/s"
        if "mfu" in record:
            rates += f" · MFU {record['mfu']:.1%}"
        loss = "not finite" if record["loss"] is None else f"{record['loss']:.4f}"
        text = f"loss {loss} · {rates} · {_clock(left)} left"
        self.finish_step(trainer, record)
        if "spike_deviations" in record:
            what = "weights left as they were" if "skipped" in record else "taken all the same (health.on_spike=warn)"
            above = f"{record['spike_deviations']:.0f} deviations above those before"
            self._print(f"step {record['step']}: loss {record['loss']:.4f} is {above}, {what}")
        elif not record["updated"]:
            self._print(f"step {record['step']}: loss or gradients are not finite, weights left as they were")
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update()
        elif trainer.is_due(self.plain_interval) or record["step"] == 1:
            self._print(f"step {record['step']}/{trainer.total_steps} · {text}")

    def finish_step(self, trainer, record):
        if dist.get_rank() == 0 and "validation_bits_per_byte" in record:
            self._print(f"step {record['step']}: validation {record['validation_bits_per_byte']:.4f} bits per byte")

    def rolled_back(self, trainer, line):
        if dist.get_rank() != 0:
            return
        told = line["rollback"]
        loss = "" if told["loss"] is None else f" (loss {told['loss']:.4f})"
        self._print(
            f"step {told['from_step']}: {told['reason']}{loss}; back to step {told['to_step']}, without batches "
            f"{told['first_batch']} to {told['last_batch']} of the data's order (health.on_spike=rollback)"
        )
        if self.bar is not None:
            self.bar.n = trainer.step
            self.bar.refresh()

    def finish(self, trainer):
        if self.bar is not None:
            self.bar.close()

    def _print(self, text: str) -> None:
        if self.bar is not None:
            self.bar.write(text, file=self.stream)
        else:
            print(text, file=self.stream, flush=True)


class Wandb(Callback):
    """Weights & Biases, offline unless told otherwise; rank 0 only. It takes nothing back: of steps that are done a
    second time, after a roll back, it keeps the first."""

    def __init__(self, run_dir: Path, mode: str, project: str):
        self.run_dir, self.mode, self.project, self.run = run_dir, mode, project, None

    def start(self, trainer):
        if dist.get_rank() != 0 or self.mode == "disabled":
            return
        import wandb

        try:
            self.run = wandb.init(
                project=self.project,
                name=trainer.recipe.name,
                id=_run_id(self.run_dir),
                resume="allow",
                dir=self.run_dir,
                mode=self.mode,
                config=trainer.recipe.to_dict(),
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
            )
        except wandb.Error as error:  # a server out of reach is no reason not to train: metrics.jsonl has it all
            print(f"warning: going on without wandb: {error}", file=sys.stderr, flush=True)

    def after_step(self, trainer, record):
        if self.run is not None:
            # A resumed offline run starts to count at 0 again: the step must be said with every line.
            numbers = {key: value for key, value in record.items() if isinstance(value, int | float)}
            self.run.log(numbers, step=record["step"])

    def finish_step(self, trainer, record):
        self.after_step(trainer, record)

    def finish(self, trainer):
        if self.run is not None:
            self.run.finish()


class Checkpoints(Callback):
    """Saves every `interval` steps, at the end, and when the run is told to stop. Comes last: whatever the step wrote
    is then on disk.

    With `checkpoint.asynchronous`, a save is written while the next steps run, and finished at the first step boundary
    at which all ranks have written, before the next save, or at the end. A save that fails is said and tried again at
    the next interval; a run whose last save failed raises TrainingError.

    After a roll back the checkpoint gone back to is written again: which samples to leave out is part of it.

    Args:
        from_step_0: save the initial weights too, so that there always is a checkpoint to go back to.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, from_step_0: bool = False):
        self.run_dir, self.config, self.from_step_0 = run_dir, config, from_step_0
        self.pending: checkpoint.PendingSave | None = None
        self.failure: str | None = None

    def start(self, trainer):
        if self.from_step_0 and trainer.step == 0:
            self._save(trainer, last=False)

    def after_step(self, trainer, record):
        last = trainer.stopping or trainer.step == trainer.total_steps
        due = last or trainer.is_due(self.config.interval)
        if self.pending is not None and (due or self.pending.is_written()):
            self._finish(last)
        if due:
            self._save(trainer, last)

    def before_roll_back(self, trainer):
        if self.pending is not None:
            self._finish(last=False)

    def rolled_back(self, trainer, line):
        self._save(trainer, trainer.stopping)

    def _save(self, trainer, last: bool) -> None:
        self._begin(trainer, last)
        if self.pending is not None and (last or not self.config.asynchronous):
            self._finish(last)

    def finish(self, trainer):
        if self.failure is None:
            return
        newest = checkpoint.latest_checkpoint(self.run_dir)
        kept = f"the newest checkpoint is {newest}" if newest else "there is no checkpoint"
        raise TrainingError(f"{self.failure}; {kept}. Start again to repeat the steps after it")

    def _begin(self, trainer, last: bool) -> None:
        config = self.config
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

    def _finish(self, last: bool) -> None:
        pending, self.pending = self.pending, None
        try:
            pending.finish()
            self.failure = None
        except checkpoint.SaveError as error:
            self._note(pending.step, error, last)

    def _note(self, step: int, error: checkpoint.SaveError, last: bool) -> None:
        self.failure = f"the checkpoint of step {step} was NOT saved: {error}"
        if dist.get_rank() == 0 and not last:
            checkpoint.warn(f"{self.failure}; training goes on, the next save tries again")

    def finish_step(self, trainer, record):
        self.after_step(trainer, record)


def _run_id(run_dir: Path) -> str:
    """The same wandb run for every start of a run folder."""
    path = run_dir / "wandb_id"
    if not path.exists():
        path.write_text(os.urandom(4).hex())
    return path.read_text()


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
