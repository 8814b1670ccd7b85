"""Time on a device between two points of a program."""

from __future__ import annotations

import time
from typing import Any

import torch

from bov_megatron.parallel.device import has_gpu


class DeviceTimer:
    """Time between `start` and `stop` on this rank's device: on a GPU between events of its stream, as the host runs
    ahead; on a CPU by the clock."""

    def __init__(self):
        self._on_gpu = has_gpu()
        self._started: Any = None  # seconds, or a CUDA event
        self._stopped: Any = None

    def start(self) -> None:
        self._started, self._stopped = self._now(), None

    def stop(self) -> None:
        self._stopped = self._now()

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float | None:
        """Seconds between the last `start` and `stop`, or None before; waits for the GPU to be there."""
        if self._stopped is None:
            return None
        if not self._on_gpu:
            return self._stopped - self._started
        self._stopped.synchronize()
        return self._started.elapsed_time(self._stopped) / 1e3
