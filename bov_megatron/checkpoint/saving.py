"""Checkpoints of a run: atomic folders, newest first, any layout of ranks.

    RUN/checkpoints/step_00000200/     one complete checkpoint (Megatron's torch_dist format)
    RUN/checkpoints/step_00000200/manifest.json   size and checksum of each of its files
    RUN/checkpoints/step_00000400.1f3a.saving/   being written or removed; never read, deleted by the next save
    RUN/checkpoints/step_00000600.damaged/   not what its manifest says; set aside, never deleted

A checkpoint is written beside its final name by all ranks, flushed to disk, and renamed in one operation: a crash
at any moment leaves either the complete new checkpoint or the previous ones as they were. Old ones lose their name
before their files, so that a crash while deleting leaves nothing that looks like a checkpoint either. A checkpoint
that cannot be written, on whichever rank, leaves nothing behind and raises SaveError on all ranks.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from bov_megatron.checkpoint import compatibility, manifest, writing
from bov_megatron.checkpoint.background import BackgroundWriter
from bov_megatron.checkpoint.manifest import Damage, Manifest
from bov_megatron.checkpoint.writing import ForegroundWriter, Written
from bov_megatron.engines.base import Engine
from bov_megatron.errors import CheckpointError
from bov_megatron.parallel.device import device
from bov_megatron.recipe import Recipe

FORMAT_VERSION = 2
"""1 is the same without a manifest."""
CHECKPOINTS, SAVING, DAMAGED = "checkpoints", ".saving", ".damaged"
_NAME = re.compile(r"step_(\d{8})")
T = TypeVar("T")


class SaveError(RuntimeError):
    """A checkpoint that could not be written: the same on all ranks, nothing is left of it, and training can go on."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint says besides weights and optimizer state."""

    step: int
    """Optimizer steps done."""
    recipe: dict
    """The resolved recipe of the run that saved it."""
    extra: dict[str, Any]
    """Whatever `save` was given, e.g. the data's fingerprint."""


def list_checkpoints(run_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run as (step, folder), oldest first."""
    folder = run_dir / CHECKPOINTS
    found = [(int(match[1]), path) for path in folder.glob("step_*") if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = list_checkpoints(run_dir)
    return found[-1][1] if found else None


def find(run_dir: Path, step: int | None = None) -> Path:
    """The checkpoint of `step` (None: the newest) in a run folder; `run_dir` may also be a checkpoint's own folder."""
    if _NAME.fullmatch(run_dir.name) and step is None:
        return run_dir
    found = dict(list_checkpoints(run_dir))
    if not found:
        raise CheckpointError(f"{run_dir} holds no complete checkpoint (looked for {CHECKPOINTS}/step_*)")
    if step is not None and step not in found:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {step}; it has {', '.join(map(str, found))}")
    return found[max(found) if step is None else step]


def save(engine: Engine, run_dir: Path, step: int, keep_last: int, extra: dict[str, Any], keep_every: int = 0) -> Path:
    """Write the checkpoint of `step`; collective. Every rank writes its own share, replicas are divided among the
    data-parallel ranks. Then all but the newest `keep_last` and every step that `keep_every` divides are removed.

    Raises SaveError on all ranks where one cannot write.
    """
    return begin_save(engine, run_dir, step, keep_last, extra, keep_every, asynchronous=False).finish()


def begin_save(
    engine: Engine,
    run_dir: Path,
    step: int,
    keep_last: int,
    extra: dict[str, Any],
    keep_every: int = 0,
    asynchronous: bool = True,
) -> PendingSave:
    """Like `save`, but returns when this rank's share is copied, and a process beside this one writes it; collective.

    Training may go on at once: the checkpoint holds what was there when this was called. It exists once
    `PendingSave.finish` has returned. One at a time.
    """
    final = run_dir / CHECKPOINTS / f"step_{step:08d}"
    saving = _begin(final)
    state = _sharded_state(engine)
    state["run"] = {"version": FORMAT_VERSION, "step": step, "recipe": engine.recipe.to_dict(), "extra": extra}
    state["content_metadata"] = _metadata()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    share = writing.plan_share(state, saving, group)
    writer = BackgroundWriter(share) if asynchronous else ForegroundWriter(share)

    def complete(all_written: list[Written]) -> None:
        files = writing.write_index(share, all_written)
        manifest.write_manifest(saving, Manifest(step, _layout(engine.recipe), files))
        _publish(saving, final)
        _prune(run_dir, keep_last, keep_every, asynchronous)

    return PendingSave(step, final, saving, writer, complete)


class PendingSave:
    """A checkpoint that is being written; the same on every rank."""

    def __init__(self, step: int, final: Path, saving: Path, writer, complete: Callable[[list[Written]], None]):
        self.step, self.final = step, final
        self._saving, self._writer, self._complete = saving, writer, complete

    def is_written(self) -> bool:
        """Whether all ranks have written their shares, so that `finish` waits for none; one number from each rank,
        collective."""
        done = torch.tensor(float(self._writer.done()), device=device())
        dist.all_reduce(done, op=dist.ReduceOp.MIN)
        return bool(done)

    def finish(self) -> Path:
        """Wait for all shares, give the checkpoint its name and remove old ones; collective. Raises SaveError on all
        ranks where one could not write."""
        _agree(self._writer.result(), self._saving, self._complete)
        return self.final


def load(engine: Engine, path: Path, contents: bool = False) -> Loaded:
    """Read weights, and optimizer state if the engine has an optimizer, into this layout; collective.

    Args:
        contents: compare the checksums of all files first, not only their sizes.

    Raises CheckpointError where `path` is no complete checkpoint, RecipeError where it has another model or another
    optimizer's state.
    """
    if damage := verify(path, contents):
        raise _damaged(path, damage[0])
    stored = read_run(path)
    compatibility.check_same_model(stored["recipe"], engine.recipe, path)
    if engine.optimizer is not None:
        compatibility.check_same_optimizer(stored["recipe"], engine.recipe, path)
    state = _sharded_state(engine)
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(path)),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    try:
        with warnings.catch_warnings():  # Megatron-core 0.16.1 calls torch under a name that is deprecated
            warnings.simplefilter("ignore", FutureWarning)
            loaded = dist_checkpointing.load(state, str(path), strategy)
    except CheckpointException as error:  # torch's, of all ranks; no Exception, so that only this catches it
        raise _damaged(path, next(iter(error.failures.values()))[0]) from error
    except Exception as error:  # Megatron's own types, and the operating system's
        raise _damaged(path, error) from error
    engine.load_state(loaded["model"], loaded.get("optimizer"))
    return Loaded(stored["step"], stored["recipe"], stored["extra"])


def verify(path: Path, contents: bool) -> list[Damage]:
    """What is wrong with a checkpoint's files, the same on every rank: each looks at its share; collective.

    Args:
        contents: compare checksums, not only sizes.

    Raises CheckpointError where a rank doesn't see the folder or may not read it: that is no damage.
    """
    damage: list[Damage] = []
    problem = None if path.is_dir() else f"{path} does not exist"
    try:
        if problem is None:
            damage = manifest.find_damage(path, contents, dist.get_rank(), dist.get_world_size())
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (problem, socket.gethostname(), damage))
    for rank, (problem, host, _) in enumerate(gathered):
        if problem:
            raise CheckpointError(
                f"{problem} (on rank {rank}, {host}): the run folder must be on a file system that all nodes share, "
                "and readable there"
            )
    found = list(dict.fromkeys(one for _, _, damage in gathered for one in damage))
    manifest_alone = [one.file for one in found] == [manifest.MANIFEST_FILE]
    if manifest_alone and _from_first_rank(lambda: is_without_manifest(path)):
        if contents and dist.get_rank() == 0:
            warn(f"checkpoint {path} has no manifest, an earlier version wrote it: its files are not verified")
        return []
    return found


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose every byte is as it was written, or None where the run has none;
    collective, the same on every rank.

    Damaged ones that are newer are reported and set aside: renamed to `step_….damaged`, never deleted. Raises
    CheckpointError where only damaged ones are left: starting from the beginning is not for the run to decide.
    """
    while True:
        path = _from_first_rank(lambda: latest_checkpoint(run_dir))
        if path is None:
            break
        damage = verify(path, contents=True)
        if not damage:
            return path
        _from_first_rank(lambda path=path, damage=damage: _set_aside(path, damage))
    aside = _from_first_rank(lambda: sorted(str(path) for path in (run_dir / CHECKPOINTS).glob(f"*{DAMAGED}")))
    if aside:
        raise CheckpointError(
            f"{run_dir} has no valid checkpoint: {len(aside)} damaged set aside, the newest is {aside[-1]}. Restore "
            f"one from a copy (under its name without {DAMAGED}); to begin again from step 0, start another run with "
            f"name=… or move the {DAMAGED} folders away"
        )
    return None


def read_run(path: Path) -> dict[str, Any]:
    """Step, recipe and extra of a checkpoint, without its tensors and without process groups."""
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # Megatron raises its own types here, and torch's for a damaged file
        raise _damaged(path, error) from error
    if "run" not in common:
        raise CheckpointError(f"{path} is a Megatron checkpoint, but no run of bov_megatron wrote it")
    version = common["run"]["version"]
    if version not in (1, FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}, this code reads {FORMAT_VERSION}; use the code that wrote it"
        )
    return common["run"]


def _damaged(path: Path, error: Exception | Damage) -> CheckpointError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, Exception):
        reason = f"{type(error).__name__}: {reason}"
    return CheckpointError(
        f"checkpoint {path} is damaged or incomplete ({reason}); restore it from a copy, or use the one before"
    )


def is_without_manifest(path: Path) -> bool:
    """Whether a checkpoint is so old that it has none, rather than having lost it."""
    if (path / manifest.MANIFEST_FILE).exists():
        return False
    try:
        return read_run(path)["version"] == 1
    except CheckpointError:
        return False


def _set_aside(path: Path, damage: list[Damage]) -> None:
    """Say loudly what is wrong with a checkpoint, and take its name away."""
    aside = path.with_name(path.name + DAMAGED)
    if aside.exists():
        aside = path.with_name(f"{path.name}.{os.urandom(2).hex()}{DAMAGED}")
    path.rename(aside)
    _flush(path.parent)
    more = f" and {len(damage) - 1} more files" if len(damage) > 1 else ""
    warn(f"checkpoint {path} is damaged: {damage[0]}{more}; it is now {aside.name}, and the one before is used")


def warn(text: str) -> None:
    """One loud line on the terminal, beside any progress bar."""
    tqdm.write(f"WARNING: {text}", file=sys.stderr)
    sys.stderr.flush()


def _sharded_state(engine: Engine) -> dict[str, Any]:
    return engine.sharded_state_dict(_metadata())


def _metadata() -> dict[str, Any]:
    """Megatron changes what it is given: a fresh copy each time. Layers differ in their tensors, so each is stored
    under its own number."""
    return {"non_homogeneous_layers": True, "singleton_local_shards": False}


def _layout(recipe: Recipe) -> dict[str, int]:
    """Who saves, for the manifest."""
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return {
        "world_size": dist.get_world_size(),
        **{name: getattr(recipe.parallel, name) for name in sizes},
        "data_parallel_size": parallel_state.get_data_parallel_world_size(),
    }


def _from_first_rank(function: Callable[[], T]) -> T:
    """What `function` returns on rank 0, on every rank. Raises CheckpointError where it raises OSError there."""
    answer: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            answer[0] = function()
        except OSError as error:
            answer[1] = f"{error.filename}: {error.strerror}"
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise CheckpointError(f"cannot use the checkpoints: {answer[1]}; check the file system and its permissions")
    return answer[0]


def _begin(final: Path) -> Path:
    """Delete what crashes have left and make the folder to write into; collective.

    Its name is new each time: writers of a killed run may outlive it for a moment.
    """
    name = [f"{final.name}.{os.urandom(2).hex()}{SAVING}"]
    dist.broadcast_object_list(name, src=0)
    saving = final.with_name(name[0])

    def make(_) -> None:
        for leftover in final.parent.glob(f"*{SAVING}"):
            shutil.rmtree(leftover, ignore_errors=True)
        saving.mkdir(parents=True)

    _agree(Written(), saving, make)
    return saving


def _agree(written: Written, saving: Path, complete: Callable[[list[Written]], None]) -> None:
    """Call `complete` with all ranks' shares on rank 0, if all were written; collective.

    Raises SaveError on all ranks, with nothing left of the checkpoint, where a rank failed or `complete` does.
    """
    first = dist.get_rank() == 0
    all_written: list[Any] | None = [None] * dist.get_world_size() if first else None
    dist.gather_object(written, all_written)
    errors: list[str] = []
    if first:
        errors = [one.error for one in all_written if one.error]
        try:
            if not errors:
                complete(all_written)
        except Exception as error:  # whatever it is, the other ranks wait for the verdict
            errors = [writing.describe_error(error, saving)]
        if errors:
            errors = [_describe_failure(saving, errors)]
            shutil.rmtree(saving, ignore_errors=True)
    verdict = [errors]
    dist.broadcast_object_list(verdict, src=0)
    if verdict[0]:
        raise SaveError(verdict[0][0])


def _describe_failure(saving: Path, errors: list[str]) -> str:
    more = f" (and {len(errors) - 1} more ranks)" if len(errors) > 1 else ""
    existing = next(path for path in saving.parents if path.exists())
    free = shutil.disk_usage(existing).free / 2**20
    return f"{errors[0]}{more}; {free:,.1f} MiB are free in {existing}. Free space there, or lower checkpoint.keep_last"


def _prune(run_dir: Path, keep_last: int, keep_every: int, asynchronous: bool) -> None:
    """Remove what neither rule keeps; a folder that cannot be removed is no reason to stop. Names go at once; files,
    which takes a file system its time, in a thread if `asynchronous`."""
    for step, old in list_checkpoints(run_dir)[:-keep_last]:
        if keep_every and step % keep_every == 0:
            continue
        try:
            nameless = _take_name(old)
            if asynchronous:
                threading.Thread(target=shutil.rmtree, args=(nameless, True)).start()
            else:
                shutil.rmtree(nameless, ignore_errors=True)
        except OSError as error:
            warn(f"cannot remove the old checkpoint {old}: {error.strerror}")


def _publish(saving: Path, final: Path) -> None:
    """Flush the folder, look that it is whole, and give it its final name, in this order. Files are flushed where they
    are written; Megatron doesn't for this one."""
    _flush(saving / writing.FORMAT_FILE)
    _flush(saving)
    if damage := manifest.find_damage(saving, contents=False):
        reason = f"written, but {damage[0]}: the run folder must be on a file system that all nodes share"
        raise OSError(errno.EIO, reason, str(saving))
    replaced = _take_name(final) if final.exists() else None  # the same step saved again
    saving.rename(final)
    _flush(final.parent)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def _take_name(path: Path) -> Path:
    """Rename a checkpoint before its files are removed: half a one must not look like a whole one."""
    nameless = path.with_name(f"{path.name}.{os.urandom(2).hex()}{SAVING}")
    path.rename(nameless)
    return nameless


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
