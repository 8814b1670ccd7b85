"""The data loader alone, on a data set made from Python's standard library."""

from __future__ import annotations

import asyncio
import dataclasses
import tempfile
from pathlib import Path

from benchmarks.timing import Spread, take_turns
from benchmarks.training_step import bench_recipe
from bov_megatron.data.loader import TrainLoader
from bov_megatron.data.prepare import PrepareOptions, prepare_data
from bov_megatron.data.tokenizer import train_tokenizer
from bov_megatron.recipe import DataConfig, Recipe

BATCHES = 20
"""Per turn."""
VOCAB_SIZE = 320
"""Small, so that the tokenizer is trained quickly; a loader's speed doesn't depend on it."""


def bench_loader(turns: int, quick: bool, step_seconds: float | None = None) -> dict:
    """Tokens/s of batches read in the training process, and of batches read ahead by a thread.

    Nothing else runs meanwhile, so both are the cost of loading, not the time a training step waits.
    `share_of_step`: seconds per batch over `step_seconds`.
    """
    recipe = bench_recipe("projection", quick)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        data = _prepare(Path(folder), recipe.model.sequence_length)
        loaders = {
            "in_process": _loader(recipe, dataclasses.replace(data, num_workers=0)),
            "read_ahead": _loader(recipe, dataclasses.replace(data, num_workers=1)),
        }
        timings = take_turns(
            {name: lambda turn, loader=loader: _read(loader) for name, loader in loaders.items()}, turns
        )
        for loader in loaders.values():
            loader.close()
    result = {}
    for name, timing in timings.items():
        batch_seconds = Spread.of([seconds / BATCHES for seconds in timing.wall])
        result[name] = {
            "tokens_per_second": Spread.of([BATCHES * recipe.batch_tokens / seconds for seconds in timing.wall]),
            "batch_milliseconds": 1e3 * batch_seconds.median,
            "share_of_step": batch_seconds.median / step_seconds if step_seconds else None,
        }
    return result


def _prepare(folder: Path, sequence_length: int) -> DataConfig:
    """A data set from one standard package's sources, about 0.4 MB of text."""
    source = str(Path(asyncio.__file__).parent / "*.py")
    train_tokenizer([source], folder / "tokenizer", VOCAB_SIZE, progress=False)
    options = PrepareOptions(
        [source], str(folder / "tokenizer"), str(folder / "data"), sequence_length, validation_fraction=0.0, workers=1
    )
    prepare_data(options, progress=False)
    return DataConfig(path=str(folder / "data"))


def _loader(recipe: Recipe, data: DataConfig) -> TrainLoader:
    return TrainLoader(
        data,
        sequence_length=recipe.model.sequence_length,
        vocab_size=recipe.model.vocab_size,
        global_batch_size=recipe.train.global_batch_size,
        micro_batch_size=recipe.train.micro_batch_size,
    )


def _read(loader: TrainLoader) -> None:
    for _ in range(BATCHES):
        next(loader)
