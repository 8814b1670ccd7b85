"""A run folder from weights that were trained elsewhere: what `from-hf` and `from-nanochat` have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from bov_megatron import checkpoint
from bov_megatron.data.files import json_bytes, whole_folder
from bov_megatron.data.tokenizer import tokenizer_hash
from bov_megatron.errors import ConversionError
from bov_megatron.exchange.convert import engine_without_memory
from bov_megatron.lifecycle import run_folder
from bov_megatron.model.naming import local_from_full
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import ParallelConfig, Recipe


@dataclass(frozen=True)
class NewRun:
    """A run folder that training goes on in: weights at a step, no optimizer state."""

    checkpoint: Path
    step: int
    recipe: Recipe
    has_tokenizer: bool
    data_position: str
    """Where training reads on, in words."""

    def __str__(self) -> str:
        value = self.recipe.model.value
        layers = ", ".join(map(str, self.recipe.model.layers_from_source()))
        lines = [
            f"{self.checkpoint}: step {self.step}",
            f"value source: {value.source}"
            + (f" in layers {layers}, {value.coefficient} coefficients" if layers else ""),
            "optimizer: new; moments are zero and learning rates warm up again",
            f"data: {self.data_position}",
            f"tokenizer: {'kept with the run' if self.has_tokenizer else 'none'}",
            f"train on: bov train {self.checkpoint.parent.parent / run_folder.RECIPE} data.path=… train.steps=…",
        ]
        return "\n".join(lines)


def write_run(
    run_dir: Path,
    recipe: Recipe,
    weight: Callable[[str], Tensor],
    *,
    step: int,
    origin: dict[str, Any],
    write_tokenizer: Callable[[Path], object] | None = None,
    shards: list[str] | None = None,
) -> NewRun:
    """Make `run_dir`, with a checkpoint of weights alone, complete or not at all.

    Args:
        recipe: the run's. Its name and output folder are set to `run_dir`'s.
        weight: a canonical tensor by its name; each is asked for once, when it is written, so that the tensors of one
            parameter are in memory at a time.
        step: that the weights are of.
        origin: where they come from, for RUN_DIR/origin.json.
        write_tokenizer: writes a Hugging Face tokenizer into an empty folder.
        shards: fingerprints of the data that the steps have read, if training is to read on in it.

    Raises ConversionError if `run_dir` holds anything or cannot be written.
    """
    check_is_new(run_dir)
    recipe = dataclasses.replace(recipe, name=run_dir.name, output_dir=_literal(run_dir))
    try:
        with whole_folder(run_dir) as partial:
            tokenizer = partial / run_folder.TOKENIZER
            if write_tokenizer is not None:
                write_tokenizer(tokenizer)
            (partial / run_folder.RECIPE).write_text(yaml.safe_dump(recipe.to_dict(), sort_keys=False))
            (partial / run_folder.ORIGIN).write_bytes(json_bytes(origin))
            extra = {"tokenizer_hash": tokenizer_hash(tokenizer) if write_tokenizer else None, "shards": shards}
            _save(partial, recipe, weight, step, extra)
    except OSError as error:
        raise ConversionError(f"could not write {run_dir}: {error.strerror or error} ({error.filename})") from None
    position = (
        f"batch {step:,} of the same data (data.path must hold it)"
        if shards is not None
        else f"batch {step:,} in the order of any data.path; where the original stood in its own is not known here"
    )
    path = run_folder.checkpoint_path(run_dir, step)
    return NewRun(path, step, recipe, write_tokenizer is not None, position)


def check_is_new(run_dir: Path) -> None:
    """Raise ConversionError unless `run_dir` can be made: call it before long work."""
    if run_dir.exists() and not run_dir.is_dir():
        raise ConversionError(f"{run_dir} is a file; give the folder of a new run")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        raise ConversionError(f"{run_dir} is not empty; give the folder of a new run")


@torch.no_grad()
def _save(folder: Path, recipe: Recipe, weight: Callable[[str], Tensor], step: int, extra: dict[str, Any]) -> None:
    def read(local: LocalParameter) -> Tensor:
        return local_from_full(local, {name: weight(name) for name in local.names}, 0, 1)

    recipe = dataclasses.replace(recipe, parallel=ParallelConfig())
    train = dataclasses.replace(recipe.train, precision="fp32", fp8="none")
    with engine_without_memory(dataclasses.replace(recipe, train=train)) as engine:
        engine.recipe = recipe  # the run's precision, not this engine's
        checkpoint.save(engine, folder, step, keep_last=1, extra=extra, read=read)


def _literal(path: Path) -> str:
    """A path as `output_dir`, in which braces stand for fields."""
    return str(path).replace("{", "{{").replace("}", "}}")
