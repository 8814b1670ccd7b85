"""Saving checkpoints: all ranks write into a temporary folder, which is then renamed.

A crash at any time leaves either the complete new checkpoint or the previous ones unchanged. Old checkpoints are
renamed before they are deleted, so that no partial one is left under a checkpoint's name. If any rank cannot write, all
ranks raise SaveError and the temporary folder is removed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from bov_megatron.checkpoint import manifest, writing
from bov_megatron.checkpoint.background import BackgroundWriter
from bov_megatron.checkpoint.manifest import FileEntry, Manifest
from bov_megatron.checkpoint.planning import Planner, planner_of
from bov_megatron.checkpoint.writing import COMMON_STATE_FNAME, ForegroundWriter, flush, sharded_state
from bov_megatron.engines.base import Engine
from bov_megatron.errors import CheckpointError
from bov_megatron.lifecycle.run_folder import SAVING, checkpoint_path, list_checkpoints
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.parallel.agreement import all_agree, gather_items, on_first_rank
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import Recipe


class SaveError(CheckpointError):
    """A checkpoint could not be written. Raised on all ranks alike; nothing is left of it, and training can go on."""


def save(
    engine: Engine,
    run_dir: Path,
    step: int,
    keep_last: int,
    extra: dict[str, Any],
    keep_every: int = 0,
    read: Callable[[LocalParameter], Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step`, then remove all but the newest `keep_last` and the multiples of `keep_every`;
    collective. Replicated tensors are divided among the data-parallel ranks.

    Args:
        read: gives this rank's part of a parameter when it is written, in place of the engine's own weights, which may
            be without memory (parallel.device.WithoutMemory); of an engine without optimizer.

    Raises SaveError on all ranks if any cannot write.
    """
    return begin_save(engine, run_dir, step, keep_last, extra, keep_every, asynchronous=False, read=read).finish()


def begin_save(
    engine: Engine,
    run_dir: Path,
    step: int,
    keep_last: int,
    extra: dict[str, Any],
    keep_every: int = 0,
    asynchronous: bool = True,
    read: Callable[[LocalParameter], Tensor] | None = None,
) -> PendingSave:
    """Like `save`, but returns once this rank's share is copied; a background process writes it. Collective.

    Training may go on at once: the checkpoint holds the state at this call. It is complete when `PendingSave.finish`
    returns. Only one save may be pending.
    """
    final = checkpoint_path(run_dir, step)
    saving = _begin(final)
    state = sharded_state(engine)
    state["run"] = {
        "version": writing.FORMAT_VERSION,
        "step": step,
        "recipe": engine.recipe.to_dict(),
        "weights_only": engine.optimizer is None,
        "extra": extra,
    }
    state["content_metadata"] = writing.content_metadata()
    planner = planner_of(engine)
    share = planner.plan(state, saving, None if read is None else _by_key(engine, state["model"], read))
    writer = BackgroundWriter(share) if asynchronous else ForegroundWriter(share)

    def complete(index: bytes, files: dict[str, FileEntry]) -> None:
        files = files | writing.write_index(saving, index)
        manifest.write_manifest(saving, Manifest(step, _layout(engine.recipe), files))
        _publish(saving, final, files)
        _prune(run_dir, keep_last, keep_every, asynchronous)

    return PendingSave(step, final, saving, planner, writer, complete)


def _by_key(
    engine: Engine, chunks: dict[str, Any], read: Callable[[LocalParameter], Tensor]
) -> Callable[[str], Tensor]:
    """`read` by the keys of the checkpoint's tensors."""
    parameters = {
        chunks[str(number)][local.qualified_name].key: local
        for number, chunk in enumerate(engine.chunks)
        for local in chunk.local_parameters
    }
    return lambda key: read(parameters[key])


class PendingSave:
    """A checkpoint that is being written."""

    def __init__(self, step: int, final: Path, saving: Path, planner: Planner, writer, complete: Callable):
        self.step, self.final = step, final
        self._saving, self._planner, self._writer, self._complete = saving, planner, writer, complete

    def is_written(self) -> bool:
        """Whether all ranks have written their shares, so that `finish` does not wait; collective, one number."""
        return all_agree(self._writer.done())

    def finish(self) -> Path:
        """Wait for all shares, give the checkpoint its final name and remove old ones; collective.

        Raises SaveError on all ranks if any could not write.
        """
        written = self._writer.result()
        errors = gather_items([written.error] if written.error else [])
        index, files = (b"", {}) if errors else self._planner.collect(written)

        def complete() -> None:
            with _removed_on_error(self._saving):
                if errors:
                    raise SaveError(errors[0] + (f" (and {len(errors) - 1} more ranks)" if errors[1:] else ""))
                self._complete(index, files | {COMMON_STATE_FNAME: written.common})

        on_first_rank(complete)
        return self.final


def _layout(recipe: Recipe) -> dict[str, int]:
    """The layout that saves, for the manifest."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return {
        "world_size": dist.get_world_size(),
        **{name: getattr(recipe.parallel, name) for name in sizes},
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def _begin(final: Path) -> Path:
    """Delete leftovers of crashes and make the temporary folder; collective."""

    def make() -> Path:
        # A new name each time: writer processes of a killed run may still be writing.
        saving = final.with_name(f"{final.name}.{os.urandom(2).hex()}{SAVING}")
        with _removed_on_error(saving):
            for leftover in final.parent.glob(f"*{SAVING}"):
                shutil.rmtree(leftover, ignore_errors=True)
            saving.mkdir(parents=True)
        return saving

    return on_first_rank(make)


@contextlib.contextmanager
def _removed_on_error(saving: Path) -> Iterator[None]:
    """Remove the temporary folder on any error, and raise it as SaveError."""
    try:
        yield
    except Exception as error:  # any error, as the other ranks wait for the outcome
        reason = str(error) if isinstance(error, SaveError) else writing.describe_error(error, saving)
        existing = next(path for path in saving.parents if path.exists())
        free = shutil.disk_usage(existing).free / 2**20
        shutil.rmtree(saving, ignore_errors=True)
        raise SaveError(
            f"{reason}; {free:,.1f} MiB are free in {existing}. Free space there, or lower checkpoint.keep_last"
        ) from error


def _prune(run_dir: Path, keep_last: int, keep_every: int, asynchronous: bool) -> None:
    """Remove checkpoints that neither rule keeps, in a thread if `asynchronous`; a failure is only a warning."""
    for step, old in list_checkpoints(run_dir)[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        try:
            renamed = _rename_to_remove(old)
            if asynchronous:
                threading.Thread(target=shutil.rmtree, args=(renamed, True)).start()
            else:
                shutil.rmtree(renamed, ignore_errors=True)
        except OSError as error:
            warn(f"cannot remove the old checkpoint {old}: {error.strerror}")


def _publish(saving: Path, final: Path, files: Collection[str]) -> None:
    """Flush the temporary folder, check that all `files` are there, and give it its final name."""
    flush(saving)
    # Each rank has looked at the sizes of its own; one listing, where a look at each would take a second per thousand.
    if missing := sorted(set(files) - set(os.listdir(saving))):
        reason = f"written, but {missing[0]} is not there: the run folder must be on a file system that all nodes share"
        raise OSError(errno.EIO, reason, str(saving))
    replaced = _rename_to_remove(final) if final.exists() else None  # the same step saved again
    saving.rename(final)
    flush(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _rename_to_remove(path: Path) -> Path:
    # Under another name, a partly deleted checkpoint is not mistaken for a complete one.
    return path.rename(path.with_name(f"{path.name}.{os.urandom(2).hex()}{SAVING}"))
