"""Peak memory of a function's tensors: the allocator's count on a GPU, a count of live tensors on a CPU."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bov_megatron.parallel import regions
from bov_megatron.parallel.device import has_gpu


def peak_bytes(function: Callable[[], object]) -> int:
    """Most bytes that `function` held at once, beside what was held before. On a CPU what an operator allocates and
    frees inside itself does not count."""
    if has_gpu():
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with regions.uncompiled(), _LiveBytes() as live:  # torch does not compile under a dispatch mode
        function()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators return, from their making until they are freed."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        old = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        result = func(*args, **kwargs)
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and _key(tensor) not in old | self._sizes.keys():
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._sizes[key] = size
        weakref.finalize(storage, self._free, key)
        self.now += size
        self.peak = max(self.peak, self.now)

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata
