"""Tokens per second and model FLOPs utilisation (MFU)."""

from __future__ import annotations

import time
from collections import deque

from bov_megatron.parallel.device import device_name
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.gpus import peak_of_device
from bov_megatron.recipe.quantities import flops_per_token

WINDOW = 20
"""Steps over which rates are averaged."""


def peak_flops(recipe: Recipe) -> float | None:
    """Peak FLOP/s of this rank's device: `logging.peak_flops`, else the known value, None where unknown (a CPU)."""
    return recipe.logging.peak_flops or peak_of_device(device_name())


class Throughput:
    """Rates over a sliding window of training steps; saving and validation don't count.

    MFU counts executed FLOPs: a bank layer has no value projection, and a lookup counts 0.
    """

    def __init__(self, recipe: Recipe, world_size: int):
        self.batch_tokens = recipe.batch_tokens
        self.flops = flops_per_token(recipe.model) * recipe.batch_tokens
        peak = peak_flops(recipe)
        self.world_peak = peak * world_size if peak else None
        self.seconds: deque[float] = deque(maxlen=WINDOW)
        self.started = 0.0

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> dict[str, float]:
        """At the end of a step: its `step_seconds`, `tokens_per_second` and `mfu`; and the means over the window,
        `mean_tokens_per_second` and `mean_mfu`. Without a known peak there is no MFU."""
        seconds = time.perf_counter() - self.started
        self.seconds.append(seconds)
        rates = {"step_seconds": seconds}
        for prefix, duration in (("", seconds), ("mean_", self.mean_seconds)):
            rates[f"{prefix}tokens_per_second"] = self.batch_tokens / duration
            if self.world_peak:
                rates[f"{prefix}mfu"] = self.flops / duration / self.world_peak
        return rates

    @property
    def mean_seconds(self) -> float:
        return sum(self.seconds) / len(self.seconds)
