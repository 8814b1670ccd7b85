"""Metrics in TensorBoard: `tensorboard --logdir runs`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch.distributed as dist

from bov_megatron.lifecycle.run_folder import TENSORBOARD
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.training.trainer import Callback


class TensorBoard(Callback):
    """Writes every step's numbers to RUN/tensorboard, and samples as text; rank 0 only.

    Each start and rollback begins a file that says from which step on those before it no longer count, so that a step
    that is done again is shown once.
    """

    def __init__(self, run_dir: Path, enabled: bool):
        self.folder, self.enabled = run_dir / TENSORBOARD, enabled
        self.writer: Any = None

    def start(self, trainer):
        if self.enabled and dist.get_rank() == 0:
            self._open(trainer.step)

    def after_step(self, trainer, record):
        self._write(record)

    def after_line(self, trainer, line):
        if "rollback" in line and self.writer is not None:
            self.writer.close()
            self._open(trainer.step)
        self._write(line)

    def finish(self, trainer):
        if self.writer is not None:
            self.writer.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        try:
            self.writer = SummaryWriter(str(self.folder), purge_step=step + 1)
        except OSError as error:
            self._give_up(error)

    def _write(self, line: dict[str, Any]) -> None:
        if self.writer is None:
            return
        try:
            for key, value in line.items():
                if key != "step" and isinstance(value, int | float):
                    self.writer.add_scalar(key, value, line["step"])
            for sample in line.get("samples", []):
                self.writer.add_text(sample["prompt"] or "<|bos|>", sample["text"], line["step"])
            # Steps before a checkpoint are not repeated by a start after a crash, so none may wait in memory.
            self.writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.writer = None
        warn(f"continuing without TensorBoard: {self.folder}: {error.strerror}; metrics.jsonl has the same numbers")
