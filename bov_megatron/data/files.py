"""Atomic writes of files and folders, reproducible JSON, and what to say where the disk is full."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FULL = {errno.ENOSPC: "No space left on device", errno.EDQUOT: "Disk quota exceeded", errno.EFBIG: "File too large"}


def why_full(error: BaseException) -> str | None:
    """The system's words where `error` says that a file system takes no more, else None."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return _FULL[error.errno]
    # Libraries written in Rust (safetensors, tokenizers) raise errors of their own, with the number in the text.
    return next((text for number, text in _FULL.items() if f"(os error {number})" in str(error)), None)


def full_disk_message(path: str | Path, reason: str, needed: float, remedy: str) -> str:
    """One line: what could not be written, how many bytes are needed in all, how many are free, and what to do."""
    existing = next(folder for folder in (Path(path).absolute(), *Path(path).absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(existing).free
    return (
        f"could not write {path}: {reason}; about {needed / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are "
        f"free in {existing}; {remedy}"
    )


def write_atomically(path: Path, data: bytes) -> None:
    """Write, fsync and rename, so that readers see all of `data` or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """An empty folder to write in, which takes the place of `out` and of all that it holds when the block ends.

    Where the block raises, Ctrl-C included, `out` is as it was and nothing lies beside it.
    """
    out = out.resolve()
    beside = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial = beside / out.name  # transformers names the modules that it copies from there after the folder
    try:
        shutil.rmtree(beside, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _replace(out, partial, previous=beside / "previous")
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _replace(out: Path, partial: Path, previous: Path) -> None:
    try:
        if out.exists():
            out.rename(previous)
        partial.rename(out)
    except BaseException:  # Ctrl-C too
        if previous.exists() and not out.exists():
            previous.rename(out)
        raise


def json_bytes(value: Any) -> bytes:
    """JSON with sorted keys, one value per line: equal values give equal bytes."""
    return (json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False) + "\n").encode()
