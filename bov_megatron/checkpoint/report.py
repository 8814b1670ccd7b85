"""Listing, inspecting and verifying a run's checkpoints, without process groups; for tools/checkpoint.py."""

from __future__ import annotations

import contextlib
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.checkpoint.loading import is_without_manifest, read_run
from bov_megatron.checkpoint.manifest import Damage, ManifestError, compare, find_damage, read_manifest
from bov_megatron.errors import CheckpointError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.run_folder import CHECKPOINTS, DAMAGED, SAVING
from bov_megatron.recipe import load_recipe
from bov_megatron.recipe.identity import flatten

READERS = 8
"""Files read in parallel while verifying."""


def list_run(path: Path) -> list[dict[str, Any]]:
    """All checkpoint folders of a run, oldest first, or the one checkpoint `path`.

    Each has `path`, `step`, `status` (`valid` judging by file sizes, `damaged`, `set aside`, `unfinished` or
    `not verifiable`), `damage` (a line, or None), `bytes`, and `layout` (of the run that saved it; None if unknown).

    Raises CheckpointError if there is none.
    """
    folders = [path] if path.name.startswith("step_") else sorted((path / CHECKPOINTS).glob("step_*"))
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint (looked for {CHECKPOINTS}/step_*)")
    return [_describe(folder) for folder in folders]


def verify(path: Path) -> dict[Path, list[Damage]]:
    """Compare the checksums of one checkpoint, or all of a run; returns the damage of each folder.

    Raises CheckpointError if there is nothing to verify.
    """
    if path.name.startswith("step_"):
        folders = [path] if path.is_dir() else []
    else:
        folders = [folder for _, folder in run_folder.list_checkpoints(path)]
    if not folders:
        raise CheckpointError(f"{path} holds no complete checkpoint (looked for {CHECKPOINTS}/step_*)")
    return {folder: _damage_of(folder) for folder in folders}


def inspect(path: Path, recipe: Path | None = None) -> dict[str, Any]:
    """Contents of a checkpoint, or of the newest of a run.

    Keys: `path`, `step`, `bytes`, `layout`, `extra`; `groups` (tensors, elements and bytes of the model and of each
    optimizer state), `tensors` (key, group, global shape, dtype); `recipe_differences` (field, stored and other value)
    from the file `recipe`, by default the one in the run folder; None if there is none.

    Raises CheckpointError or RecipeError for a checkpoint or recipe that can't be read.
    """
    path = run_folder.find_checkpoint(path)
    stored = read_run(path)
    tensors = _tensors(path)
    entry = _describe(path)
    groups: dict[str, dict[str, int]] = {}
    for tensor in tensors:
        total = groups.setdefault(tensor["group"], {"tensors": 0, "elements": 0, "bytes": 0})
        total["tensors"] += 1
        total["elements"] += math.prod(tensor["shape"])
        total["bytes"] += tensor["bytes"]
    return {
        "path": str(path),
        "step": stored["step"],
        "bytes": entry["bytes"],
        "layout": entry["layout"],
        "extra": stored["extra"],
        "groups": groups,
        "tensors": tensors,
        "recipe_differences": _differences(stored["recipe"], recipe, path),
    }


def format_list(entries: list[dict[str, Any]]) -> str:
    lines = []
    for entry in entries:
        layout = format_layout(entry["layout"]) if entry["layout"] else "unknown layout"
        damage = f": {entry['damage']}" if entry["damage"] else ""
        name = Path(entry["path"]).name
        lines.append(f"{name:<28} {format_bytes(entry['bytes']):>10}  {layout:<34}  {entry['status']}{damage}")
    return "\n".join(lines)


def format_inspection(contents: dict[str, Any]) -> str:
    layout = format_layout(contents["layout"]) if contents["layout"] else "unknown layout"
    lines = [f"{contents['path']}: step {contents['step']}, {format_bytes(contents['bytes'])}, saved by {layout}", ""]
    for name, group in contents["groups"].items():
        size = format_bytes(group["bytes"])
        lines.append(f"{name:<28} {group['tensors']:>5} tensors {group['elements']:>16,} elements {size:>10}")
    group = None
    for tensor in contents["tensors"]:
        if tensor["group"] != group:
            group = tensor["group"]
            lines += ["", f"{group}:"]
        shape = " × ".join(map(str, tensor["shape"])) or "one number"
        lines.append(f"  {tensor['key']:<70} {shape:<22} {tensor['dtype']}")
    differences = contents["recipe_differences"]
    if differences is None:
        lines += ["", "recipe: no other one to compare with"]
    else:
        lines += ["", "recipe: the same" if not differences else "recipe (stored -> other):"]
        lines += [f"  {entry['field']}: {entry['stored']!r} -> {entry['other']!r}" for entry in differences]
    return "\n".join(lines)


def format_layout(layout: dict[str, int]) -> str:
    """E.g. `4 ranks: tensor 2 × pipeline 1 × context 1 × data 2`."""
    parts = (f"{name.split('_')[0]} {size}" for name, size in layout.items() if name != "world_size")
    return f"{layout['world_size']} ranks: {' × '.join(parts)}"


def format_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1024
    return f"{size:.1f} TiB"


def _describe(folder: Path) -> dict[str, Any]:
    layout = damage = None
    with contextlib.suppress(ManifestError):
        layout = read_manifest(folder).layout
    if folder.name.endswith(SAVING):
        status = "unfinished"
    else:
        damages = find_damage(folder, contents=False)
        status = "damaged" if damages else "valid"
        if damages and is_without_manifest(folder):
            status, damages = "not verifiable", []
        if folder.name.endswith(DAMAGED):
            status = "set aside"
        damage = str(damages[0]) if damages else None
    return {
        "path": str(folder),
        "step": int(folder.name.removeprefix("step_")[:8]),
        "status": status,
        "damage": damage,
        "bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
        "layout": layout,
    }


def _damage_of(folder: Path) -> list[Damage]:
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return [error.damage]
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda share: compare(folder, manifest, True, share, READERS), range(READERS))
    return [damage for part in parts for damage in part]


def _tensors(path: Path) -> list[dict[str, Any]]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # unpickling a damaged index can raise anything
        raise CheckpointError(f"the index of {path} cannot be read ({type(error).__name__}: {error})") from error
    tensors = []
    for key, entry in stored.items():
        if isinstance(entry, TensorStorageMetadata):
            dtype = entry.properties.dtype
            tensors.append(
                {
                    "key": key,
                    "group": ".".join(key.split(".")[:2]) if key.startswith("optimizer.") else "model",
                    "shape": list(entry.size),
                    "dtype": str(dtype).removeprefix("torch."),
                    "bytes": math.prod(entry.size) * dtype.itemsize,
                }
            )
    return sorted(tensors, key=lambda tensor: (tensor["group"], tensor["key"]))


def _differences(stored: dict, recipe: Path | None, path: Path) -> list[dict[str, Any]] | None:
    started_with = run_folder.run_dir_of(path) / run_folder.RECIPE
    if recipe is not None:
        other = load_recipe(recipe).to_dict()
    elif started_with.is_file():
        other = yaml.safe_load(started_with.read_text())
    else:
        return None
    stored, other = flatten(stored), flatten(other)
    return [
        {"field": field, "stored": stored.get(field), "other": other.get(field)}
        for field in sorted(stored.keys() | other.keys())
        if stored.get(field) != other.get(field)
    ]
