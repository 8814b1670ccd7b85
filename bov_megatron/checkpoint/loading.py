"""Reading checkpoints, in any layout of ranks, whichever layout wrote them.

A checkpoint whose files differ from its manifest is reported and set aside, and the one before it is used. What all
ranks need, manifest, common state and index, rank 0 reads and sends: thousands of ranks that open the same small files
are what a shared file system is worst at.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
import pickle
import socket
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import merge
from megatron.core.dist_checkpointing.mapping import apply_factory_merges
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.cached_metadata_filesystem_reader import CachedMetadataFileSystemReader
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelLoadStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from bov_megatron.checkpoint import compatibility, manifest, writing
from bov_megatron.checkpoint.manifest import Damage, Manifest
from bov_megatron.checkpoint.writing import flush, sharded_state
from bov_megatron.engines.base import Engine
from bov_megatron.errors import CheckpointError
from bov_megatron.lifecycle.run_folder import CHECKPOINTS, DAMAGED, latest_checkpoint
from bov_megatron.lifecycle.terminal import warn
from bov_megatron.optim.sharded_state import main_weights
from bov_megatron.parallel.agreement import gather_items, on_all_ranks, on_first_rank
from bov_megatron.parallel.parameter import LocalParameter

READ_BYTES = 256 << 20
"""All ranks plan each read together, which takes longer than a small tensor."""


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
    stored = _read_for_all(path)
    run = stored.common["run"]
    compatibility.check_same_model(run["recipe"], engine.recipe, path)
    if engine.optimizer is not None:
        compatibility.check_same_optimizer(run, engine.recipe, path)
    state = sharded_state(engine)
    optimizer_state = state.pop("optimizer") if run.get("weights_only") and engine.optimizer is not None else None
    loaded = _load_tensors(state, stored)
    if optimizer_state is not None:
        loaded["optimizer"] = _new_optimizer_state(engine, optimizer_state, stored)
    engine.load_state(loaded["model"], loaded.get("optimizer"))
    return Loaded(run["step"], run["recipe"], run["extra"])


def read_weights(engine: Engine, path: Path) -> Iterator[tuple[LocalParameter, Tensor]]:
    """This rank's parameters and what a checkpoint holds of them, some READ_BYTES at a time; collective.

    The engine's own weights stay as they are, and may be without memory (parallel.device.WithoutMemory). Raises
    CheckpointError and RecipeError as `load` does.
    """
    if damage := verify(path, contents=True):
        raise _damaged(path, damage[0])
    stored = _read_for_all(path)
    compatibility.check_same_model(stored.common["run"]["recipe"], engine.recipe, path)
    chunks = sharded_state(engine)["model"]
    for number, chunk in enumerate(engine.chunks):
        for batch in _batches(chunk.local_parameters):
            wanted = {}
            for local in batch:
                sharded = chunks[str(number)][local.qualified_name]
                empty = torch.empty(sharded.local_shape, dtype=sharded.dtype)
                wanted[local.qualified_name] = dataclasses.replace(sharded, data=empty)
            found = _load_tensors({"model": {str(number): wanted}}, stored)["model"][str(number)]
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


@dataclass(frozen=True)
class _Stored:
    """What every rank needs of a checkpoint's small files."""

    path: Path
    common: dict[str, Any]
    """State that isn't sharded."""
    index: Metadata
    """Where each tensor lies."""


def _read_for_all(path: Path) -> _Stored:
    """Read by rank 0 and sent; collective."""

    def read() -> tuple[dict, bytes]:
        try:
            get_default_load_sharded_strategy(str(path))  # raises for another format
            return _read_common(path), (path / writing.INDEX_FILE).read_bytes()
        except (CheckpointingException, OSError) as error:
            raise _damaged(path, error) from error

    common, index = on_first_rank(read)
    try:
        return _Stored(path, common, pickle.loads(index))
    except Exception as error:  # a pickle that is damaged raises anything
        raise _damaged(path, error) from error


class _LoadStrategy(TorchDistLoadShardedStrategy):
    """Megatron's strategy with an index that has been read."""

    def __init__(self, stored: _Stored):
        super().__init__()
        self._reader = CachedMetadataFileSystemReader(stored.path)
        self._reader._cached_metadata = stored.index

    def load(self, sharded_state_dict, checkpoint_dir):
        made, torch_strategy._get_filesystem_reader = (
            torch_strategy._get_filesystem_reader,
            lambda *_, **__: self._reader,
        )
        try:
            return super().load(sharded_state_dict, checkpoint_dir)
        finally:
            torch_strategy._get_filesystem_reader = made


def _load_tensors(state: dict[str, Any], stored: _Stored) -> dict[str, Any]:
    """Megatron's sharded state dict with the checkpoint's tensors, and the state that isn't sharded; collective."""
    # As megatron.core.dist_checkpointing.load, without reading small files and without comparing all ranks' shards.
    force_all_tensors_to_non_fp8(state)
    sharded, not_stored, factories = load_preprocess(state)
    sharded, _ = extract_sharded_base(sharded)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    try:
        with warnings.catch_warnings():  # Megatron-core 0.16.1 uses a deprecated name of torch
            warnings.simplefilter("ignore", FutureWarning)
            loaded = FullyParallelLoadStrategyWrapper(_LoadStrategy(stored), group).load(sharded, stored.path)
    except CheckpointException as error:  # torch's, with the failures of all ranks; a BaseException
        raise _damaged(stored.path, next(iter(error.failures.values()))[0]) from error
    except Exception as error:  # Megatron has its own types, and there are OSErrors
        raise _damaged(stored.path, error) from error
    common = merge(merge(copy.deepcopy(stored.common), not_stored), loaded)
    return apply_factory_merges(common, factories)


def _new_optimizer_state(engine: Engine, state: dict[str, Any], stored: _Stored) -> dict[str, Any]:
    """The state of an optimizer that begins at a checkpoint's step, with main weights from its weights; collective.

    Args:
        state: the optimizer's sharded state.
    """
    tensors = {name: tensor.data.zero_() for name, tensor in state["state"].items()}
    if engine.recipe.train.precision == "bf16":
        # Not from the model, whose weights are rounded. Apart from it, because both have the same keys.
        tensors |= _load_tensors({"main": main_weights(state)}, stored).get("main", {})
    step = stored.common["run"]["step"]
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
    on_all_ranks(lambda: _check_visible(path))
    listed = on_first_rank(lambda: _read_manifest(path))
    if isinstance(listed, Damage):
        if not on_first_rank(lambda: is_without_manifest(path)):
            return [listed]
        if contents and dist.get_rank() == 0:
            warn(f"checkpoint {path} is from an earlier version without manifests: its files are not verified")
        return []
    return gather_items(on_all_ranks(lambda: _damage_of_share(path, listed, contents)))


def _check_visible(path: Path) -> None:
    if not path.is_dir():
        raise _unreadable(f"{path} does not exist")


def _read_manifest(path: Path) -> Manifest | Damage:
    try:
        return manifest.read_manifest(path)
    except manifest.ManifestError as error:
        return error.damage
    except OSError as error:
        raise _unreadable(f"{error.filename}: {error.strerror}") from error


def _damage_of_share(path: Path, listed: Manifest, contents: bool) -> list[Damage]:
    try:
        return manifest.compare(path, listed, contents, dist.get_rank(), dist.get_world_size())
    except OSError as error:
        raise _unreadable(f"{error.filename}: {error.strerror}") from error


def _unreadable(problem: str) -> CheckpointError:
    return CheckpointError(
        f"{problem} (host {socket.gethostname()}): the run folder must be on a file system that all nodes share, and "
        "readable there"
    )


def read_run(path: Path) -> dict[str, Any]:
    """Step, recipe and extra of a checkpoint, without its tensors and without process groups."""
    return _read_common(path)["run"]


def _read_common(path: Path) -> dict[str, Any]:
    """State of a checkpoint that isn't sharded, with what `read_run` returns as `run`."""
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
    return common


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
