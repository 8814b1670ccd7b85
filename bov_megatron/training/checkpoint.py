"""Checkpoints of a run: atomic folders, newest first, any layout of ranks.

    RUN/checkpoints/step_00000200/     one complete checkpoint (Megatron's torch_dist format)
    RUN/checkpoints/step_00000400.1f3a.saving/   being written or removed; never read, deleted by the next save

A checkpoint is written beside its final name by all ranks, flushed to disk, and renamed in one operation: a crash
at any moment leaves either the complete new checkpoint or the previous ones as they were. Old ones lose their name
before their files, so that a crash while deleting leaves nothing that looks like a checkpoint either.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.base import StrategyAction, get_default_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch.distributed.checkpoint.api import CheckpointException

from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.recipe import Recipe, RecipeError

FORMAT_VERSION = 1
CHECKPOINTS, SAVING = "checkpoints", ".saving"
_NAME = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or doesn't belong to this run; the message says what to do."""


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


def save(engine: MegatronEngine, run_dir: Path, step: int, keep_last: int, extra: dict[str, Any]) -> Path:
    """Write the checkpoint of `step`; collective. Every rank writes its own share, replicas are divided among the
    data-parallel ranks. Then all but the newest `keep_last` are removed."""
    final = run_dir / CHECKPOINTS / f"step_{step:08d}"
    saving = _begin(final)
    # Megatron would keep a server process per rank for writers that outlive this call: these don't.
    filesystem_async._results_queue = queue.Queue()
    state = _sharded_state(engine)
    state["run"] = {"version": FORMAT_VERSION, "step": step, "recipe": engine.recipe.to_dict(), "extra": extra}
    strategy = FullyParallelSaveStrategyWrapper(
        get_default_strategy(StrategyAction.SAVE_SHARDED, "torch_dist", 1),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    dist_checkpointing.save(state, str(saving), strategy, content_metadata=_metadata())
    dist.barrier()
    if dist.get_rank() == 0:
        _publish(saving, final)
        for _, old in list_checkpoints(run_dir)[:-keep_last]:
            _remove(old)
    dist.barrier()
    return final


def load(engine: MegatronEngine, path: Path) -> Loaded:
    """Read weights, and optimizer state if the engine has an optimizer, into this layout; collective.

    Raises CheckpointError where `path` is no complete checkpoint, RecipeError where it has another model or another
    optimizer's state.
    """
    stored = read_run(path)
    check_same_model(stored["recipe"], engine.recipe, path)
    if engine.optimizer is not None:
        check_same_optimizer(stored["recipe"], engine.recipe, path)
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


def read_run(path: Path) -> dict[str, Any]:
    """Step, recipe and extra of a checkpoint, without its tensors and without process groups."""
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # Megatron raises its own types here, and torch's for a damaged file
        raise _damaged(path, error) from error
    if "run" not in common:
        raise CheckpointError(f"{path} is a Megatron checkpoint, but no run of bov_megatron wrote it")
    version = common["run"]["version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this code reads {FORMAT_VERSION}; use the code that wrote it"
        )
    return common["run"]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return CheckpointError(
        f"checkpoint {path} is damaged or incomplete ({type(error).__name__}: {reason}); restore it from a copy, or "
        "move it away to continue from the one before"
    )


def check_same_model(stored: dict, recipe: Recipe, path: Path) -> None:
    """Refuse a checkpoint whose model has other tensors than the recipe's."""
    layout_only = {"core_attention", "value.table_partition", "value.lookup"}
    _compare(stored["model"], recipe.to_dict()["model"], "model", layout_only, path)


def check_same_optimizer(stored: dict, recipe: Recipe, path: Path) -> None:
    """Refuse a checkpoint whose optimizer state is another one's: other tensors, or none where some are needed."""
    now = recipe.to_dict()
    for section, field in (("optimizer", "name"), ("train", "precision")):
        _compare(stored[section], now[section], section, set(now[section]) - {field}, path)


def check_same_data_order(stored: dict, recipe: Recipe, path: Path) -> None:
    """Refuse to go on where the recipe would see other samples, or the same in another order."""
    now = recipe.to_dict()
    remedy = "resuming would reorder the data: restore the value, or start another run with name=…"
    _compare(stored["train"], now["train"], "train", set(now["train"]) - {"global_batch_size"}, path, remedy)
    free = {"num_workers", "prefetch_factor", "path", "remote"}
    streams = {"streams": [_order_of(s) for s in stored["data"]["streams"]]}
    streams_now = {"streams": [_order_of(s) for s in now["data"]["streams"]]}
    _compare({**stored["data"], **streams}, {**now["data"], **streams_now}, "data", free, path, remedy)


def _order_of(stream: dict) -> float:
    """A stream may move to another folder; its weight may not change."""
    return stream["weight"]


def _compare(stored: dict, now: dict, where: str, free: set[str], path: Path, remedy: str | None = None) -> None:
    for key, value in now.items():
        name = f"{where}.{key}"
        if name.removeprefix("model.") in free or key in free:
            continue
        if isinstance(value, dict):
            _compare(stored.get(key, {}), value, name, free, path, remedy)
        elif stored.get(key) != value:
            raise RecipeError(
                f"{name}={value!r}, but the checkpoint {path} was saved with {stored.get(key)!r}; "
                + (remedy or "use the recipe stored with it, or start another run with name=…")
            )


def _sharded_state(engine: MegatronEngine) -> dict[str, Any]:
    model = engine.model_sharded_state_dict(_metadata())
    state: dict[str, Any] = {"model": model}
    if engine.optimizer is not None:
        state["optimizer"] = engine.optimizer.sharded_state_dict(model)
    return state


def _metadata() -> dict[str, Any]:
    """Megatron changes what it is given: a fresh copy each time. Layers differ in their tensors, so each is stored
    under its own number."""
    return {"non_homogeneous_layers": True, "singleton_local_shards": False}


def _begin(final: Path) -> Path:
    """Delete what crashes have left and make the folder to write into; collective.

    Its name is new each time: writers of a killed run may outlive it for a moment.
    """
    name = [f"{final.name}.{os.urandom(2).hex()}{SAVING}"]
    dist.broadcast_object_list(name, src=0)
    saving = final.with_name(name[0])
    if dist.get_rank() == 0:
        for leftover in final.parent.glob(f"*{SAVING}"):
            shutil.rmtree(leftover, ignore_errors=True)
        saving.mkdir(parents=True)
    dist.barrier()
    return saving


def _publish(saving: Path, final: Path) -> None:
    """Flush what was written and give it its final name, in this order."""
    for file in saving.rglob("*"):
        _flush(file)
    _flush(saving)
    if final.exists():  # the same step saved again
        _remove(final)
    saving.rename(final)
    _flush(final.parent)


def _remove(path: Path) -> None:
    """Take a checkpoint's name away, then its files."""
    nameless = path.with_name(f"{path.name}.{os.urandom(2).hex()}{SAVING}")
    path.rename(nameless)
    shutil.rmtree(nameless, ignore_errors=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
