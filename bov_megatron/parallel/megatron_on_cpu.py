"""Patches for running Megatron-core without a GPU; on a machine with a GPU they are not applied.

Megatron-core 0.16.1 allocates on `torch.cuda.current_device()`, saves and restores the CUDA random state around
recomputation, and synchronises the device between pipeline messages. The patches replace the device and the random
state by the CPU's, and disable synchronisation. (The functions that it compiles: see regions.py.)
"""

from __future__ import annotations

import functools
import os

import torch
from torch.overrides import TorchFunctionMode

from bov_megatron.parallel.device import has_gpu


class _CudaMeansCpu(TorchFunctionMode):
    """Replaces `device="cuda"` by `device="cpu"` in every torch call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@functools.cache
def enable() -> None:
    """Apply the patches, once, if there is no GPU."""
    if has_gpu():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when imported
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # Called when data-parallel ranks exchange a checkpoint's tensors.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(
        state
    )

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    mode = _CudaMeansCpu()
    mode.__enter__()
