"""Reading checkpoints, in any layout of ranks, whichever layout wrote them.

A checkpoint whose files differ from its manifest is reported and set aside, and the one before it is used.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from bov_megatron.checkpoint import compatibility, manifest, writing
from bov_megatron.checkpoint.manifest import Damage
from bov_megatron.checkpoint.writing import flush, sharded_state
from bov_megatron.engines.base import Engine
from bov_megatron.errors import CheckpointError
from bov_megatron.lifecycle.run_folder import CHECKPOINTS, DAMAGED, latest_checkpoint
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.optim.sharded_state import main_weights
from bov_megatron.parallel.agreement import gather_items, on_all_ranks, on_first_rank
from bov_megatron.parallel.parameter import LocalParameter

READ_BYTES = 256 << 20
"""Each read opens the checkpoint's index anew, which takes longer than a small tensor."""


@dataclass(frozen=True)
class Loaded:
    """What a checkpoint contains besides weights and optimizer state."""

    step: int
    """Optimizer steps done."""
    recipe: dict
    """The resolved recipe of the run that saved it."""
    extra: dict[str, Any]
    """What `save` was given, e.g. the data's fingerprint."""


def load(engine: Engine, path: Path, contents: bool = False) -> Loaded:
    """Load weights, and optimizer state if the engine has an optimizer, into this layout; collective.

    From a checkpoint of weights alone an optimizer begins anew at its step: zero moments, and learning rates that warm
    up again.

    Args:
        contents: first compare the checksums of all files, not only their sizes.

    Raises CheckpointError where `path` is not a complete checkpoint, RecipeError where it is of another model or
    optimizer.
    """
    if damage := verify(path, contents):
        raise _damaged(path, damage[0])
    stored = read_run(path)
    compatibility.check_same_model(stored["recipe"], engine.recipe, path)
    if engine.optimizer is not None:
        compatibility.check_same_optimizer(stored, engine.recipe, path)
    state = sharded_state(engine)
    optimizer_state = state.pop("optimizer") if stored.get("weights_only") and engine.optimizer is not None else None
    loaded = _load_tensors(state, path)
    if optimizer_state is not None:
        loaded["optimizer"] = _new_optimizer_state(engine, optimizer_state, path, stored["step"])
    engine.load_state(loaded["model"], loaded.get("optimizer"))
    return Loaded(stored["step"], stored["recipe"], stored["extra"])


def read_weights(engine: Engine, path: Path) -> Iterator[tuple[LocalParameter, Tensor]]:
    """This rank's parameters and what a checkpoint holds of them, some READ_BYTES at a time; collective.

    The engine's own weights stay as they are, and may be without memory (parallel.device.WithoutMemory). Raises
    CheckpointError and RecipeError as `load` does.
    """
    if damage := verify(path, contents=True):
        raise _damaged(path, damage[0])
    compatibility.check_same_model(read_run(path)["recipe"], engine.recipe, path)
    chunks = sharded_state(engine)["model"]
    for number, chunk in enumerate(engine.chunks):
        for batch in _batches(chunk.local_parameters):
            wanted = {}
            for local in batch:
                sharded = chunks[str(number)][local.qualified_name]
                empty = torch.empty(sharded.local_shape, dtype=sharded.dtype)
                wanted[local.qualified_name] = dataclasses.replace(sharded, data=empty)
            found = _load_tensors({"model": {str(number): wanted}}, path)["model"][str(number)]
            for local in batch:
                yield local, found.pop(local.qualified_name)


def _batches(parameters: Sequence[LocalParameter]) -> Iterator[list[LocalParameter]]:
    """Some of READ_BYTES together, or one that is larger."""
    batch: list[LocalParameter] = []
    for local in parameters:
        if batch and sum(other.parameter.nbytes for other in [*batch, local]) > READ_BYTES:
            yield batch
            batch = []
        batch.append(local)
    if batch:
        yield batch


def _load_tensors(state: dict[str, Any], path: Path) -> dict[str, Any]:
    """Megatron's sharded state dict with the checkpoint's tensors; collective."""
    strategy = FullyParallelLoadStrategyWrapper(
        get_default_load_sharded_strategy(str(path)),
        parallel_state.get_data_parallel_group(with_context_parallel=True),
    )
    try:
        with warnings.catch_warnings():  # Megatron-core 0.16.1 uses a deprecated name of torch
            warnings.simplefilter("ignore", FutureWarning)
            return dist_checkpointing.load(state, str(path), strategy)
    except CheckpointException as error:  # torch's, with the failures of all ranks; a BaseException
        raise _damaged(path, next(iter(error.failures.values()))[0]) from error
    except Exception as error:  # Megatron has its own types, and there are OSErrors
        raise _damaged(path, error) from error


def _new_optimizer_state(engine: Engine, state: dict[str, Any], path: Path, step: int) -> dict[str, Any]:
    """The state of an optimizer that begins at `step`, with main weights from the weights in a checkpoint; collective.

    Args:
        state: the optimizer's sharded state.
    """
    tensors = {name: tensor.data.zero_() for name, tensor in state["state"].items()}
    if engine.recipe.train.precision == "bf16":
        # Not from the model, whose weights are rounded. Apart from it, because both have the same keys.
        tensors |= _load_tensors({"main": main_weights(state)}, path).get("main", {})
    return {"step": step, "moments_since": step, "state": tensors}


def newest_valid(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run whose files have their checksums, or None where the run has no checkpoint;
    collective, the same on every rank.

    Newer, damaged ones are reported and renamed to `step_….damaged`, never deleted. Raises CheckpointError where all
    are damaged: whether to start from step 0 is for the user to decide.
    """
    while path := on_first_rank(lambda: latest_checkpoint(run_dir)):
        damage = verify(path, contents=True)
        if not damage:
            return path
        on_first_rank(functools.partial(_set_aside, path, damage))
    aside = on_first_rank(lambda: sorted(str(path) for path in (run_dir / CHECKPOINTS).glob(f"*{DAMAGED}")))
    if aside:
        raise CheckpointError(
            f"{run_dir} has no valid checkpoint: {len(aside)} damaged set aside, the newest is {aside[-1]}. Restore "
            f"one from a copy (under its name without {DAMAGED}); to begin again from step 0, start another run with "
            f"name=… or move the {DAMAGED} folders away"
        )
    return None


def verify(path: Path, contents: bool) -> list[Damage]:
    """What is wrong with a checkpoint's files, the same on every rank; collective. Each rank checks a share of them.

    Args:
        contents: compare checksums, not only sizes.

    Raises CheckpointError where a rank cannot see or read the folder.
    """
    damage = gather_items(on_all_ranks(lambda: _damage_of_share(path, contents)))
    damage = list(dict.fromkeys(damage))  # every rank reads the manifest
    manifest_only = [item.file for item in damage] == [manifest.MANIFEST_FILE]
    if manifest_only and on_first_rank(lambda: is_without_manifest(path)):
        if contents and dist.get_rank() == 0:
            warn(f"checkpoint {path} is from an earlier version without manifests: its files are not verified")
        return []
    return damage


def _damage_of_share(path: Path, contents: bool) -> list[Damage]:
    problem = None if path.is_dir() else f"{path} does not exist"
    try:
        if problem is None:
            return manifest.find_damage(path, contents, dist.get_rank(), dist.get_world_size())
    except OSError as error:
        problem = f"{error.filename}: {error.strerror}"
    raise CheckpointError(
        f"{problem} (host {socket.gethostname()}): the run folder must be on a file system that all nodes share, and "
        "readable there"
    )


def read_run(path: Path) -> dict[str, Any]:
    """Step, recipe and extra of a checkpoint, without its tensors and without process groups."""
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
    except Exception as error:  # Megatron's own types, or torch's for a damaged file
        raise _damaged(path, error) from error
    if "run" not in common:
        raise CheckpointError(f"{path} is a Megatron checkpoint, but was not written by bov_megatron")
    version = common["run"]["version"]
    if version not in (1, writing.FORMAT_VERSION):
        raise CheckpointError(
            f"{path} has format version {version}, this code reads {writing.FORMAT_VERSION}; use the code that wrote it"
        )
    return common["run"]


def is_without_manifest(path: Path) -> bool:
    """Whether a checkpoint is of format 1, which had no manifest; False where the manifest is lost."""
    if (path / manifest.MANIFEST_FILE).exists():
        return False
    try:
        return read_run(path)["version"] == 1
    except CheckpointError:
        return False


def _damaged(path: Path, error: BaseException | Damage) -> CheckpointError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    if isinstance(error, BaseException):
        reason = f"{type(error).__name__}: {reason}"
    return CheckpointError(
        f"checkpoint {path} is damaged or incomplete ({reason}); restore it from a copy, or use the one before"
    )


def _set_aside(path: Path, damage: list[Damage]) -> None:
    """Rename a damaged checkpoint, and warn."""
    aside = path.with_name(path.name + DAMAGED)
    if aside.exists():
        aside = path.with_name(f"{path.name}.{os.urandom(2).hex()}{DAMAGED}")
    path.rename(aside)
    flush(path.parent)
    more = f" and {len(damage) - 1} more files" if len(damage) > 1 else ""
    warn(f"checkpoint {path} is damaged: {damage[0]}{more}; it is now {aside.name}, and the one before is used")
