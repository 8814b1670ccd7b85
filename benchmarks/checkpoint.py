"""How long a save keeps training waiting: written before training goes on, and beside it."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from benchmarks.timing import Spread
from benchmarks.training_step import bench_recipe, one_process, random_micro_batches
from bov_megatron import checkpoint
from bov_megatron.checkpoint.manifest import read_manifest
from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.lifecycle import run_folder
from bov_megatron.parallel.device import has_gpu

CPU_VOCABULARY = 32768


def bench_checkpoint(turns: int, quick: bool, folder: Path | None = None) -> dict:
    """Seconds that a save of the step benchmark's model stalls training: one rank, on a CPU a vocabulary of 32,768.

    A turn saves once each way, the first turn doesn't count. `waiting`: until the checkpoint has its name. `beside`
    (checkpoint.asynchronous): the copy, the polls at step boundaries and the naming; `steps_while_writing` is how much
    longer than otherwise the steps meanwhile took, all in all: on a CPU the writer competes with them for cores.

    Args:
        folder: on the file system to measure; default: the one for temporary files.
    """
    recipe = bench_recipe("bank", quick)
    if not quick and not has_gpu():  # more to write, and steps that take no longer
        recipe.model.vocab_size = CPU_VOCABULARY
        recipe.train.global_batch_size = recipe.train.micro_batch_size = 1
    seconds: dict[str, list[float]] = {"waiting": [], "beside": [], "slowed": []}
    scratch = Path(tempfile.mkdtemp(prefix="bench-", dir=folder))
    try:
        with one_process(recipe):
            engine = MegatronEngine(recipe)
            for turn in range(turns + 1):
                step_seconds = min(_step(engine, turn) for _ in range(2))  # the first may be the first of all
                found = {}
                for way in ("waiting", "beside")[:: -1 if turn % 2 else 1]:
                    if way == "waiting":
                        found["waiting"] = _waiting(engine, scratch, turn)
                    else:
                        found["beside"], found["slowed"] = _beside(engine, scratch, turn, step_seconds)
                if turn:
                    for name, value in found.items():
                        seconds[name].append(value)
            size = read_manifest(run_folder.latest_checkpoint(scratch)).size
    finally:
        shutil.rmtree(scratch)
    return {
        "checkpoint_bytes": size,
        "variants": {
            "waiting": {"stall_seconds": Spread.of(seconds["waiting"])},
            "beside": {
                "stall_seconds": Spread.of(seconds["beside"]),
                "steps_while_writing_seconds": Spread.of(seconds["slowed"]),
            },
        },
        "beside / waiting": Spread.of([b / w for b, w in zip(seconds["beside"], seconds["waiting"], strict=True)]),
    }


def _step(engine: MegatronEngine, seed: int) -> float:
    started = time.perf_counter()
    engine.train_step(random_micro_batches(engine.recipe, seed))
    return time.perf_counter() - started


def _waiting(engine: MegatronEngine, folder: Path, turn: int) -> float:
    started = time.perf_counter()
    checkpoint.save(engine, folder, 2 * turn + 1, keep_last=1, extra={})
    return time.perf_counter() - started


def _beside(engine: MegatronEngine, folder: Path, turn: int, step_seconds: float) -> tuple[float, float]:
    """Seconds of stall, and by how many the steps meanwhile were slower than `step_seconds` each."""
    started = time.perf_counter()
    pending = checkpoint.begin_save(engine, folder, 2 * turn + 2, keep_last=1, extra={})
    stall, slowed = time.perf_counter() - started, 0.0
    while True:
        slowed += _step(engine, turn) - step_seconds
        started = time.perf_counter()
        written = pending.is_written()
        if written:
            pending.finish()
        stall += time.perf_counter() - started
        if written:
            return stall, slowed
