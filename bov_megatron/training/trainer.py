"""The training loop. It knows steps, an engine and a loader; everything else is a callback."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.parallel import cpu
from bov_megatron.plan import total_steps
from bov_megatron.training.callbacks import Callback
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
    """

    def __init__(
        self,
        engine: MegatronEngine,
        loader,
        callbacks: Sequence[Callback],
        bytes_per_token: torch.Tensor,
        start_step: int = 0,
        checkpoint_extra: dict[str, Any] | None = None,
    ):
        self.engine, self.loader, self.callbacks = engine, loader, callbacks
        self.recipe = engine.recipe
        self.bytes_per_token = bytes_per_token.to(cpu.device())
        self.step = start_step
        self.stopping = False
        """Set by a callback, on all ranks alike: this step is the last one for now."""
        self.total_steps = total_steps(self.recipe)
        self.checkpoint_extra = checkpoint_extra or {}
        self.throughput = Throughput(self.recipe, dist.get_world_size())

    def fit(self) -> None:
        """Train to the last step, or to the one after which a callback sets `stopping`."""
        for callback in self.callbacks:
            callback.start(self)
        batches = iter(self.loader)
        while self.step < self.total_steps and not self.stopping:
            self.throughput.start()
            batch = next(batches)
            rates = self.engine.optimizer.learning_rates()
            result = self.engine.train_step(batch.micro_batches)
            self.step += 1
            record = {
                "step": self.step,
                "loss": _finite(result.loss),
                "gradient_norm": _finite(result.gradient_norm),
                "updated": result.updated,
                "digest": batch.digest,
                "tokens": self.step * self.recipe.batch_tokens,
                **{f"learning_rate/{kind}": rate for kind, rate in rates.items()},
                **self.throughput.stop(),
            }
            for callback in self.callbacks:
                callback.after_step(self, record)
        for callback in self.callbacks:
            callback.finish(self)

    def is_due(self, interval: int) -> bool:
        """Whether something that happens every `interval` steps (0: only at the end) happens after this one."""
        return self.step == self.total_steps or (interval > 0 and self.step % interval == 0)

    def validate(self, loader) -> float:
        """Bits per byte over the held-out split; the same on every rank."""
        nats, size = 0.0, 0
        batches = iter(loader)
        while several := list(itertools.islice(batches, VALIDATION_CHUNK)):
            score = self.engine.score(
                [batch.tokens for batch in several], self.bytes_per_token, [batch.mask for batch in several]
            )
            nats, size = nats + score.nats, size + score.bytes
        return nats / (math.log(2) * size)


def _finite(number: float) -> float | None:
    """JSON knows no infinity and no nan."""
    return number if math.isfinite(number) else None
