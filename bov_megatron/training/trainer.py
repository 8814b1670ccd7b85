"""The training loop. It knows steps, an engine and a loader; everything else is a callback."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bov_megatron.checkpoint import Loaded
from bov_megatron.engines.base import Engine
from bov_megatron.errors import CheckpointError, TrainingError
from bov_megatron.lifecycle.interruption import StopReason
from bov_megatron.parallel.device import device
from bov_megatron.recipe.quantities import total_steps
from bov_megatron.training import stragglers
from bov_megatron.training.callbacks.base import Callback
from bov_megatron.training.health import Health, Verdict
from bov_megatron.training.throughput import Throughput

VALIDATION_CHUNK = 16
"""Micro-batches a call of the engine: enough to fill a pipeline."""


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
        health: judges each loss before the update; to be among the callbacks as well.
        reload: loads the newest valid checkpoint into `engine`, for a roll back; None where there is none.
        alive: called whenever a limited piece of work is done: a step, a piece of validation, a checkpoint.
        stop_request: this rank's reason to end the run early, if any; what any rank says holds for all.
        unfinished: record of the last step done, where an interruption broke its validation off.
    """

    def __init__(
        self,
        engine: Engine,
        loader,
        callbacks: Sequence[Callback],
        bytes_per_token: torch.Tensor,
        start_step: int = 0,
        checkpoint_extra: dict[str, Any] | None = None,
        health: Health | None = None,
        reload: Callable[[], Loaded | None] = lambda: None,
        stop_request: Callable[[], StopReason] = lambda: StopReason.NONE,
        alive: Callable[[], None] = lambda: None,
        unfinished: dict[str, Any] | None = None,
    ):
        self.engine, self.loader, self.callbacks = engine, loader, callbacks
        self.recipe = engine.recipe
        self.bytes_per_token = bytes_per_token.to(device())
        self.step = start_step
        self.batch = None
        """The global batch of the step at hand (data.loader.TrainBatch)."""
        self.stop_reason = StopReason.NONE
        self.health, self.unfinished = health, unfinished
        self.total_steps = total_steps(self.recipe)
        self._checkpoint_extra, self._reload = checkpoint_extra or {}, reload
        self._stop_request, self._alive = stop_request, alive
        self.throughput = Throughput(self.recipe, dist.get_world_size())
        self._data_seconds, self._stragglers = 0.0, {}

    @property
    def stopping(self) -> bool:
        """Whether the step at hand is the last one for now; the same on all ranks."""
        return self.stop_reason is not StopReason.NONE

    @property
    def done(self) -> bool:
        """Whether nothing is left to do: all steps, and the validation after the last one."""
        return self.step == self.total_steps and self.unfinished is None

    @property
    def rollbacks(self) -> int:
        """How often the run has rolled back, earlier starts included."""
        return len(self.health.rollbacks) if self.health else 0

    @property
    def checkpoint_extra(self) -> dict[str, Any]:
        """What goes into a checkpoint of this moment besides weights and optimizer state."""
        health = self.health.state() if self.health else None
        return {**self._checkpoint_extra, "unfinished": self.unfinished, "health": health}

    def fit(self) -> None:
        """Train to the last step, or to the one in which any rank had a reason to stop."""
        for callback in self.callbacks:
            callback.start(self)
        self.agree()
        if self.unfinished is not None and not self.stopping:
            record = self.unfinished
            for callback in self.callbacks:
                callback.finish_step(self, record)
        batches = iter(self.loader)
        while self.step < self.total_steps and not self.stopping:
            self.throughput.start()
            waiting_since = time.perf_counter()
            self.batch = next(batches)
            self._data_seconds = time.perf_counter() - waiting_since
            record = self._train_step()
            if self.health is not None and self.health.must_roll_back(record):
                self._roll_back(record)
                continue
            for callback in self.callbacks:
                callback.after_step(self, record)
            self._alive()
        for callback in self.callbacks:
            callback.finish(self)

    def _train_step(self) -> dict[str, Any]:
        """One optimizer step; its line of metrics."""
        rates = self.engine.optimizer.learning_rates()
        self._stragglers = {}
        result = self.engine.train_step(self.batch.micro_batches, self._accepts)
        self.step += 1
        return {
            "step": self.step,
            "loss": _finite(result.loss),
            "gradient_norm": _finite(result.gradient_norm),
            "updated": result.updated,
            "digest": self.batch.digest,
            "tokens": self.step * self.recipe.batch_tokens,
            **{f"learning_rate/{kind}": rate for kind, rate in rates.items()},
            **self.throughput.stop(),
            **self._stragglers,
        }

    def _roll_back(self, record: dict[str, Any]) -> None:
        """Go back to the newest checkpoint, and on without the samples of the steps since; collective.

        Raises TrainingError where that has happened too often, or no checkpoint can be read.
        """
        self.health.check_may_roll_back(record)
        for callback in self.callbacks:
            callback.before_roll_back(self)
        try:
            loaded = self._reload()
        except CheckpointError as error:
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
        for callback in self.callbacks:
            callback.rolled_back(self, line)
        self._alive()

    def _accepts(self, loss: float) -> bool:
        """Whether the update is made that the gradients of `loss` are ready for; the same on every rank."""
        verdict = Verdict.TAKE if self.health is None else self.health.judge(loss)
        durations = stragglers.pack(self._data_seconds, self.engine.gradient_seconds, dist.get_rank())
        verdict, *durations = self.agree(verdict, *durations)
        self._stragglers = stragglers.unpack(durations, parallel_state.get_data_parallel_world_size())
        if self.health is None:
            return True
        self.health.verdict = Verdict(verdict)
        return self.health.verdict is Verdict.TAKE

    def agree(self, *words: int) -> list[int]:
        """One small reduction: any rank's reason to stop becomes everyone's `stop_reason`; collective.

        Returns the highest that any rank gave of each of `words`.
        """
        highest = torch.tensor([int(self._stop_request()), *words], device=device())
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        reason, *agreed = highest.tolist()
        self.stop_reason = max(self.stop_reason, StopReason(reason))
        self._alive()
        if self.stop_reason is StopReason.LEASE_LOST:
            raise TrainingError(
                f"another start has taken the run folder {self.recipe.run_dir}, as this one gave no sign of life for a "
                "while (suspended, or cut off from the file system); it ends without saving, the other goes on"
            )
        return agreed

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: only at the end) happens after this one."""
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def validate(self, loader) -> float | None:
        """Bits per byte over the held-out split, or None where the run was told to stop; the same on every rank."""
        nats, size = 0.0, 0
        batches = iter(loader)
        while several := list(itertools.islice(batches, VALIDATION_CHUNK)):
            if not self.stopping:
                self.agree()
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
