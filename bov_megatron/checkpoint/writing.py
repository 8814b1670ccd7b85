"""Writing one rank's share of a checkpoint.

Writing touches the disk and isn't collective; planning is the reverse. Errors of writing are returned, not raised,
until all ranks know them, so that a full disk on one node leaves no other rank waiting.

Megatron's format is used, but not its writer, which starts processes of its own and whose rank 0 raises alone if common
files can't be written.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.storage import WriteResult

from bov_megatron.checkpoint.manifest import FileEntry, describe_file
from bov_megatron.engines.base import Engine

FORMAT_VERSION = 2
"""1 is the same without a manifest."""
BACKEND, BACKEND_VERSION = "torch_dist", 1
INDEX_FILE, FORMAT_FILE = ".metadata", "metadata.json"
FILES_PER_RANK = 2


@dataclass
class Share:
    """What one rank writes; tensors are in host memory."""

    folder: Path
    buckets: list
    """One per file, as Megatron's writer divides them: (path, storage key, (byte items, tensor items))."""
    common: dict[str, Any] | None
    """State that isn't sharded; None except on rank 0."""
    read: Callable[[str], Tensor] | None = None
    """Gives a tensor by its key as it is written, where those in the buckets have no memory."""


@dataclass
class Written:
    """The outcome of writing a share."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)
    """Of tensors."""
    common: FileEntry | None = None
    """Of state that isn't sharded; None except on rank 0."""
    error: str | None = None
    """Message, if it could not be written."""


def sharded_state(engine: Engine) -> dict[str, Any]:
    """Sharded state dict of the engine's weights and optimizer state, to save or to load into; collective."""
    return engine.sharded_state_dict(content_metadata())


def content_metadata() -> dict[str, Any]:
    """How Megatron lays tensors out; a fresh copy each time, since Megatron changes what it is given."""
    # Layers differ in their tensors, so each is stored under its own number.
    return {"non_homogeneous_layers": True, "singleton_local_shards": False}


def write_share(share: Share) -> Written:
    """Write this rank's files and flush them to disk. Never raises."""
    try:
        # One after the other where tensors are read for it, so that one of them is in memory at a time.
        with ThreadPoolExecutor(max(1, len(share.buckets)) if share.read is None else 1) as pool:
            parts = list(pool.map(functools.partial(_write_bucket, read=share.read), share.buckets))
        written = Written([result for results, _, _ in parts for result in results])
        written.files = {name: entry for _, name, entry in parts}
        if share.common is not None:
            with ChecksummedFile(share.folder / COMMON_STATE_FNAME) as file:
                torch.save(share.common, file)
            written.common = file.entry()
        return written
    except Exception as error:
        return Written(error=describe_error(error, share.folder))


class ForegroundWriter:
    """Runs `write_share(share)` at once. Same interface as BackgroundWriter."""

    def __init__(self, share: Share):
        self.written = write_share(share)

    def done(self) -> bool:
        return True

    def result(self) -> Written:
        return self.written


def write_index(folder: Path, content: bytes) -> dict[str, FileEntry]:
    """Write the index of all tensors and the name of the format, on rank 0 after all ranks have written; their entries.

    Raises OSError.
    """
    with ChecksummedFile(folder / INDEX_FILE) as file:
        file.write(content)
    save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(folder))
    flush(folder / FORMAT_FILE)  # Megatron doesn't
    return {INDEX_FILE: file.entry(), FORMAT_FILE: describe_file(folder / FORMAT_FILE)}


def describe_error(error: Exception, path: Path) -> str:
    """E.g. `rank 3 (node7) could not write PATH: No space left on device`."""
    if isinstance(error, OSError):
        path, reason = error.filename or path, error.strerror or str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return f"rank {dist.get_rank()} ({socket.gethostname()}) could not write {path}: {reason}"


def _write_bucket(bucket, read: Callable[[str], Tensor] | None) -> tuple[list[WriteResult], str, FileEntry]:
    path, key, (byte_items, tensor_items) = bucket
    transforms = _StorageWriterTransforms()
    with ChecksummedFile(Path(path)) as file:
        results = []
        for item, data in (*byte_items, *tensor_items):
            if read is not None and isinstance(data, Tensor):
                # A copy, because torch stores a view with all that it is a view of.
                data = torch.empty(data.shape, dtype=data.dtype).copy_(read(item.index.fqn))
            results.append(_write_item(transforms, file, data, item, key, SerializationFormat.TORCH_SAVE))
            file.check()
    return results, key, file.entry()


class ChecksummedFile:
    """A file written sequentially, with size and checksum of what should be in it.

    An OSError of `write` is raised by `check` or at the end of the `with` block, because torch's archive writer calls
    `write` from C++ code, where an exception would end the process.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, 0
        self.error: OSError | None = None
        self.digest = xxhash.xxh3_64()
        self.file = path.open("wb")

    def __enter__(self) -> Any:  # torch asks for a file, and uses what is here
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.check()
                self.file.flush()
                os.fsync(self.file.fileno())
                if (size := os.fstat(self.file.fileno()).st_size) != self.size:
                    raise OSError(errno.EIO, f"{self.size} bytes were written, and {size} are there")
        except OSError as failure:
            raise OSError(failure.errno, failure.strerror, str(self.path)) from failure
        finally:
            with contextlib.suppress(OSError):  # flushing the buffer fails again
                self.file.close()

    def write(self, data) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        self.digest.update(data)
        size = memoryview(data).nbytes
        self.size += size
        return size

    def flush(self) -> None:
        """Does nothing: the file is flushed at the end."""

    def tell(self) -> int:
        return self.size

    def check(self) -> None:
        """Raise the OSError of an earlier write, if there was one."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(self.path)) from self.error

    def entry(self) -> FileEntry:
        return FileEntry(self.size, self.digest.hexdigest())


def flush(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
