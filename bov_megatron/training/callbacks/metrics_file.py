"""The run's own record: one JSON object a line, which tells what the weights at hand have been through."""

from __future__ import annotations

import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.training.trainer import Callback


class MetricsFile(Callback):
    """One JSON object a step in RUN/metrics.jsonl, and one for each roll back or validation made up for.

    A resumed run first drops the lines after its checkpoint; so does one that rolls back. Lines that a full disk
    doesn't take are said once, kept, and written when it does.
    """

    ALWAYS = frozenset({"validation_bits_per_byte", "sample_ids"})
    """A line with one of these is written whatever the interval."""

    def __init__(self, run_dir: Path, interval: int):
        self.path, self.interval = run_dir / run_folder.METRICS, interval
        self.file: FileIO | None = None
        self.unwritten = b""

    def start(self, trainer):
        if dist.get_rank() != 0:
            return
        kept = [line for line in read_lines(self.path) if _is_true_of(trainer, line)]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(part, self.path)
        self.file = self.path.open("ab", buffering=0)

    def after_step(self, trainer, record):
        if self.file and (trainer.is_due(self.interval) or self.ALWAYS & record.keys()):
            self._write(self.file, json.dumps(record).encode() + b"\n")

    def after_line(self, trainer, line):
        if not self.file:
            return
        # In place: a full disk has no room for a second file.
        lines = (self.path.read_bytes() + self.unwritten).splitlines(keepends=True)
        true = [_is_true_of(trainer, json.loads(line)) for line in lines]
        first = true.index(False) if False in true else len(lines)
        begin = sum(map(len, lines[:first]))
        size = min(begin, self.path.stat().st_size)
        self.file.truncate(size)
        self.unwritten = b"".join(line for line, kept in zip(lines, true, strict=True) if kept)[size:]
        self._write(self.file, json.dumps(line).encode() + b"\n")

    def finish(self, trainer):
        if self.file:
            self._write(self.file, b"")
            self.file.close()

    def _write(self, file: FileIO, line: bytes) -> None:
        failed_before = bool(self.unwritten)
        self.unwritten += line
        try:
            while self.unwritten:  # part of it may be taken
                self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            if not failed_before:
                warn(f"cannot write {self.path}: {error.strerror}; its lines are kept until it can be")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line cut off by a crash is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _is_true_of(trainer, line: dict[str, Any]) -> bool:
    """Whether a line tells of what the trainer's weights have been through: steps done, roll backs it knows of."""
    if "rollback" in line:
        return line["rollback"]["number"] <= len(trainer.health.rollbacks)
    if "loss" not in line and trainer.validation_owed:  # made up for, and lost with the checkpoint that knew of it
        return line["step"] < trainer.step
    return line["step"] <= trainer.step
