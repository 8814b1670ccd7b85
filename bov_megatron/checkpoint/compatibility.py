"""Whether a run may resume from a checkpoint: same model, optimizer and order of data; all else may change."""

from __future__ import annotations

import copy
from pathlib import Path

from bov_megatron.errors import RecipeError
from bov_megatron.recipe import Recipe


def without_retired_values(stored: dict) -> dict:
    """A stored recipe as this version reads it: defaults instead of values that only earlier versions had, none of
    which changes what the model computes."""
    recipe = copy.deepcopy(stored)
    if recipe["model"].get("core_attention") == "megatron":
        del recipe["model"]["core_attention"]
    if recipe["model"]["value"].get("lookup") in ("all_reduce", "all_to_all"):
        del recipe["model"]["value"]["lookup"]
    return recipe


def check_same_model(stored: dict, recipe: Recipe, path: Path) -> None:
    """Raise RecipeError if the checkpoint's model has other tensors than the recipe's."""
    layout_only = {"core_attention", "linear_layers"}
    layout_only |= {"value.table_partition", "value.lookup", "value.table_memory"}
    _compare(stored["model"], recipe.to_dict()["model"], "model", layout_only, path)


def check_same_optimizer(run: dict, recipe: Recipe, path: Path) -> None:
    """Raise RecipeError if the optimizer state of a checkpoint (`run`: its `read_run`) has other tensors than the
    recipe's; one of weights alone suits every optimizer."""
    if run.get("weights_only"):
        return
    stored, now = run["recipe"], recipe.to_dict()
    for section, field in (("optimizer", "name"), ("train", "precision")):
        _compare(stored[section], now[section], section, set(now[section]) - {field}, path)


def check_same_data_order(run: dict, recipe: Recipe, path: Path) -> None:
    """Raise RecipeError if the recipe would read other samples than a checkpoint's run, or in another order; nothing is
    refused where that run has read none (`run`: its `read_run`)."""
    if run["extra"].get("shards", ()) is None:
        return
    stored, now = run["recipe"], recipe.to_dict()
    remedy = "resuming would reorder the data: restore the value, or start another run with name=…"
    _compare(stored["train"], now["train"], "train", set(now["train"]) - {"global_batch_size"}, path, remedy)
    free = {"num_workers", "prefetch_factor", "path", "remote"}
    if now["data"]["num_canonical_nodes"] is None:  # that of the checkpoint
        free.add("num_canonical_nodes")
    # A stream may move to another folder; its weight may not change.
    streams = {"streams": [stream["weight"] for stream in stored["data"]["streams"]]}
    streams_now = {"streams": [stream["weight"] for stream in now["data"]["streams"]]}
    _compare({**stored["data"], **streams}, {**now["data"], **streams_now}, "data", free, path, remedy)


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
