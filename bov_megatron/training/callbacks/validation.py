"""Loss and bits per byte on the held-out split during training."""

from __future__ import annotations

import time
from typing import Any

from bov_megatron.training.trainer import Callback


class Validation(Callback):
    """Adds `validation_bits_per_byte` and `validation_loss` (nats per token) every `validation.interval` steps and at
    the end.

    An early stop abandons a validation. The next start repeats it with the same weights, and logs it in a separate
    line.
    """

    def __init__(self, loader, interval: int):
        self.loader, self.interval = loader, interval

    def before_first_step(self, trainer):
        trainer.make_up_for("validation", self._validate)

    def after_step(self, trainer, record):
        if trainer.is_due(self.interval):
            self._validate(trainer, record)

    def _validate(self, trainer, record: dict[str, Any]) -> None:
        started = time.perf_counter()
        score = trainer.validate(self.loader)
        if score is None:
            trainer.owed.add("validation")
        else:
            trainer.owed.discard("validation")
            record["validation_bits_per_byte"] = score.bits_per_byte
            record["validation_loss"] = score.loss
            record["validation_seconds"] = time.perf_counter() - started
