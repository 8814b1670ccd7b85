"""Results and errors shared by all ranks: if one rank fails, all raise the same error, and none waits for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bov_megatron.errors import BovError, RunFolderError
from bov_megatron.parallel.device import device, to_device

T = TypeVar("T")


def on_all_ranks(function: Callable[[], T]) -> T:
    """`function()` on every rank; collective.

    If it raises a BovError on any rank, all ranks raise the error of the first such rank. Any other error ends the rank
    that meets it.
    """
    result, error = _attempt(function)
    # One number, whatever the world size; the error is sent only if there is one.
    rank, world_size = dist.get_rank(), dist.get_world_size()
    first = torch.tensor(world_size if error is None else rank, device=device())
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    if (source := int(first)) == world_size:
        return result
    shared: list[Any] = [error if source == rank else None]
    dist.broadcast_object_list(shared, src=source)
    where = f" (on rank {source})" if source else ""
    raise type(shared[0])(f"{shared[0]}{where}") from error


def on_first_rank(function: Callable[[], T]) -> T:
    """The result of rank 0's `function()`, which works on the run folder, on every rank; collective.

    All ranks raise its BovError, or RunFolderError for its OSError.
    """
    result, error = None, None
    if dist.get_rank() == 0:
        try:
            result, error = _attempt(function)
        except OSError as failure:
            # Libraries raise it with a text of their own, too.
            problem = f"{failure.filename}: {failure.strerror}" if failure.filename else str(failure)
            error = RunFolderError(f"{problem}; check the file system and its permissions")
    answer: list[Any] = [result, error]
    dist.broadcast_object_list(answer, src=0)
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def agree_on_highest(numbers: Tensor, known: Sequence[float] = ()) -> tuple[list[float], list[float], list[int]]:
    """Maxima over all ranks, and whose they are; collective. Waits for the device, once.

    Args:
        numbers: fp64 on the device, `[n]`; `nan` for all ranks where any rank's is not finite.
        known: numbers that the host has already, equally many on every rank; -inf where this rank has none.

    Returns maxima of `numbers`, maxima of `known`, and the highest rank that has each of the latter.
    """
    own = to_device(torch.tensor(known, dtype=torch.float64))
    finite = numbers.isfinite()
    highest = torch.cat([torch.where(finite, numbers, -math.inf), (~finite).double(), own])
    dist.all_reduce(highest, op=dist.ReduceOp.MAX)
    ranks = torch.where(own == highest[2 * len(numbers) :], dist.get_rank(), -1).double()
    if known:
        dist.all_reduce(ranks, op=dist.ReduceOp.MAX)
    count = len(numbers)
    values = torch.cat([highest, ranks]).tolist()
    maxima, bad, rest = values[:count], values[count : 2 * count], values[2 * count :]
    agreed = [math.nan if is_bad else number for number, is_bad in zip(maxima, bad, strict=True)]
    return agreed, rest[: len(known)], [int(rank) for rank in rest[len(known) :]]


def _attempt(function: Callable[[], Any]) -> tuple[Any, BovError | None]:
    try:
        return function(), None
    except BovError as error:
        return None, error


def all_agree(own: bool) -> bool:
    """Whether `own` is true on every rank; collective, one number."""
    agreed = torch.tensor(int(own), device=device())
    dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
    return bool(agreed)


def gather_on_first_rank(item: T) -> list[T]:
    """All ranks' items, in the order of ranks, on rank 0, and nothing on others; collective."""
    gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(item, gathered or None)
    return gathered


def gather_items(items: list[T]) -> list[T]:
    """All ranks' items, in the order of ranks, on every rank; collective. Without items, only a number is sent."""
    count = torch.tensor(len(items), device=device())
    dist.all_reduce(count)
    if not int(count):
        return []
    gathered: list[list[T]] = [[]] * dist.get_world_size()
    dist.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]
