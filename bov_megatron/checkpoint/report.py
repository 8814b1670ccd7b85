"""What lies in a run's checkpoints: listed, looked into, verified, without process groups; for tools/checkpoint.py."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from bov_megatron.checkpoint.loading import is_without_manifest, read_run
from bov_megatron.checkpoint.manifest import Damage, ManifestError, find_damage, read_manifest
from bov_megatron.errors import CheckpointError
from bov_megatron.lifecycle import run_folder
from bov_megatron.lifecycle.run_folder import CHECKPOINTS, DAMAGED, SAVING
from bov_megatron.recipe import load_recipe

READERS = 8
"""Files read at once while verifying."""


def list_run(path: Path) -> list[dict[str, Any]]:
    """Every folder of a run's checkpoints, oldest first, or the one checkpoint that `path` is.

    Each has `path`, `step`, `status` (`valid` by the sizes of its files, `damaged`, `set aside`, `unfinished`,
    `not verifiable`), `damage` (a line, or null), `bytes`, and `layout` (of the run that saved it; null if unknown).

    Raises CheckpointError where there is nothing.
    """
    folders = [path] if path.name.startswith("step_") else sorted((path / CHECKPOINTS).glob("step_*"))
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise CheckpointError(f"{path} holds no checkpoint (looked for {CHECKPOINTS}/step_*)")
    return [_describe(folder) for folder in folders]


def verify(path: Path) -> dict[Path, list[Damage]]:
    """Compare every byte of a checkpoint, or of all of a run's, with the manifest; damage by folder, empty if none.

    Raises CheckpointError where there is nothing to verify.
    """
    if path.name.startswith("step_"):
        folders = [path] if path.is_dir() else []
    else:
        folders = [folder for _, folder in run_folder.list_checkpoints(path)]
    if not folders:
        raise CheckpointError(f"{path} holds no complete checkpoint (looked for {CHECKPOINTS}/step_*)")
    return {folder: _damage_of(folder) for folder in folders}


def inspect(path: Path, recipe: Path | None = None) -> dict[str, Any]:
    """What is stored in a checkpoint, or in the newest of a run.

    Keys: `path`, `step`, `bytes`, `layout`, `extra`; `groups` (tensors, elements and bytes of the model and of each
    optimizer state), `tensors` (key, group, global shape, dtype); `recipe_differences` (field, stored and other value)
    from `recipe`, a file, by default the one that the run folder was started with last; null where there is none.

    Raises CheckpointError where it cannot be read, RecipeError for a recipe that cannot.
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
    """A line for each folder."""
    lines = []
    for entry in entries:
        layout = format_layout(entry["layout"]) if entry["layout"] else "unknown layout"
        damage = f": {entry['damage']}" if entry["damage"] else ""
        name = Path(entry["path"]).name
        lines.append(f"{name:<28} {format_bytes(entry['bytes']):>10}  {layout:<34}  {entry['status']}{damage}")
    return "\n".join(lines)


def format_inspection(found: dict[str, Any]) -> str:
    """Several lines: the checkpoint, its groups, its tensors, and how its recipe differs."""
    layout = format_layout(found["layout"]) if found["layout"] else "unknown layout"
    lines = [f"{found['path']}: step {found['step']}, {format_bytes(found['bytes'])}, saved by {layout}", ""]
    for name, group in found["groups"].items():
        size = format_bytes(group["bytes"])
        lines.append(f"{name:<28} {group['tensors']:>5} tensors {group['elements']:>16,} elements {size:>10}")
    group = None
    for tensor in found["tensors"]:
        if tensor["group"] != group:
            group = tensor["group"]
            lines += ["", f"{group}:"]
        shape = " × ".join(map(str, tensor["shape"])) or "one number"
        lines.append(f"  {tensor['key']:<70} {shape:<22} {tensor['dtype']}")
    differences = found["recipe_differences"]
    if differences is None:
        lines += ["", "recipe: no other one to compare with"]
    else:
        lines += ["", "recipe: the same" if not differences else "recipe (stored -> other):"]
        lines += [f"  {one['field']}: {one['stored']!r} -> {one['other']!r}" for one in differences]
    return "\n".join(lines)


def format_layout(layout: dict[str, int]) -> str:
    """`4 ranks: tensor 2 × pipeline 1 × context 1 × data 2`."""
    parts = (f"{name.split('_')[0]} {size}" for name, size in layout.items() if name != "world_size")
    return f"{layout['world_size']} ranks: {' × '.join(parts)}"


def format_bytes(size: int) -> str:
    """With a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.1f} {unit}" if unit != "B" else f"{size} B"
        size /= 1024
    return f"{size:.1f} TiB"


def _describe(folder: Path) -> dict[str, Any]:
    layout, damage, size = None, None, _size_of(folder)
    try:
        manifest = read_manifest(folder)
        layout = manifest.layout
    except ManifestError:
        pass
    if folder.name.endswith(SAVING):
        status = "unfinished"
    else:
        found = find_damage(folder, contents=False)
        status = "damaged" if found else "valid"
        if found and is_without_manifest(folder):
            status, found = "not verifiable", []
        if folder.name.endswith(DAMAGED):
            status = "set aside"
        damage = str(found[0]) if found else None
    step = int(folder.name.removeprefix("step_")[:8])
    return {
        "path": str(folder),
        "step": step,
        "status": status,
        "damage": damage,
        "bytes": size,
        "layout": layout,
    }


def _damage_of(folder: Path) -> list[Damage]:
    with ThreadPoolExecutor(READERS) as pool:
        parts = pool.map(lambda share: find_damage(folder, True, share, READERS), range(READERS))
    return list(dict.fromkeys(damage for part in parts for damage in part))


def _tensors(path: Path) -> list[dict[str, Any]]:
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    try:
        stored = FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:  # whatever unpickling a damaged index raises
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
    one, two = _flat(stored), _flat(other)
    return [
        {"field": field, "stored": one.get(field), "other": two.get(field)}
        for field in sorted(one.keys() | two.keys())
        if one.get(field) != two.get(field)
    ]


def _flat(values: dict, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in values.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _size_of(folder: Path) -> int:
    return sum(os.path.getsize(file) for file in folder.rglob("*") if file.is_file())
