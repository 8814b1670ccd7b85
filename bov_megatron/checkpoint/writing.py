"""Writing one rank's share of a checkpoint, in this process or beside it.

Planning talks to all ranks and touches no disk; writing touches the disk and talks to no rank; whatever goes wrong
while writing is a value, not an exception, until all ranks have heard of it. So a full disk on one node leaves no
other rank waiting.

Megatron's own writer starts processes of its own, and its rank 0 raises alone where common files cannot be written.
Its format, planning and division of replicas are used here; the writing is not.
"""

from __future__ import annotations

import contextlib
import os
import queue
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint.filesystem import SerializationFormat, _StorageWriterTransforms, _write_item
from torch.distributed.checkpoint.metadata import Metadata
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
    """What one rank writes, with its tensors in host memory."""

    folder: Path
    buckets: list
    """One per file, as Megatron's writer divides them: (path, storage key, (byte items, tensor items))."""
    common: dict[str, Any] | None
    """What is stored once: on rank 0 only."""
    writer: filesystem_async.FileSystemWriterAsync
    metadata: Metadata | None
    """The index of the whole checkpoint, before its files are known: on rank 0 only."""


@dataclass
class Written:
    """What became of a share."""

    results: list[WriteResult] = field(default_factory=list)
    files: dict[str, FileEntry] = field(default_factory=dict)
    error: str | None = None
    """Where, what and why, if it could not be written."""


def sharded_state(engine: Engine) -> dict[str, Any]:
    """The engine's weights and optimizer state, to save or to load into; collective."""
    return engine.sharded_state_dict(content_metadata())


def content_metadata() -> dict[str, Any]:
    """How Megatron lays tensors out; a fresh copy each time, since Megatron changes what it is given."""
    # Layers differ in their tensors, so each is stored under its own number.
    return {"non_homogeneous_layers": True, "singleton_local_shards": False}


class _PlanningStrategy(TorchDistSaveShardedStrategy):
    """Megatron's strategy up to the point where writing would begin."""

    def _get_save_and_finalize_callbacks(self, writer, planned):
        return writer, planned[1]


def plan_share(state: dict[str, Any], folder: Path, replicas: dist.ProcessGroup) -> Share:
    """Agree who writes what, and copy this rank's share to host memory; collective.

    Args:
        state: Megatron's sharded state dict; whatever is no tensor is stored once.
        folder: exists and is empty.
        replicas: the group whose ranks divide replicated tensors among themselves.
    """
    # Megatron would keep a server process per rank for writers that it starts: ours don't use it.
    filesystem_async._results_queue = queue.Queue()
    sharded, common = save_preprocess(state)
    strategy = FullyParallelSaveStrategyWrapper(
        _PlanningStrategy(BACKEND, BACKEND_VERSION, thread_count=FILES_PER_RANK), replicas
    )
    writer, metadata = strategy.async_save(sharded, str(folder))
    buckets = writer.write_buckets
    staged = writer.preload_tensors(buckets) if buckets else []
    return Share(folder, staged, common if dist.get_rank() == 0 else None, writer, metadata)


def write_share(share: Share) -> Written:
    """Write this rank's files and flush them to disk. Never raises."""
    try:
        with ThreadPoolExecutor(max(1, len(share.buckets))) as pool:
            parts = list(pool.map(_write_bucket, share.buckets))
        written = Written([result for results, _, _ in parts for result in results])
        written.files = {name: entry for _, name, entry in parts}
        if share.common is not None:
            with ChecksummedFile(share.folder / COMMON_STATE_FNAME) as file:
                torch.save(share.common, file)
            written.files[COMMON_STATE_FNAME] = file.entry()
        return written
    except Exception as error:
        return Written(error=describe_error(error, share.folder))


class ForegroundWriter:
    """`write_share(share)` before anything else happens."""

    def __init__(self, share: Share):
        self.written = write_share(share)

    def done(self) -> bool:
        """Whether `result` would return at once."""
        return True

    def result(self) -> Written:
        return self.written


def write_index(share: Share, all_written: list[Written]) -> dict[str, FileEntry]:
    """Write what says where each tensor lies, on rank 0, once all ranks have written; returns every file's entry.

    Raises OSError.
    """
    share.writer.finish(share.metadata, [written.results for written in all_written])
    save_config(CheckpointingConfig(BACKEND, BACKEND_VERSION), str(share.folder))
    files = {name: describe_file(share.folder / name) for name in (INDEX_FILE, FORMAT_FILE)}
    for written in all_written:
        files.update(written.files)
    return files


def describe_error(error: Exception, path: Path) -> str:
    """`rank 3 (node7) could not write PATH: No space left on device`."""
    if isinstance(error, OSError):
        path, reason = error.filename or path, error.strerror or str(error)
    else:
        reason = f"{type(error).__name__}: {error}"
    return f"rank {dist.get_rank()} ({socket.gethostname()}) could not write {path}: {reason}"


def _write_bucket(bucket) -> tuple[list[WriteResult], str, FileEntry]:
    path, key, (byte_items, tensor_items) = bucket
    transforms = _StorageWriterTransforms()
    with ChecksummedFile(Path(path)) as file:
        results = []
        for item, data in (*byte_items, *tensor_items):
            results.append(_write_item(transforms, file, data, item, key, SerializationFormat.TORCH_SAVE))
            file.check()
    return results, key, file.entry()


class ChecksummedFile:
    """A file written once from start to end, with the checksum of what was meant to be in it.

    torch's archive writer calls `write` from C++ code that an exception would end the process in, so a failure is kept
    until `check`, or the end of the `with` block, raises it.
    """

    def __init__(self, path: Path):
        self.path, self.size, self.error = path, 0, None
        self.digest = xxhash.xxh3_64()
        self.file = path.open("wb")

    def __enter__(self) -> ChecksummedFile:
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self.check()
                self.file.flush()
                os.fsync(self.file.fileno())
        except OSError as failure:
            raise OSError(failure.errno, failure.strerror, str(self.path)) from failure
        finally:
            with contextlib.suppress(OSError):  # what is still buffered fails again
                self.file.close()

    def write(self, data) -> int:
        """Take `data`, as files do."""
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
        """Nothing: everything is flushed to disk at the end."""

    def tell(self) -> int:
        """Bytes taken so far."""
        return self.size

    def check(self) -> None:
        """Raise the OSError that a write met, if one did."""
        if self.error is not None:
            raise OSError(self.error.errno, self.error.strerror, str(self.path)) from self.error

    def entry(self) -> FileEntry:
        """Size and checksum of what was written."""
        return FileEntry(self.size, self.digest.hexdigest())


def flush(path: Path) -> None:
    """Have a file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
