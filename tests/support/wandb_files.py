"""What Weights & Biases' own library has logged of an offline run, read from its file: `wandb sync` would send this."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER, FILE_HEADER = 32 * 1024, 7, 7
"""Bytes of LevelDB's log format, after a header of the file's own."""
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def logged(run_dir: Path) -> list[dict]:
    """The lines of all starts of a run, oldest first."""
    from wandb.proto.wandb_internal_pb2 import Record

    lines = []
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        for data in _records(path.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                lines.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return lines


def _records(file: bytes) -> Iterator[bytes]:
    place, parts = FILE_HEADER, []
    while place + HEADER <= len(file):
        if BLOCK - place % BLOCK < HEADER:  # a block's end is too short for a piece
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", file[place : place + HEADER])
        parts.append(file[place + HEADER : place + HEADER + length])
        place += HEADER + length
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []
