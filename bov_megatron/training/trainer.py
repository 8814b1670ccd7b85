"""The training loop: forward and backward, agree with all ranks, update or discard, callbacks.

Health judges each step and decides on rollbacks; everything else around a step is a callback.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.checkpoint import Loaded
from bov_megatron.data.loader import TrainBatch
from bov_megatron.engines.base import Engine, ScoreResult
from bov_megatron.errors import BovError, TrainingError
from bov_megatron.evaluation.bits_per_byte import score_held_out
from bov_megatron.lifecycle.interruption import StopReason
from bov_megatron.parallel.agreement import agree_on_highest
from bov_megatron.parallel.device import device
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.training.health import Health, Verdict
from bov_megatron.training.throughput import Throughput

OWABLE = {"validation": "validation_bits_per_byte", "evaluation": "evaluation_seconds"}
"""What an interruption may cut short, to be made up for by the next start, and a field that its lines of metrics have.
"""


class Callback:
    """Hooks around steps; every method is called on every rank, in the order of the trainer's callbacks."""

    def start(self, trainer: Trainer) -> None:
        """At the start of the process; `trainer.step` steps are done already."""

    def before_first_step(self, trainer: Trainer) -> None:
        """After every callback's `start`."""

    def after_step(self, trainer: Trainer, record: dict[str, Any]) -> None:
        """After each optimizer step. `record` is the step's line of metrics, to which a callback may add."""

    def before_roll_back(self, trainer: Trainer) -> None:
        """Before all ranks load the newest checkpoint."""

    def after_line(self, trainer: Trainer, line: dict[str, Any]) -> None:
        """After a line of metrics that belongs to no step: the run has rolled back to `trainer.step`
        (Health.roll_back), or has made up for what was owed."""

    def finish(self, trainer: Trainer) -> None:
        """After the last step, or the last before an early stop; not called when training raises."""


class Trainer:
    """Runs `engine` over `loader` until the recipe's steps are done.

    Args:
        engine: model and optimizer of this rank.
        loader: iterable over `TrainBatch`es from `start_step` on.
        callbacks: called in this order around each step, on every rank.
        bytes_per_token: UTF-8 bytes of each token id, 0 for special tokens, `[vocab_size]`.
        start_step: steps done already.
        checkpoint_extra: stored with every checkpoint.
        health: judges each step before its update.
        reload: loads the newest valid checkpoint into `engine` and returns it, or None where there is none.
        alive: called after each step, chunk of validation or checkpoint, to show that the rank does not hang.
        stop_request: this rank's reason to stop early; if any rank has one, all stop.
        owed: what the last step was due for when the run was interrupted: names of OWABLE.
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
        owed: Collection[str] = (),
    ):
        self.engine, self.loader, self.callbacks, self.health = engine, loader, callbacks, health
        self.recipe = engine.recipe
        self.bytes_per_token = bytes_per_token.to(device())
        self.step = start_step
        self.batch: TrainBatch
        """The current step's."""
        self.data_seconds = 0.0
        """Time that this rank waited for `batch`."""
        self.longest_durations: tuple[list[float], list[int]] = ([], [])
        """Maxima of `durations` over all ranks, and the ranks that have them."""
        self.stop_reason = StopReason.NONE
        self.owed = set(owed)
        self.total_steps = total_steps(self.recipe)
        self.throughput = Throughput(self.recipe, dist.get_world_size())
        self._checkpoint_extra, self._reload = checkpoint_extra or {}, reload
        self._stop_request, self._alive = stop_request, alive

    @property
    def stopping(self) -> bool:
        """Whether the run stops after the current step; the same on all ranks."""
        return self.stop_reason is not StopReason.NONE

    @property
    def done(self) -> bool:
        """Whether all steps are done, and what was due after the last one."""
        return self.step == self.total_steps and not self.owed

    @property
    def checkpoint_extra(self) -> dict[str, Any]:
        """What a checkpoint stores now besides weights and optimizer state."""
        return {**self._checkpoint_extra, "owed": sorted(self.owed), "health": self.health.state()}

    def fit(self) -> None:
        """Train to the last step, or until any rank has a reason to stop. Raises TrainingError."""
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
        """One step on `self.batch`; returns its line of metrics."""
        rates = self.engine.optimizer.learning_rates()
        taken = durations(self.data_seconds, self.engine.gradient_seconds)
        measured = [self.engine.forward_backward(self.batch.micro_batches)]
        if (gradient_norm := self.engine.gradient_norm()) is not None:
            measured.append(gradient_norm)
        # The only place in a step at which the host waits for the device.
        loss, *known_norm = self._agree(*measured, taken=taken)
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

    def _agree(self, *numbers: torch.Tensor, taken: Sequence[float] = ()) -> list[float]:
        """Set `stop_reason` on all ranks to that of any rank, and return the maximum over ranks of each of `numbers`,
        `nan` where any rank's is not finite; collective.

        Args:
            taken: this rank's `durations`, for `longest_durations`.
        """
        # Filled on the device: a copy from the host would wait for it.
        request = torch.full((), float(self._stop_request()), dtype=torch.float64, device=device())
        (reason, *agreed), longest, ranks = agree_on_highest(torch.stack([request, *numbers]), taken)
        if taken:
            self.longest_durations = longest, ranks
        self.stop_reason = max(self.stop_reason, StopReason(int(reason)))
        self._alive()
        if self.stop_reason is StopReason.LEASE_LOST:
            raise TrainingError(
                f"another start has taken over the run folder {self.recipe.run_dir}, because this one gave no sign of "
                "life for a while (suspended, or cut off from the file system); this one ends without saving"
            )
        return agreed

    def _roll_back(self, record: dict[str, Any]) -> None:
        """Go back to the newest checkpoint, and leave out the samples of the steps since; collective.

        Raises TrainingError after too many rollbacks, or where no checkpoint can be read.
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

    def make_up_for(self, what: str, work: Callable[[Trainer, dict[str, Any]], None]) -> None:
        """Do what an earlier start was cut short in (a name of OWABLE), and log it in a line of its own; nothing where
        it isn't owed.

        Args:
            work: adds its fields to the line, and takes the name off `owed` unless it is cut short again.
        """
        if what in self.owed and not self.stopping:
            line = {"step": self.step, "tokens": self.step * self.recipe.batch_tokens}
            work(self, line)
            if what not in self.owed:
                self.log(line)

    def log(self, line: dict[str, Any]) -> None:
        """Pass the callbacks a line of metrics that belongs to no step."""
        for callback in self.callbacks:
            callback.after_line(self, line)
        self._alive()

    def is_due(self, interval: int) -> bool:
        """Whether something that is done every `interval` steps (0: only at the end) is due after this step."""
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def must_stop(self) -> bool:
        """Whether any rank has a reason to stop, asked between long pieces of work; collective."""
        if not self.stopping:
            self._agree()
        return self.stopping

    def validate(self, loader) -> ScoreResult | None:
        """Score of the held-out split, or None where the run stops early; the same on every rank."""
        return score_held_out(self.engine, loader, self.bytes_per_token, self.must_stop)


def durations(data_seconds: float, gradient_seconds: float | None) -> list[float]:
    """Numbers to take the maximum of over all ranks: wait for data, slowest gradients, fastest gradients (negated).

    Args:
        gradient_seconds: None on later pipeline stages, before the first step, and with an engine that doesn't measure
            it.
    """
    if gradient_seconds is None:
        return [data_seconds, -math.inf, -math.inf]
    return [data_seconds, gradient_seconds, -gradient_seconds]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON has no infinity and no nan
