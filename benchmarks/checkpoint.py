"""How long a save stalls training, if training waits for it and if it is written in the background."""

from __future__ import annotations

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


def bench_checkpoint(turns: int, quick: bool) -> dict:
    """Seconds for which a save of the step benchmark's model (on a CPU with 32,768 ids) stalls training on one rank.

    `waiting`: until the checkpoint is complete. `beside` (checkpoint.asynchronous): the copy, the polls at step
    boundaries and the final rename; `steps_while_writing_seconds` is the total slowdown of the steps meanwhile, which
    on a CPU compete with the writer for cores. Each turn saves both ways; the first isn't counted.
    Writes to the folder for temporary files.
    """
    recipe = bench_recipe("bank", quick)
    if not quick and not has_gpu():  # more to write, and steps that take no longer
        recipe.model.vocab_size = CPU_VOCABULARY
        recipe.train.global_batch_size = recipe.train.micro_batch_size = 1
    seconds: dict[str, list[float]] = {"waiting": [], "beside": [], "slowed": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder, one_process(recipe):
        scratch = Path(folder)
        engine = MegatronEngine(recipe)
        for turn in range(turns + 1):
            step_seconds = min(_step(engine, turn) for _ in range(2))  # the very first step is slow
            measured = {}
            for way in ("waiting", "beside")[:: -1 if turn % 2 else 1]:
                if way == "waiting":
                    measured["waiting"] = _waiting(engine, scratch, turn)
                else:
                    measured["beside"], measured["slowed"] = _beside(engine, scratch, turn, step_seconds)
            if turn:
                for name, value in measured.items():
                    seconds[name].append(value)
        size = read_manifest(run_folder.latest_checkpoint(scratch)).size
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
    """Seconds of stall, and the total by which steps meanwhile exceeded `step_seconds`."""
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
