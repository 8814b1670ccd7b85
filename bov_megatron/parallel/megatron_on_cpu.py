"""Running Megatron-core where there is no GPU: the few places that assume CUDA, answered for the CPU.

Nothing here is active on a machine with a GPU. Megatron-core 0.16.1 allocates on
`torch.cuda.current_device()`, reads and writes the CUDA random state around recomputation, compiles small
functions, and synchronises the device between pipeline messages. On a CPU those are, in turn: the CPU, the
CPU's random state, the functions as they are, and nothing.
"""

from __future__ import annotations

import functools
import os

import torch
from torch.overrides import TorchFunctionMode

from bov_megatron.parallel.device import has_gpu


class _CudaMeansCpu(TorchFunctionMode):
    """Turns `device="cuda"` into `device="cpu"` in every torch function called inside."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@functools.cache
def enable() -> None:
    """Make Megatron-core run on this machine's CPU. Does nothing on a GPU, or when called again."""
    if has_gpu():
        return
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed reads it when imported
    torch._dynamo.config.disable = True  # jit_fuser compiles: minutes on a CPU, for nothing
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    # Data-parallel ranks exchanging a checkpoint's tensors.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(
        state
    )

    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    mode = _CudaMeansCpu()
    mode.__enter__()
