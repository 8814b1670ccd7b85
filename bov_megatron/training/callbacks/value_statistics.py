"""Statistics of value tables and coefficients in the metrics."""

from __future__ import annotations

from bov_megatron.training.table_statistics import coefficient_values, table_statistics
from bov_megatron.training.trainer import Callback


class ValueStatistics(Callback):
    """Adds coefficients, row norms of the tables and their share of touched rows every `interval` steps."""

    def __init__(self, interval: int):
        self.interval = interval

    def after_step(self, trainer, record):
        if trainer.is_due(self.interval):
            record.update(coefficient_values(trainer.engine))
            record.update(table_statistics(trainer.engine))
