"""metrics.jsonl: one JSON object per line."""

from __future__ import annotations

import itertools
import json
import os
from io import FileIO
from pathlib import Path
from typing import Any

import torch.distributed as dist

from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.training.trainer import OWABLE, Callback


class MetricsFile(Callback):
    """One JSON object a step in RUN/metrics.jsonl, and one for each rollback, validation or evaluation made up for.

    A run that resumes or rolls back first drops the lines after its checkpoint. On a full disk, lines are kept in
    memory until they can be written, with one warning.
    """

    ALWAYS = frozenset({*OWABLE.values(), "sample_ids"})
    """Lines with one of these are written at any interval."""

    def __init__(self, run_dir: Path, interval: int):
        self.path, self.interval = run_dir / run_folder.METRICS, interval
        self.file: FileIO | None = None
        self.unwritten = b""

    def start(self, trainer):
        if dist.get_rank() != 0:
            return
        kept = [line for line in read_lines(self.path) if _is_kept(trainer, line)]
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
        kept = [_is_kept(trainer, json.loads(line)) for line in lines]
        first = kept.index(False) if False in kept else len(lines)
        begin = sum(map(len, lines[:first]))
        size = min(begin, self.path.stat().st_size)
        self.file.truncate(size)
        self.unwritten = b"".join(itertools.compress(lines, kept))[size:]
        self._write(self.file, json.dumps(line).encode() + b"\n")

    def finish(self, trainer):
        if self.file:
            self._write(self.file, b"")
            self.file.close()

    def _write(self, file: FileIO, line: bytes) -> None:
        failed_before = bool(self.unwritten)
        self.unwritten += line
        try:
            while self.unwritten:  # a write may be partial
                self.unwritten = self.unwritten[file.write(self.unwritten) :]
        except OSError as error:
            if not failed_before:
                warn(f"cannot write {self.path}: {error.strerror}; lines are kept in memory until it can be written")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file, without a last one cut off by a crash; none where it doesn't exist."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def _is_kept(trainer, line: dict[str, Any]) -> bool:
    """Whether a line is part of the history of the trainer's weights: a step before them, or what belongs to one."""
    if "rollback" in line:
        return line["rollback"]["number"] <= len(trainer.health.rollbacks)
    made_up_for = "loss" not in line and any(OWABLE[owed] in line for owed in trainer.owed)
    if made_up_for:  # the checkpoint is older than this line: it is repeated
        return line["step"] < trainer.step
    return line["step"] <= trainer.step
