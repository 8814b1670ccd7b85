"""Bits per byte on the held-out split, while training."""

from __future__ import annotations

import time

from bov_megatron.training.callbacks.base import Callback


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
