"""What the value tables and coefficients are doing, in metrics."""

from __future__ import annotations

from bov_megatron.training.table_statistics import coefficient_values, table_statistics
from bov_megatron.training.trainer import Callback


class ValueStatistics(Callback):
    """Adds gamma of each bank layer, and every `interval` steps the tables' row norms and touched rows."""

    def __init__(self, interval: int):
        self.interval = interval

    def after_step(self, trainer, record):
        if trainer.is_due(self.interval):
            record.update(coefficient_values(trainer.engine))
            record.update(table_statistics(trainer.engine))
