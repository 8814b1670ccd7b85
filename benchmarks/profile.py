"""Where a training step's time goes, by kernel (on a CPU: by operator)."""

from __future__ import annotations

import time
from itertools import count

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.training_step import one_process, published, random_micro_batches
from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.parallel.device import has_gpu

RECIPE = "780m_bov"
KERNELS = 20
WARM_UP = 3
"""Steps before the one that is looked at: allocation and compilation."""


def bench_profile(turns: int, quick: bool) -> dict:
    """One step of the 780M bank: its wall-clock milliseconds, how many of them the device was busy, and the twenty
    kernels that took longest, with their share of all kernels' time. `turns` play no part."""
    recipe = published(RECIPE, quick)
    with one_process(recipe):
        engine, turns = MegatronEngine(recipe), count()
        for _ in range(WARM_UP):
            engine.train_step(random_micro_batches(recipe, next(turns)))
        batch = random_micro_batches(recipe, next(turns))
        with profile(activities=[ProfilerActivity.CUDA if has_gpu() else ProfilerActivity.CPU]) as profiler:
            started = time.perf_counter()
            engine.train_step(batch)
            if has_gpu():
                torch.cuda.synchronize()
            wall = time.perf_counter() - started
    every = {
        event.key: (event.self_device_time_total if has_gpu() else event.self_cpu_time_total, event.count)
        for event in profiler.key_averages()
    }
    taken = {name: (microseconds, calls) for name, (microseconds, calls) in every.items() if microseconds}
    busy = sum(microseconds for microseconds, _ in taken.values())
    longest = sorted(taken.items(), key=lambda item: -item[1][0])[:KERNELS]
    return {
        "recipe": RECIPE,
        "step_milliseconds": 1000 * wall,
        "busy_milliseconds": busy / 1000,
        "launches": sum(calls for _, calls in taken.values()),
        "kernels": [
            {"name": name, "milliseconds": microseconds / 1000, "share": microseconds / busy, "calls": calls}
            for name, (microseconds, calls) in longest
        ],
    }
