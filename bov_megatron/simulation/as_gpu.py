"""What a GPU does otherwise than the CPU that a simulation runs on."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from bov_megatron.model import core_attention, output, weight_gradients
from bov_megatron.model.bank import host_tables
from bov_megatron.model.norm import add_and_normalise
from bov_megatron.optim import muon
from bov_megatron.parallel import regions
from bov_megatron.recipe import Recipe
from bov_megatron.simulation.collectives import tensors_in
from bov_megatron.simulation.memory import HOST
from bov_megatron.simulation.tracker import Tracker


@contextlib.contextmanager
def as_gpu(recipe: Recipe, tracker: Tracker) -> Iterator[None]:
    """Compile regions unless `train.compile` is false, attend by flash attention, take the loss in a GPU's chunks,
    multiply in bf16, also into fp32 gradients, and copy rows of host tables to the device."""
    with contextlib.ExitStack() as stack:
        if recipe.train.compile is not False:
            stack.enter_context(regions.replaced_by(Compiled(tracker)))
        chunks = dict.fromkeys(output.CHUNK_ELEMENTS, output.CHUNK_ELEMENTS["cuda"])
        for owner, name, substitute in (
            (core_attention, "attend", _attend(tracker)),
            (output, "CHUNK_ELEMENTS", chunks),
            (muon, "has_fast_bf16_products", lambda device: True),
            (weight_gradients, "adds_exactly", lambda dtype: True),
            (weight_gradients, "wgrad_gemm_accum_fp32", _added_by_product(tracker)),
            (host_tables, "empty", _on_host(tracker, host_tables.empty)),
            (host_tables, "rows_on_device", _copied(host_tables.rows_on_device)),
        ):
            stack.enter_context(patched(owner, name, substitute))
        yield


@contextlib.contextmanager
def patched(owner: Any, name: str, substitute: Any) -> Iterator[None]:
    before = vars(owner)[name]
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        setattr(owner, name, before)


class Compiled:
    """Regions as their compiled graphs run: one kernel forward and one backward, which computes again from the inputs
    what it needs. Nothing in between is stored."""

    def __init__(self, tracker: Tracker):
        self.tracker = tracker
        self._results: dict[tuple, Any] = {}
        """Descriptions, by region and arguments: to run a region once takes longer than all kernels of a layer."""

    def __call__(self, function: Callable, *arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors_in(arguments)):
            return _WithGradient.apply(self, function, *arguments)
        return self.run(function, arguments)

    def run(self, function: Callable, arguments: tuple) -> Any:
        key = (function, *map(_described, arguments))
        with self.tracker.one_kernel(arguments) as results:
            if key not in self._results:
                self._results[key] = tree_map_only(Tensor, _described, function(*arguments))
            result = tree_map_only(_Description, _empty, self._results[key])
            results.append(result)
        return result


@dataclass(frozen=True)
class _Description:
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype


def _described(argument: Any) -> Any:
    if not isinstance(argument, Tensor):
        return argument
    return _Description(argument.shape, argument.stride(), argument.dtype)


def _empty(described: _Description) -> Tensor:
    return torch.empty_strided(described.shape, described.stride, dtype=described.dtype)


class _WithGradient(torch.autograd.Function):
    """A region in training. For the backward pass it keeps the tensors that it is given, as a compiler does that
    computes the rest again; of a sum, the sum."""

    @staticmethod
    def forward(ctx, compiled: Compiled, function: Callable, *arguments):
        ctx.tracker = compiled.tracker
        result = compiled.run(function, arguments)
        is_sum = function is inspect.unwrap(add_and_normalise)
        ctx.save_for_backward(*([result[0]] if is_sum else tensors_in(arguments)))
        ctx.arguments = [_described(argument) for argument in arguments]
        return result

    @staticmethod
    def backward(ctx, *gradients):
        with ctx.tracker.one_kernel([ctx.saved_tensors, gradients]) as results:
            needed = ctx.needs_input_grad[2:]
            results += [_empty(a) if wanted else None for a, wanted in zip(ctx.arguments, needed, strict=True)]
        return None, None, *results


def _attend(tracker: Tracker) -> Callable:
    def attend(
        query_BNSD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, window: int, first_query: int = 0, wanted: str = ""
    ) -> Tensor:
        """`core_attention.attend` by its function `flash`, in fp32 too, where FlexAttention keeps the same tensors."""
        stop, first_key = first_query + query_BNSD.size(2), max(first_query - window, 0)
        key, value = (x.narrow(2, first_key, stop - first_key) for x in (key_BGTD, value_BGTD))
        return _Flash.apply(tracker, *(x.transpose(1, 2) for x in (query_BNSD, key, value)), window).transpose(1, 2)

    return attend


class _Flash(torch.autograd.Function):
    """torch's flash attention with a window, which keeps its output and a number per query and head. The last query is
    at the last key's position."""

    @staticmethod
    def forward(ctx, tracker: Tracker, query_BSND: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, window: int):
        ctx.tracker, queries, keys = tracker, query_BSND.size(1), key_BTGD.size(1)
        seen = sum(min(position, window) + 1 for position in range(keys - queries, keys))
        ctx.flops = 2 * seen * query_BSND[:, 0].numel()  # of one product
        with tracker.one_kernel((), flops=2 * ctx.flops) as results:
            mixed, logsumexp, *_ = torch.ops.aten._flash_attention_forward(
                query_BSND, key_BTGD, value_BTGD, None, None, queries, keys, 0.0, True, False, window_size_left=window
            )
            results += [mixed, logsumexp]
        ctx.save_for_backward(query_BSND, key_BTGD, value_BTGD, mixed, logsumexp)
        return mixed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        # The scores once more, and two products for each of the forward pass's.
        with ctx.tracker.one_kernel((), flops=5 * ctx.flops) as results:
            results += map(torch.empty_like, ctx.saved_tensors[:3])
        return None, *results, None


def _added_by_product(tracker: Tracker) -> Callable:
    def add(input_NI: Tensor, grad_NO: Tensor, main_grad_OI: Tensor) -> None:
        with tracker.one_kernel((), flops=2 * input_NI.size(0) * main_grad_OI.numel()):
            pass

    return add


def _on_host(tracker: Tracker, function: Callable) -> Callable:
    def run(*arguments, **options):
        with tracker.memory.of_kind(HOST):
            return function(*arguments, **options)

    return run


def _copied(function: Callable) -> Callable:
    return lambda *arguments: torch.empty_like(function(*arguments))
