"""The training loop: forward and backward, agree with all ranks, update or discard, callbacks.

Health judges each step and decides on roll backs; everything else that happens around a step is a callback.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.checkpoint import Loaded
from bov_megatron.data.loader import TrainBatch
from bov_megatron.engines.base import Engine
from bov_megatron.errors import BovError, TrainingError
from bov_megatron.lifecycle.interruption import StopReason
from bov_megatron.parallel.device import device
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.training.health import Health, Verdict
from bov_megatron.training.throughput import Throughput

VALIDATION_CHUNK = 16
"""Micro-batches a call of the engine: enough to fill a pipeline."""


class Callback:
    """What happens around steps; every method is called on every rank, in the order of the trainer's callbacks."""

    def start(self, trainer: Trainer) -> None:
        """At the start of the process; `trainer.step` steps are done already."""

    def before_first_step(self, trainer: Trainer) -> None:
        """All callbacks have started."""

    def after_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each optimizer step. `record` is the step's line of metrics; a callback may add to it for those
        that come after."""

    def before_roll_back(self, trainer: Trainer) -> None:
        """All ranks have decided to go back to the newest checkpoint; nothing has happened yet."""

    def after_line(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """After something that is no step and has a line of metrics of its own: the run has rolled back to
        `trainer.step` (Health.roll_back), or made up for a validation."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step, or the one after which the run was told to stop; not called when training raises."""


class Trainer:
    """Runs `engine` over `loader` until the recipe's steps are done.

    Args:
        engine: model and optimizer of this rank.
        loader: iterable from `start_step` on; each step gives this rank's micro-batches and the digest of the
            global batch's sample ids.
        callbacks: called in this order around each step, on every rank.
        bytes_per_token: UTF-8 bytes of each token id, 0 for special tokens, `[vocab_size]`.
        start_step: steps done already.
        checkpoint_extra: stored with every checkpoint.
        health: judges each step before its update.
        reload: loads the newest valid checkpoint into `engine`, for a roll back; None where there is none.
        alive: called whenever a limited piece of work is done: a step, a piece of validation, a checkpoint.
        stop_request: this rank's reason to end the run early, if any; what any rank says holds for all.
        validation_owed: whether an interruption kept the last step done from its validation.
    """

    def __init__(
        self,
        engine: Engine,
        loader,
        callbacks: Sequence[Callback],
        bytes_per_token: torch.Tensor,
        health: Health,
        start_step: int = 0,
        checkpoint_extra: dict[str, Any] | None = None,
        reload: Callable[[], Loaded | None] = lambda: None,
        stop_request: Callable[[], StopReason] = lambda: StopReason.NONE,
        alive: Callable[[], None] = lambda: None,
        validation_owed: bool = False,
    ):
        self.engine, self.loader, self.callbacks, self.health = engine, loader, callbacks, health
        self.recipe = engine.recipe
        self.bytes_per_token = bytes_per_token.to(device())
        self.step = start_step
        self.batch: TrainBatch
        """The global batch of the step at hand."""
        self.data_seconds = 0.0
        """How long this rank waited for that batch."""
        self.stop_reason = StopReason.NONE
        self.validation_owed = validation_owed
        self.total_steps = total_steps(self.recipe)
        self.throughput = Throughput(self.recipe, dist.get_world_size())
        self._checkpoint_extra, self._reload = checkpoint_extra or {}, reload
        self._stop_request, self._alive = stop_request, alive

    @property
    def stopping(self) -> bool:
        """Whether the step at hand is the last one for now; the same on all ranks."""
        return self.stop_reason is not StopReason.NONE

    @property
    def done(self) -> bool:
        """Whether nothing is left to do: all steps, and the validation after the last one."""
        return self.step == self.total_steps and not self.validation_owed

    @property
    def checkpoint_extra(self) -> dict[str, Any]:
        """What goes into a checkpoint of this moment besides weights and optimizer state."""
        return {**self._checkpoint_extra, "validation_owed": self.validation_owed, "health": self.health.state()}

    def fit(self) -> None:
        """Train to the last step, or to the one in which any rank had a reason to stop."""
        for callback in self.callbacks:
            callback.start(self)
        self._agree()
        for callback in self.callbacks:
            callback.before_first_step(self)
        batches = iter(self.loader)
        while self.step < self.total_steps and not self.stopping:
            self.throughput.start()
            waiting_since = time.perf_counter()
            self.batch = next(batches)
            self.data_seconds = time.perf_counter() - waiting_since
            record = self.train_step()
            if self.health.must_roll_back(record):
                self._roll_back(record)
                continue
            self.health.note(record, self.batch)
            for callback in self.callbacks:
                callback.after_step(self, record)
            self._alive()
        for callback in self.callbacks:
            callback.finish(self)

    def train_step(self) -> dict[str, Any]:
        """One step on `self.batch`; its line of metrics."""
        rates = self.engine.optimizer.learning_rates()
        measured = [self.engine.forward_backward(self.batch.micro_batches)]
        if (gradient_norm := self.engine.gradient_norm()) is not None:
            measured.append(gradient_norm)
        # The host waits for the device here, and nowhere else in a step.
        loss, *known_norm = self._agree(*measured)
        updated, norm = False, math.nan
        if self.health.judge(loss, *known_norm) is Verdict.TAKE:
            result = self.engine.update(*known_norm)
            updated, norm = result.applied, result.grad_norm
        else:
            self.engine.discard_gradients()
        self.step += 1
        return {
            "step": self.step,
            "loss": _finite(loss),
            "gradient_norm": _finite(norm),
            "updated": updated,
            "digest": self.batch.digest,
            "tokens": self.step * self.recipe.batch_tokens,
            **{f"learning_rate/{kind}": rate for kind, rate in rates.items()},
            **self.throughput.stop(),
        }

    def _agree(self, *numbers: torch.Tensor) -> list[float]:
        """Any rank's reason to stop becomes everyone's `stop_reason`; collective.

        Returns the highest that any rank has of each of `numbers`, `nan` where it is not finite on one.
        """
        own = torch.stack([torch.tensor(float(self._stop_request()), device=device()), *numbers]).double()
        finite = own.isfinite()
        words = torch.stack([torch.where(finite, own, -math.inf), (~finite).double()])
        dist.all_reduce(words, op=dist.ReduceOp.MAX)
        highest, not_finite = words.tolist()
        reason, *agreed = (math.nan if bad else number for number, bad in zip(highest, not_finite, strict=True))
        self.stop_reason = max(self.stop_reason, StopReason(int(reason)))
        self._alive()
        if self.stop_reason is StopReason.LEASE_LOST:
            raise TrainingError(
                f"another start has taken the run folder {self.recipe.run_dir}, as this one gave no sign of life for a "
                "while (suspended, or cut off from the file system); it ends without saving, the other goes on"
            )
        return agreed

    def _roll_back(self, record: dict[str, Any]) -> None:
        """Go back to the newest checkpoint, and on without the samples of the steps since; collective.

        Raises TrainingError where that has happened too often, or no checkpoint can be read.
        """
        self.health.check_may_roll_back(record)
        for callback in self.callbacks:
            callback.before_roll_back(self)
        try:
            loaded = self._reload()
        except BovError as error:
            raise TrainingError(f"{self.health.complaint(record)}, and cannot be rolled back: {error}") from error
        if loaded is None:
            raise TrainingError(
                f"{self.health.complaint(record)}, and there is no checkpoint to go back to: none could be written, "
                "see the warnings above; start again to begin from step 0"
            )
        line = self.health.roll_back(record, self.batch, loaded.step, loaded.extra.get("health"))
        self.step = loaded.step
        self.loader.go_to(self.step, self.health.skipped_windows())
        self._alive()
        self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Hand a line of metrics to the callbacks that is not a step's."""
        for callback in self.callbacks:
            callback.after_line(self, line)
        self._alive()

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: only at the end) happens after this one."""
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def validate(self, loader) -> float | None:
        """Bits per byte over the held-out split, or None where the run was told to stop; the same on every rank."""
        nats, size = 0.0, 0
        batches = iter(loader)
        while several := list(itertools.islice(batches, VALIDATION_CHUNK)):
            if not self.stopping:
                self._agree()
            if self.stopping:
                return None
            score = self.engine.score(
                [batch.tokens for batch in several], self.bytes_per_token, [batch.mask for batch in several]
            )
            nats, size = nats + score.nats, size + score.bytes
        return nats / (math.log(2) * size)


def _finite(number: float) -> float | None:
    """JSON knows no infinity and no nan."""
    return number if math.isfinite(number) else None
