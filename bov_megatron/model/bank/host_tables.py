"""Value tables in host memory: rows are copied to the device ahead of their layer, gradients back afterwards.

A host table's weight, gradient (`main_grad`, fp32) and optimizer state stay on the host; the device has only the
distinct rows of the micro-batches in flight. Copies use pinned memory and a separate stream. A thread adds gradients to
the table, in the order of the calls, so that the main thread never waits for a copy. engines/host_rows.py has what
data-parallel ranks exchange.

Without a GPU the same code runs, but nothing is copied.

Shapes: R rows of a table on this rank, K its columns.
"""

from __future__ import annotations

import contextlib
import functools
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from bov_megatron.parallel.device import device, has_gpu, use_device

# Global, like the thread and the stream below: autograd functions add gradients and the engine waits for them, but they
# share no object.
_additions: list[Future] = []
"""Pending additions of gradients, in order."""


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Host memory, pinned if there is a GPU."""
    return torch.empty(*shape, dtype=dtype, device="cpu", pin_memory=has_gpu())


class CopyStream:
    """Context manager: copies and collectives inside run on the copy stream, in parallel with compute.

    Args:
        after_compute: whether they first wait for the kernels launched on the compute stream so far.
    """

    def __init__(self, after_compute: bool):
        self.after_compute = after_compute

    def __enter__(self) -> CopyStream:
        self._event: torch.cuda.Event | None = None
        self._block: contextlib.AbstractContextManager = contextlib.nullcontext()
        if has_gpu():
            stream = _copy_stream()
            if self.after_compute:
                stream.wait_stream(torch.cuda.current_stream())
            self._event, self._block = torch.cuda.Event(), torch.cuda.stream(stream)
        self._block.__enter__()
        return self

    def __exit__(self, *error) -> None:
        if self._event is not None:
            self._event.record()
        self._block.__exit__(*error)

    def wait(self, made: Tensor) -> None:
        """Make the current stream wait for the block's work, before it uses the block's tensor `made`."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)
            made.record_stream(torch.cuda.current_stream())

    def wait_on_host(self) -> None:
        if self._event is not None:
            self._event.synchronize()


def rows_on_device(table_RK: Tensor, index: Tensor) -> Tensor:
    """`table[index]` of a host table, copied to the device asynchronously on the current stream."""
    rows = empty(index.numel(), table_RK.size(1), dtype=table_RK.dtype)
    torch.index_select(table_RK, 0, index, out=rows)
    return rows.to(device(), non_blocking=True)


def add_later(target_RK: Tensor, index: Tensor, rows: Tensor) -> None:
    """`target[index] += rows` with a host table's gradient and rows on the device; done once `wait_for_additions`
    returns."""
    with CopyStream(after_compute=True) as copy:
        staged = rows
        if rows.is_cuda:
            staged = empty(*rows.shape, dtype=rows.dtype)
            staged.copy_(rows, non_blocking=True)
            rows.record_stream(torch.cuda.current_stream())

    def add() -> None:
        copy.wait_on_host()
        target_RK.index_add_(0, index, staged.to(target_RK.dtype))

    _additions.append(_adder().submit(add))


def wait_for_additions() -> None:
    """Wait for all additions of `add_later`. Raises the error of an addition that failed."""
    while _additions:
        _additions.pop(0).result()


@functools.cache
def _copy_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


@functools.cache
def _adder() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(
        max_workers=1, thread_name_prefix="table-gradients", initializer=use_device, initargs=(device(),)
    )
