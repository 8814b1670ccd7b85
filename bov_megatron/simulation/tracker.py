"""What a step asks of a device: memory, kernels with their FLOPs and bytes, collectives, and waits of the host."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils.flop_counter import flop_registry

from bov_megatron.simulation.collectives import Traffic, tensors_in
from bov_megatron.simulation.memory import Memory

_MEMORY_ALONE = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh")
_ROWS_ALONE = ("embedding", "index_select", "gather", "scatter_", "scatter_add_", "index_add_")
"""Operators that read or write some rows of their first argument."""


@dataclass
class Counts:
    """Of kernels; each is launched once."""

    launches: int = 0
    host_waits: int = 0
    """How often the host reads a number from the device."""
    flops: float = 0.0
    """Of matrix products and attention."""
    bytes: float = 0.0
    """Read and written by all other kernels."""

    def plus(self, other: Counts, times: int = 1) -> Counts:
        return Counts(*(getattr(self, f.name) + times * getattr(other, f.name) for f in fields(self)))


class Tracker(Traffic):
    """Dispatch mode that watches a step.

    With a `fake_mode`, which is entered first (and allows real tensors), fake tensors are the device's and real ones
    the host's: operators on real ones alone are run and not counted. Without, everything is the device's.

    Args:
        kind: of memory outside of any block of `memory.of_kind`.
    """

    def __init__(self, kind: str, fake_mode: FakeTensorMode | None = None):
        super().__init__()
        self.memory, self.counts, self.fake_mode = Memory(kind), Counts(), fake_mode
        self._uncounted = False
        self._waited_at = -1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # an attribute of fake tensors, asked for ten times per kernel
            return args[0].fake_device
        kwargs = kwargs or {}
        if function.namespace == "c10d":
            return self.communicate(function, args, kwargs)
        if self._uncounted:
            return function(*args, **kwargs)
        inputs = list(tensors_in([args, list(kwargs.values())]))
        if self.fake_mode is not None:
            if inputs and not any(isinstance(tensor, FakeTensor) for tensor in inputs):
                with unset_fake_temporarily():
                    return function(*args, **kwargs)
            if function is torch.ops.aten._local_scalar_dense.default:
                return self._read(inputs[0])
        result = function(*args, **kwargs)
        outputs = list(tensors_in([result]))
        for output in outputs:
            self.memory.add(output)
        if _is_kernel(function) and not any(map(self.memory.is_on_host, inputs)):
            flops = flop_registry.get(function.overloadpacket)
            if function.overloadpacket.__name__ in _ROWS_ALONE:  # twice for the rows, once for their index
                inputs, outputs = [*inputs[1:], *inputs[2:]], [] if outputs[0] is inputs[0] else [*outputs, *outputs]
            self._count(inputs, outputs, 0.0 if flops is None else flops(*args, **kwargs, out_val=result))
        return result

    def communicate(self, function, args: tuple, kwargs: dict) -> Any:
        """See Traffic. Of real tensors in a world of fakes, the other ranks send what this rank sends itself."""
        result = super().communicate(function, args, kwargs)
        if self.fake_mode is not None and function.overloadpacket.__name__ == "alltoall_base_":
            output, source, group, _, sent, *_ = args
            if not isinstance(output, FakeTensor):
                group = dist.ProcessGroup.unbox(group)
                own = (source.split(sent) if sent else source.chunk(group.size()))[group.rank()]
                output.copy_(own.repeat(group.size(), *[1] * (own.dim() - 1)))
        return result

    def _read(self, tensor: Tensor) -> float | int:
        """A number of the device's, 0. The host waits for it, unless it has waited for all kernels already."""
        if self._waited_at != self.counts.launches and not self.memory.is_on_host(tensor):
            self.counts.host_waits += 1
            self._waited_at = self.counts.launches
        return 0.0 if tensor.dtype.is_floating_point else 0

    def _count(self, inputs: Any, outputs: Any, flops: float) -> None:
        self.counts.launches += 1
        self.counts.flops += flops
        if not flops:
            self.counts.bytes += sum(tensor.nbytes for tensor in tensors_in([inputs, outputs]))

    @contextlib.contextmanager
    def one_kernel(self, inputs: Any, flops: float = 0.0) -> Iterator[list]:
        """Count everything inside as one kernel, without memory for what is in between. Its results are to be appended
        to the list that is yielded."""
        results: list = []
        with self.uncounted():
            yield results
        if not self._uncounted:
            for output in tensors_in(results):
                self.memory.add(output)
            self._count(inputs, results, flops)

    @contextlib.contextmanager
    def uncounted(self) -> Iterator[None]:
        before, self._uncounted = self._uncounted, True
        try:
            yield
        finally:
            self._uncounted = before

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Everything inside is the host's work, on real tensors."""
        with unset_fake_temporarily(), self.uncounted():
            yield

    def to_device(self, tensor: Tensor) -> Tensor:
        """A fake tensor for a copy of a real one."""
        if self.fake_mode is None or isinstance(tensor, FakeTensor):
            return tensor
        copy = self.fake_mode.from_tensor(tensor)
        self.memory.add(copy)
        return copy


@functools.cache
def _is_kernel(function) -> bool:
    """Whether an operator runs a kernel: not those that only make views or allocate memory."""
    returned = [result.alias_info for result in function._schema.returns]
    is_view = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return not is_view and function.overloadpacket.__name__ not in _MEMORY_ALONE
